"""Accuracy by depth and by refinement steps, calibration of the halting head, the result file, the plot.

A head is run once, without halting, up to the largest number of steps; every figure here is read off that one run.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hybrid import __version__
from hybrid.backbone import length_batches
from hybrid.batches import EmbeddedExamples
from hybrid.data import Example, data_fingerprint
from hybrid.generation import answer_text_loss
from hybrid.losses import all_fields_right
from hybrid.model import HybridModel
from hybrid.refinement import PICKS, TOKEN_BUDGET, noisy_copies, pick_rollout, refine

Z_95 = 1.959964  # two-sided 95% quantile of the normal distribution


def wilson_interval(num_right: int, n: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927), which stays inside [0, 1] and is sound for small n."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = num_right / n, Z_95**2
    center, half = p + z2 / (2 * n), Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (center - half) / (1 + z2 / n)), min(1.0, (center + half) / (1 + z2 / n))


def accuracy_row(right: Tensor) -> dict[str, Any]:
    """Accuracy, standard error, 95% interval and n of a boolean vector."""
    n, num_right = len(right), int(right.sum())
    p = num_right / max(n, 1)
    return {
        "accuracy": p,
        "stderr": math.sqrt(p * (1 - p) / max(n - 1, 1)),
        "interval": list(wilson_interval(num_right, n)),
        "n": n,
    }


def by_depth(right: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """One accuracy row per depth, then one for all together (`depth` = "all")."""
    depths = sorted({example.depth for example in examples}, key=lambda depth: (depth is None, depth or 0))
    rows = []
    for depth in depths:
        chosen = torch.tensor([example.depth == depth for example in examples])
        rows.append({"depth": depth, **accuracy_row(right[chosen])})
    return [*rows, {"depth": "all", **accuracy_row(right)}]


@dataclass
class StepRecord:
    """What a head did on a set of examples, at every step.

    Attributes:
        right: Whether the whole answer is right, (steps, examples).
        fields_right: Share of an example's fields that are right, (steps, examples).
        halt_logits: The q head, (steps, examples).
        wants_halt: Whether the example would halt there by the head's own halting, (steps, examples).
        movement: How far the step moved the answer latent, relative to its length, (steps, examples).
        seconds: Time of the refinement, embedding not included.
    """

    right: Tensor
    fields_right: Tensor
    halt_logits: Tensor
    wants_halt: Tensor
    movement: Tensor
    seconds: float

    def steps_used(self, max_steps: int) -> Tensor:
        """Steps that each example takes with the head's own halting, (examples,)."""
        wants = self.wants_halt[:max_steps]
        return torch.where(wants.any(0), wants.int().argmax(0) + 1, max_steps)

    def when_halted(self, values: Tensor, max_steps: int) -> Tensor:
        """Values (steps, examples) such as `right` at the halting step of each example, (examples,)."""
        return values.gather(0, (self.steps_used(max_steps) - 1)[None])[0]


@torch.inference_mode()
def run_text(
    model: HybridModel, examples: EmbeddedExamples, rows: Sequence[int], token_budget: int = TOKEN_BUDGET
) -> Tensor:
    """Whether greedy decoding writes the answer of each of some examples, word for word; (rows,)."""
    model.eval()
    right = torch.zeros(len(rows), dtype=torch.bool)
    for places in length_batches([examples.lengths[row] for row in rows], token_budget):
        chosen = [rows[place] for place in places]
        hidden_states, mask, fields, _ = examples.batch(model, chosen)
        latent = refine(model, hidden_states, mask, fields).answer_latent.to(model.device)
        _, written = answer_text_loss(model, latent, fields, [examples.examples[row] for row in chosen])
        right[places] = written.cpu()
    return right


def run_steps(
    model: HybridModel,
    examples: EmbeddedExamples,
    max_steps: int,
    *,
    token_budget: int = TOKEN_BUDGET,
    progress: bool = True,
) -> StepRecord:
    """Run a head on examples for `max_steps` steps without halting."""
    model.eval()
    n = len(examples)
    shape = (max_steps, n)
    no = torch.zeros(shape, dtype=torch.bool)
    record = StepRecord(no, torch.zeros(shape), torch.zeros(shape), no.clone(), torch.zeros(shape), 0.0)
    with tqdm(total=n, unit="question", desc="evaluate", disable=not progress, leave=False) as bar:
        for rows in examples.batches(token_budget):
            hidden_states, mask, fields, labels = examples.batch(model, rows)
            start = time.perf_counter()
            refined = refine(model, hidden_states, mask, fields, max_steps=max_steps, halting="never", by_step=True)
            record.seconds += time.perf_counter() - start
            assert refined.scores_by_step is not None
            labels = labels.cpu()
            exists = labels >= 0
            for step, scores in enumerate(refined.scores_by_step):
                record.right[step, rows] = all_fields_right(scores, labels)
                hits = ((scores.argmax(-1) == labels) & exists).sum(1) / exists.sum(1)
                record.fields_right[step, rows] = hits
            assert refined.halt_logits_by_step is not None and refined.wants_halt_by_step is not None
            record.halt_logits[:, rows] = refined.halt_logits_by_step
            record.wants_halt[:, rows] = refined.wants_halt_by_step
            assert refined.movement_by_step is not None
            record.movement[:, rows] = refined.movement_by_step
            bar.update(len(rows))
    return record


