"""What each part of a head is worth: a small head on StepGame, one change at a time, three seeds.

    python results/ablations.py --data.path ../shared/data/stepgame_clean.jsonl      # goes on where it was stopped
    python results/ablations.py --table

Runs go to `results/ablations/results.json` as they finish. Each takes about 8 minutes on one core, after the texts are
embedded once (20 minutes on two).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid.cli import run_config
from hybrid.evaluation import provenance, write_results

PATH = Path(__file__).parent / "ablations" / "results.json"
BASE = ["configs/stepgame_smollm2.yaml", "--training.num_updates", "1200", "--training.learning_rate", "7e-4",
        "--training.decay", "constant", "--training.recursion_schedule", "[]", "--training.curriculum", "0.85",
        "--training.ema_decay", "0.99", "--training.eval_every", "1200", "--training.save_every", "1200",
        "--reasoner.dim", "256", "--reasoner.num_heads", "4", "--reasoner.intermediate_size", "640",
        "--reasoner.num_latent_passes", "1", "--reasoner.num_cycles", "1", "--reasoner.max_steps", "2"]  # fmt: skip
VARIANTS: dict[str, list[str]] = {
    "base: n = 1, T = 1, 2 steps": [],
    "one pass, 1 step": ["--reasoner.num_latent_passes", "0", "--reasoner.max_steps", "1"],
    "four untied layers, 1 step": [
        "--reasoner.num_latent_passes", "0", "--reasoner.num_layers", "4", "--reasoner.max_steps", "1"
    ],
    "1 step (no deep supervision)": ["--reasoner.max_steps", "1"],
    "4 steps": ["--reasoner.max_steps", "4"],
    "n = 3": ["--reasoner.num_latent_passes", "3"],
    "T = 2, gradient through the last cycle": ["--reasoner.num_cycles", "2"],
    "T = 2, full gradient": ["--reasoner.num_cycles", "2", "--reasoner.num_gradient_cycles", "2"],
    "a network each for z and y": ["--reasoner.tie_levels", "false"],
    "memory read only": ["--reasoner.refine_memory", "false", "--reasoner.num_tape_slots", "8"],
    "no rotary positions": ["--reasoner.rotary", "false"],
    "no tape slots": ["--reasoner.num_tape_slots", "0"],
    "16 tape slots": ["--reasoner.num_tape_slots", "16"],
    "AdamW": ["--training.optimizer", "adamw"],
    "all depths from the start": ["--training.curriculum", "null"],
    "no language model (layer 0, plain)": ["--backbone.layers", "[0]", "--backbone.template", "plain"],
}  # fmt: skip
SEEDS = (0, 1, 2)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95% quantiles of Student's t, by number of seeds


def main(arguments: Sequence[str]) -> None:
    """Run what is missing, seed by seed, so that an early stop leaves whole comparisons."""
    results: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {"runs": []}
    if list(arguments) == ["--table"]:
        print(table(results["runs"]))
        return
    from hybrid.training import train

    PATH.parent.mkdir(exist_ok=True)
    for seed in SEEDS:
        for name, changes in VARIANTS.items():
            if any((run["variant"], run["seed"]) == (name, seed) for run in results["runs"]):
                continue
            with tempfile.TemporaryDirectory() as folder:
                flags = [*BASE, *changes, "--training.seed", str(seed), "--training.output_folder", folder, *arguments]
                train(run_config(flags, "train")[0])
                lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
            valid = next(line["valid_by_depth"] for line in reversed(lines) if "valid_by_depth" in line)
            trained = [line for line in lines if "seconds" in line]
            run = {
                "variant": name, "seed": seed, "changes": changes, "valid_by_depth": valid,
                "deepest": trained[-1]["deepest"], "train_seconds": trained[-1]["seconds"],
                **provenance(f"python results/ablations.py {' '.join(arguments)}", seed),
            }  # fmt: skip
            results["runs"].append(run)
            write_results(PATH, results)
            print(name, seed, valid, flush=True)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown table: mean validation accuracy over seeds with its 95% interval, by groups of depths."""
    groups = {"2": ["2"], "3": ["3"], "4–5": ["4", "5"], "6–10": ["6", "7", "8", "9", "10"], "all": ["all"]}
    lines = ["| variant | seeds | " + " | ".join(f"hops {name}" for name in groups) + " | seconds |"]
    lines += ["|---|---|" + "---|" * (len(groups) + 1)]
    for name in VARIANTS:
        chosen = [run for run in runs if run["variant"] == name]
        if not chosen:
            continue
        cells = []
        for depths in groups.values():
            values = [statistics.mean(run["valid_by_depth"][depth] for depth in depths) for run in chosen]
            spread = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            cells.append(f"{statistics.mean(values):.3f}" + (f" ± {spread:.3f}" if spread is not None else ""))
        seconds = statistics.mean(run["train_seconds"] for run in chosen)
        lines.append(f"| {name} | {len(chosen)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
