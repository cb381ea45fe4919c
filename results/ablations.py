"""What each part of a head is worth: a small head (2.0M), one change at a time, three seeds.

    python results/ablations.py mini_sudoku                                        # 57 runs; 30 took 2.6 hours
    python results/ablations.py stepgame --data.path runs/stepgame_chains.jsonl    # rows: stepgame_chains_smollm2.yaml
    python results/ablations.py mini_sudoku --seeds 0,2                            # part of it
    python results/ablations.py mini_sudoku --table

Each run adds a line to `results/ablations/SET.jsonl` as it ends, and what is there is not run again: a stopped script
goes on, and two with different seeds share the work. What is asked are a run's last weights, which validation did not
choose.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import read_rows

from hybrid.baselines import deep, one_pass
from hybrid.batches import embed_examples
from hybrid.cli import run_config
from hybrid.config import RunConfig
from hybrid.data import load_examples
from hybrid.evaluation import evaluate_head, provenance, train_seconds
from hybrid.model import HybridModel
from hybrid.training import train

FOLDER, CONFIGS = Path(__file__).parent / "ablations", Path(__file__).parent.parent / "configs"
SMALL = ["--backbone.template", "plain", "--backbone.layers", "[0, 12]", "--reasoner.dim", "256",
         "--reasoner.num_heads", "4", "--reasoner.intermediate_size", "640", "--reasoner.halting", "never",
         "--training.learning_rate", "1e-3", "--training.ema_decay", "0.99"]  # fmt: skip
BASES = {  # configuration, and what is changed in it
    "mini_sudoku": ["mini_sudoku", *SMALL, "--data.places", "true", "--data.max_eval_examples", "500",
                    "--reasoner.refine_memory", "false", "--training.num_updates", "400"],
    "stepgame": ["stepgame_chains", "--training.num_updates", "8000", "--training.recursion_schedule",
                 '[{"start": 0, "max_steps": 1}, {"start": 1500, "max_steps": 2}, {"start": 3000}]'],
}  # fmt: skip
BASELINES = {"one_pass": one_pass, "deep": deep}
CYCLES = "1 step of 4 cycles, gradient through"
SHARED: dict[str, list[str]] = {
    "one pass, 2 layers": ["one_pass"],
    "one pass, 16 untied layers": ["deep"],
    "n = 3": ["--reasoner.num_latent_passes", "3"],
    "a network each for z and y": ["--reasoner.tie_levels", "false"],
    "halting learned": ["--reasoner.halting", "learned"],
    "no tape slots": ["--reasoner.num_tape_slots", "0"],
    "AdamW": ["--training.optimizer", "adamw"],
}  # fmt: skip
VARIANTS: dict[str, dict[str, list[str]]] = {
    "mini_sudoku": {
        "base: n = 1, T = 1, 4 steps": [],
        **SHARED,
        "1 step": ["--reasoner.max_steps", "1"],
        f"{CYCLES} all (no deep supervision)": [
            "--reasoner.max_steps", "1", "--reasoner.num_cycles", "4", "--reasoner.num_gradient_cycles", "4"
        ],
        f"{CYCLES} the last": ["--reasoner.max_steps", "1", "--reasoner.num_cycles", "4"],
        "2 cycles a step, gradient through the last": ["--reasoner.num_cycles", "2"],
        "2 cycles a step, gradient through both": [
            "--reasoner.num_cycles", "2", "--reasoner.num_gradient_cycles", "2"
        ],
        "no rotary positions": ["--reasoner.rotary", "false"],
        "base, 900 updates": ["--training.num_updates", "900"],
        "base, 1,700 updates": ["--training.num_updates", "1700"],
        "fields look for their cells": ["--data.places", "false"],
        "every token a slot": ["--reasoner.refine_memory", "true"],
        "no language model": ["--backbone.layers", "[0]"],
    },
    "stepgame": {
        "base: n = 1, T = 1, 1 step, 2, then 4": [],
        **SHARED,
        "4 steps from the start": ["--training.recursion_schedule", "[]"],
        "1 step": ["--training.recursion_schedule", "[]", "--reasoner.max_steps", "1"],
        f"{CYCLES} all (no deep supervision)": [
            "--training.recursion_schedule", "[]", "--reasoner.max_steps", "1", "--reasoner.num_cycles", "4",
            "--reasoner.num_gradient_cycles", "4"
        ],
        f"{CYCLES} the last": [
            "--training.recursion_schedule", "[]", "--reasoner.max_steps", "1", "--reasoner.num_cycles", "4"
        ],
        "rotary positions": ["--reasoner.rotary", "true"],
        "memory read only": ["--reasoner.refine_memory", "false"],
        "all depths from the start": ["--training.curriculum", "null"],
        "states as they are, not whitened": ["--adapter.whiten", "false"],
        "token embeddings alone": ["--backbone.layers", "[0]"],
    },
}  # fmt: skip
STEPS = 1, 2, 4, 8, 16
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95% quantiles of Student's t, by number of seeds


def main(arguments: Sequence[str]) -> None:
    """Run what is missing, seed by seed, so that an early stop leaves whole comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2", help="numbers, separated by commas")
    parser.add_argument("--only", default="", help="variants in whose names this regular expression is found")
    parser.add_argument("--table", action="store_true", help="print the table of what was run")
    parsed, flags = parser.parse_known_args(arguments)
    path = FOLDER / f"{parsed.set}.jsonl"
    if parsed.table:
        print(table(read(path), parsed.set))
        return
    path.parent.mkdir(exist_ok=True)
    for seed in map(int, parsed.seeds.split(",")):
        for name, changes in VARIANTS[parsed.set].items():
            wanted = {"variant": name, "seed": seed, "changes": changes, "flags": flags}
            is_there = any(wanted.items() <= run.items() for run in read(path))
            if is_there or not re.search(parsed.only, name):
                continue
            run = {
                **wanted, **trained(parsed.set, changes, seed, flags),
                **provenance(shlex.join(["python", "results/ablations.py", *arguments]), seed),
            }  # fmt: skip
            with path.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(name, seed, f"{run['train_seconds']:.0f} s", run["accuracy_by_steps"], flush=True)