def run_rollouts(
    model: HybridModel, examples: EmbeddedExamples, rollouts: Sequence[int], *, progress: bool = True
) -> dict[str, Any]:
    """Accuracy by depth for several numbers of noisy copies, and both ways to pick one (`refine_rollouts`).

    Each copy refines with the head's own halting and `max_steps`.

    Raises:
        ValueError: A number of rollouts is below 1.
    """
    if not rollouts or min(rollouts) < 1:
        raise ValueError(f"rollouts={list(rollouts)}: expected numbers > 0")
    model.eval()
    right = {(pick, count): torch.zeros(len(examples), dtype=torch.bool) for pick in PICKS for count in rollouts}
    with tqdm(total=len(examples), unit="question", desc="rollouts", disable=not progress, leave=False) as bar:
        for rows in examples.batches(TOKEN_BUDGET):
            hidden_states, mask, fields, labels = examples.batch(model, rows)
            runs = noisy_copies(model, hidden_states, mask, fields, max(rollouts))
            for (pick, count), hits in right.items():
                hits[rows] = all_fields_right(pick_rollout(runs[:count], pick).scores, labels.cpu())
            bar.update(len(rows))
    return {
        f"accuracy_by_rollouts_{pick}": [
            {"rollouts": count, "by_depth": by_depth(right[pick, count], examples.examples)} for count in rollouts
        ]
        for pick in PICKS
    }


def calibration(record: StepRecord, step: int, num_bins: int = 10) -> dict[str, Any]:
    """How well the q head knows whether the answer is right, at one step.

    Returns:
        `bins` (mean belief, accuracy and n of each non-empty tenth), the expected calibration error over them
        (Naeini et al. 2015), and the area under the ROC curve.
    """
    belief, right = record.halt_logits[step - 1].sigmoid(), record.right[step - 1].float()
    index = (belief * num_bins).long().clamp(max=num_bins - 1)
    bins, error = [], 0.0
    for bin_number in range(num_bins):
        chosen = index == bin_number
        if n := int(chosen.sum()):
            mean_belief, accuracy = float(belief[chosen].mean()), float(right[chosen].mean())
            bins.append({"belief": mean_belief, "accuracy": accuracy, "n": n})
            error += n / len(belief) * abs(mean_belief - accuracy)
    return {"step": step, "expected_calibration_error": error, "auroc": _auroc(belief, right), "bins": bins}


def _auroc(belief: Tensor, right: Tensor) -> float | None:
    num_right, num_wrong = int(right.sum()), int((1 - right).sum())
    if num_right == 0 or num_wrong == 0:
        return None
    _, inverse, counts = belief.unique(return_inverse=True, return_counts=True)
    mean_rank = (counts.cumsum(0) - (counts - 1) / 2)[inverse]  # tied beliefs share their mean rank
    return float((mean_rank[right.bool()].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def summarize(record: StepRecord, examples: Sequence[Example], steps: Sequence[int], max_steps: int) -> dict[str, Any]:
    """The figures of a result file."""
    halted = record.when_halted(record.right, max_steps)
    used = record.steps_used(max_steps).float()
    return {
        "accuracy_by_depth": by_depth(halted, examples),
        "accuracy_by_steps": [
            {"steps": step, "by_depth": by_depth(record.right[step - 1], examples)} for step in steps
        ],
        "movement_by_steps": [round(float(step.mean()), 6) for step in record.movement],
        "num_fields": max(len(example.answered) for example in examples),
        "field_accuracy": float(record.when_halted(record.fields_right, max_steps).mean()),
        "mean_steps_used": float(used.mean()),
        "mean_steps_used_by_depth": {
            str(depth): float(used[torch.tensor([e.depth == depth for e in examples])].mean())
            for depth in sorted({e.depth for e in examples}, key=lambda d: (d is None, d or 0))
        },
        "calibration": calibration(record, max_steps),
        "milliseconds_per_question_per_step": 1000 * record.seconds / (len(examples) * len(record.right)),
    }


def answer_milliseconds(model: HybridModel, examples: Sequence[Example], at_most: int = 21) -> float:
    """Median time of one answer, from its text, one question at a time; the first one warms up."""
    times = []
    for example in examples[:: max(1, len(examples) // at_most)][:at_most]:
        start = time.perf_counter()
        model.answer(example.question, context=example.context, fields=example.fields)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:] or times)


def evaluate_head(
    model: HybridModel, embedded: EmbeddedExamples, steps: Sequence[int], *, progress: bool = True
) -> dict[str, Any]:
    """Run a head on embedded examples and return the figures of a result file.

    Args:
        model: The head.
        embedded: The questions.
        steps: Numbers of refinement steps to report; halting is judged at the head's own `max_steps`.
        progress: Show a progress bar.

    Raises:
        ValueError: A number of steps is below 1.
    """
    if not steps or min(steps) < 1:
        raise ValueError(f"steps={list(steps)}: expected numbers > 0")
    max_steps = model.config.reasoner.max_steps
    record = run_steps(model, embedded, max(max_steps, *steps), progress=progress)
    return {
        "num_parameters": sum(model.parameter_groups().values()),
        "milliseconds_per_question": answer_milliseconds(model, embedded.examples),
        "data_fingerprint": data_fingerprint(embedded.examples),
        **summarize(record, embedded.examples, sorted(set(steps)), max_steps),
    }


def train_seconds(head: Path) -> float | None:
    """Seconds of training, from the log of the run, if it lies in the folder of a released head or above a run's."""
    return max((line["seconds"] for line in _log_lines(head) if "seconds" in line), default=None)


def train_device(head: Path) -> str | None:
    """Device of training, from the same log; logs of older versions do not say it."""
    return next((line["device"] for line in reversed(_log_lines(head)) if "device" in line), None)


def training_cost(head: Path) -> dict[str, Any]:
    """Both, as result files have them."""
    return {"train_seconds": train_seconds(head), "train_device": train_device(head)}


def _log_lines(head: Path) -> list[dict[str, Any]]:
    log = next((path for path in (head / "log.jsonl", head.parent / "log.jsonl") if path.exists()), None)
    return [json.loads(line) for line in log.read_text().splitlines()] if log is not None else []


COSTS = {
    "trainable parameters": ("num_parameters", "{:,}"),
    "training, seconds": ("train_seconds", "{:,.0f}"),
    "one answer, milliseconds": ("milliseconds_per_question", "{:,.0f}"),
}


def cost_cell(system: dict[str, Any], key: str) -> str:
    """A cost, with the name of the GPU it was measured on, if it was one; a dash where it is not known."""
    if system.get(key) is None:
        return "–"
    text = dict(COSTS.values())[key].format(system[key])
    device = system.get({"train_seconds": "train_device", "milliseconds_per_question": "device"}.get(key, ""))
    return f"{text} ({device.removeprefix('NVIDIA ')})" if device and not _is_cpu(device) else text


def accuracy_cell(row: dict[str, Any]) -> str:
    """Accuracy and interval of an `accuracy_row`, as tables show them."""
    low, high = row["interval"]
    return f"{row['accuracy']:.3f} ({low:.3f}–{high:.3f})"


def accuracy_lines(results: dict[str, Any], *others: dict[str, Any]) -> str:
    """Result files as a Markdown table: head, baselines and others, a row per depth, then what each costs.

    Answers of several fields are whole answers; the share of single fields that are right has a row of its own.
    """
    beside = [{"device": results.get("device"), **baseline} for baseline in results.get("baselines", [])]
    systems: list[dict[str, Any]] = [{"name": "head", **results}, *beside, *others]
    names = [system["name"] for system in systems]
    lines = ["| depth | n | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(systems)]
    for number, row in enumerate(results["accuracy_by_depth"]):
        cells = []
        for system in systems:
            other = system["accuracy_by_depth"][number]
            if (other["depth"], other["n"]) != (row["depth"], row["n"]):
                raise ValueError(f"{system['name']} was evaluated on other questions than the head")
            cells.append(accuracy_cell(other))
        lines.append(f"| {row['depth']} | {row['n']} | " + " | ".join(cells) + " |")
    if results.get("num_fields", 1) > 1:
        cells = [f"{system['field_accuracy']:.3f}" if "field_accuracy" in system else "–" for system in systems]
        lines.append("| single fields | | " + " | ".join(cells) + " |")
    for name, (key, _) in COSTS.items():
        cells = [cost_cell(system, key) for system in systems]
        if set(cells) != {"–"}:
            lines.append(f"| {name} | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def harness_lines(results: dict[str, Any]) -> str:
    """Result file of `hybrid harness` as a Markdown table: scores with standard errors, a row per task and metric."""
    systems = [results, *results["compared"]]
    names = [system["name"] for system in systems]
    lines = ["| task | split | n | metric | " + " | ".join(names) + " |", "|---|---|---|---|" + "---|" * len(systems)]
    for task, row in results["results"].items():
        metrics = [key for system in systems for key in system["results"].get(task, {}) if "," in key]
        for metric in dict.fromkeys(key for key in metrics if "_stderr" not in key):
            cells = [_score(system, task, metric) for system in systems]
            name = metric.removesuffix(",none")
            if name == "acc_norm" and results["config"].get("mode") == "choice":
                cells[0] = "–"  # no likelihoods, so dividing them by a length means nothing
            if set(cells) == {"–"}:
                continue
            n = next(system["results"][task] for system in systems if metric in system["results"].get(task, {}))
            asked = [row["alias"].strip(), results["split"].get(task, ""), str(n.get("sample_len", "")), name]
            lines.append("| " + " | ".join([*asked, *cells]) + " |")
    lines.append("| seconds | | | | " + " | ".join(f"{system['seconds']:,.0f}" for system in systems) + " |")
    return "\n".join(lines)


def _score(system: dict[str, Any], task: str, metric: str) -> str:
    found = system["results"].get(task, {})
    name, _, filtered = metric.partition(",")
    score, error = found.get(metric), found.get(f"{name}_stderr,{filtered}")
    if score is None:
        return "–"
    return f"{score:.3f} ± {error:.3f}" if isinstance(error, float) else f"{score:.3f}"


def provenance(command: str, seed: int) -> dict[str, Any]:
    """What a number needs to be believed: command, seed, commit, versions, device."""
    return {
        "command": command,
        "seed": seed,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_hash": _git_hash(),
        "hybrid_version": __version__,
        "package_versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "python": platform.python_version(),
        "device": device_name(),
        "num_threads": torch.get_num_threads(),
    }


def _git_hash() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def device_name() -> str:
    """The GPU, or the processor and how many threads it is used with."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.cpu.get_capabilities().get('cpu_name', platform.processor())}, {torch.get_num_threads()} threads"


def _is_cpu(device: str) -> bool:
    return device.endswith(" threads")  # as `device_name` has it


def harness_fields(name: str, figures: dict[str, Any], model_arguments: str, seed: int) -> dict[str, Any]:
    """The same figures under the field names of lm-evaluation-harness, so that its readers find them.

    Args:
        name: Name of the data set, as a task.
        figures: From `evaluate_head`.
        model_arguments: What identifies the head.
        seed: Seed of the run.
    """
    total = figures["accuracy_by_depth"][-1]
    return {
        "results": {name: {"alias": name, "acc,none": total["accuracy"], "acc_stderr,none": total["stderr"]}},
        "n-samples": {name: {"original": total["n"], "effective": total["n"]}},
        "higher_is_better": {name: {"acc": True}},
        "config": {"model": "hybrid", "model_args": model_arguments, "torch_seed": seed},
        "transformers_version": version("transformers"),
        "model_source": "hybrid",
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a result file, whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(path)


def plot_steps(results: dict[str, Any], path: Path) -> None:
    """PNG of accuracy against refinement steps, a line per depth."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    curves = results["accuracy_by_steps"]
    steps = [point["steps"] for point in curves]
    depths = [row["depth"] for row in curves[0]["by_depth"]]
    figure, colors = Figure(figsize=(6.4, 4.0), layout="constrained"), colormaps["viridis"]
    axis = figure.subplots()
    for number, depth in enumerate(depths):
        rows = [point["by_depth"][number] for point in curves]
        style: dict[str, Any] = (
            {"color": "black", "linestyle": "--"} if depth == "all" else {"color": colors(number / len(depths))}
        )
        axis.plot(steps, [row["accuracy"] for row in rows], marker="o", markersize=3, label=f"{depth}", **style)
        low, high = zip(*(row["interval"] for row in rows), strict=True)
        axis.fill_between(steps, low, high, alpha=0.12, color=style["color"], linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.set(xlabel="refinement steps", ylabel="accuracy (95% interval)", ylim=(0, 1.02))
    axis.legend(title="depth", fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