def trained(task: str, changes: Sequence[str], seed: int, flags: Sequence[str]) -> dict[str, Any]:
    """Train one variant, and ask its last weights the validation questions, after several numbers of steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = run_of(task, seed, flags, changes)
        config.training.output_folder = folder
        if (best := train(config)) is None:
            sys.exit("stopped; the runs that had ended are kept")
        seconds, model = train_seconds(best), HybridModel.from_pretrained(best)
    rows = load_examples(config.data, "valid")
    questions = embed_examples(config.features, model.backbone, {"valid": rows}, progress=False)["valid"]
    figures = evaluate_head(model, questions, STEPS if config.reasoner.num_latent_passes else [1], progress=False)
    return {
        "train_seconds": seconds,
        "num_updates": config.training.num_updates,
        "num_parameters": figures["num_parameters"],
        "milliseconds_per_question": figures["milliseconds_per_question"],
        "field_accuracy": figures["field_accuracy"],
        "accuracy_by_steps": {
            row["steps"]: {str(depth["depth"]): round(depth["accuracy"], 4) for depth in row["by_depth"]}
            for row in figures["accuracy_by_steps"]
        },
    }


def run_of(task: str, seed: int, flags: Sequence[str], changes: Sequence[str]) -> RunConfig:
    """The run of one variant."""
    baseline = BASELINES.get(changes[0]) if changes else None
    own = ["--training.seed", str(seed), *flags, *([] if baseline else changes)]
    config_name, *base = BASES[task]
    config = run_config([str(CONFIGS / f"{config_name}_smollm2.yaml"), *base, *own], "train")[0]
    config.training.eval_every = config.training.save_every = config.training.num_updates
    return baseline(config) if baseline else config


def read(path: Path) -> list[dict[str, Any]]:
    """The runs so far."""
    return read_rows(path) if path.exists() else []


def table(runs: Sequence[dict[str, Any]], task: str) -> str:
    """Markdown table: mean validation accuracy over seeds with its 95% interval, by steps and at the deepest."""
    lines = [
        "| variant | seeds | 1 step | steps as trained | 16 steps | deepest, as trained | parameters | training, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, changes in VARIANTS[task].items():
        chosen = [run for run in runs if run["variant"] == name]
        if not chosen:
            continue
        by_steps = [run["accuracy_by_steps"] for run in chosen]
        *_, deepest, _ = by_steps[0]["1"]
        last = str(run_of(task, 0, [], changes).reasoner.max_steps)
        cells = [mean_cell([run[steps]["all"] for run in by_steps if steps in run]) for steps in ("1", last, "16")]
        cells.append(f"{deepest}: {mean_cell([run[last][deepest] for run in by_steps])}")
        seconds = statistics.mean(run["train_seconds"] for run in chosen)
        cells += [f"{chosen[0]['num_parameters']:,}", f"{seconds:,.0f}"]
        lines.append(f"| {name} | {len(chosen)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_cell(values: Sequence[float]) -> str:
    """Mean over seeds and its 95% interval; a dash for what was not asked."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    spread = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


if __name__ == "__main__":
    main(sys.argv[1:])
