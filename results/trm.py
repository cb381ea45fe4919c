"""The TRM reference code on the grids of a Sudoku configuration, for as long as a head was trained.

    python results/trm.py configs/easy_sudoku_smollm2.yaml --trm-path FOLDER --seconds 3600 --output results/trm.json

Model, loss and halting are those of a checkout of SamsungSAILMontreal/TinyRecursiveModels, with the sizes of its
Sudoku recipe: 512 wide, two layers that mix cells by an MLP, n = 6, T = 3, at most 16 steps, decay 1, EMA .999. What
differs: AdamW instead of AdamATan2 (which needs CUDA), no puzzle embedding (there is one task), a warm-up of 20
updates instead of 2,000, an average that is short at first, as in `training.py`; batch, learning rate and recursion as
given. It reads digits, not text. Any key of the configuration is a flag (`--data.max_train_examples 5000`).
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from hybrid.backbone import native_dtype
from hybrid.cli import run_config
from hybrid.data import Example, load_examples
from hybrid.evaluation import by_depth, provenance, write_results
from hybrid.weights import ema_decay

SAVE_EVERY = 50
LOG_EVERY = 20
WARMUP = 20
EMA_DECAY = 0.999


def main(arguments: Sequence[str]) -> None:
    """Train until the time is over, then answer the test puzzles; goes on where it was stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--trm-path", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--split", default="test", choices=["valid", "test"])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--latent_passes", type=int, default=6)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/trm"), help="checkpoint and log")
    parser.add_argument("--output", type=Path, required=True)
    parsed, flags = parser.parse_known_args(arguments)
    sys.path.insert(0, parsed.trm_path)
    config, _ = run_config([parsed.config, *flags], "train")
    examples = load_examples(config.data, parsed.split)
    torch.manual_seed(config.training.seed)
    model, sizes = reference_model(parsed, num_digits=len(examples[0].fields[0].options))
    average = AveragedModel(model, avg_fn=moving_average)
    seconds, update = train(model, average, load_examples(config.data, "train"), parsed)
    start = time.monotonic()
    right, cells = answer(average.module, examples, parsed.batch_size)
    results = {
        "name": f"TRM reference (n = {parsed.latent_passes}, T = {parsed.cycles})",
        "split": parsed.split,
        "train_seconds": seconds,
        "num_updates": update,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "milliseconds_per_question_in_batches": 1000 * (time.monotonic() - start) / len(examples),
        "num_fields": len(examples[0].fields),
        "field_accuracy": cells,
        "accuracy_by_depth": by_depth(right, examples),
        "sizes": sizes,
        **provenance(shlex.join(["python", "results/trm.py", *arguments]), config.training.seed),
    }
    write_results(parsed.output, results)
    print(json.dumps(results["accuracy_by_depth"][-1]), f"cells {cells:.3f}")


def reference_model(parsed: argparse.Namespace, num_digits: int) -> tuple[Any, dict[str, Any]]:
    """The reference model in its loss head, and its sizes."""
    from models.losses import ACTLossHead  # ty: ignore[unresolved-import]
    from models.recursive_reasoning.trm import TinyRecursiveReasoningModel_ACTV1  # ty: ignore[unresolved-import]

    sizes: dict[str, Any] = dict(
        batch_size=parsed.batch_size, seq_len=num_digits**2, num_puzzle_identifiers=1, vocab_size=num_digits + 2,
        puzzle_emb_ndim=0, puzzle_emb_len=0, H_cycles=parsed.cycles, L_cycles=parsed.latent_passes, H_layers=0,
        L_layers=2, hidden_size=512, num_heads=8, expansion=4, pos_encodings="none", mlp_t=True, halt_max_steps=16,
        halt_exploration_prob=0.1, forward_dtype=str(native_dtype(torch.device("cpu"))).removeprefix("torch."),
    )  # fmt: skip
    return ACTLossHead(TinyRecursiveReasoningModel_ACTV1(sizes), loss_type="stablemax_cross_entropy"), sizes


def moving_average(average: Tensor, current: Tensor, num_updates: Tensor | int) -> Tensor:
    """The mean of the weights after one more update."""
    return average.lerp(current, 1 - ema_decay(EMA_DECAY, int(num_updates)))


def train(model: Any, average: Any, examples: Sequence[Example], parsed: argparse.Namespace) -> tuple[float, int]:
    """One refinement step for every row of the batch per update, until the time is over; returns time and updates."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=1.0)
    parsed.folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = parsed.folder / "checkpoint.pt", parsed.folder / "log.jsonl"
    update, spent, carry, sums = 0, 0.0, None, dict.fromkeys(("count", "exact_accuracy", "accuracy", "lm_loss"), 0.0)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        update, spent, carry = state["update"], state["seconds"], state["carry"]
        lines = [line for line in log.read_text().splitlines() if json.loads(line)["update"] <= update]
        log.write_text("".join(f"{line}\n" for line in lines))
    start, rows = time.monotonic() - spent, batches(examples, parsed.batch_size, skip=update)
    model.train()
    while time.monotonic() - start < parsed.seconds:
        batch, update = next(rows), update + 1
        carry = model.initial_carry(batch) if carry is None else carry
        carry, loss, metrics, *_ = model(return_keys=[], carry=carry, batch=batch)
        (loss / parsed.batch_size).backward()
        for group in optimizer.param_groups:
            group["lr"] = parsed.learning_rate * min(1.0, update / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        sums = {key: total + float(metrics[key]) for key, total in sums.items()}
        spent = time.monotonic() - start
        if update % LOG_EVERY == 0:
            count = max(sums["count"], 1.0)
            line = {"update": update, "loss": sums["lm_loss"] / LOG_EVERY / parsed.batch_size, "seconds": spent}
            line |= {"rows_finished": sums["count"], "accuracy": sums["exact_accuracy"] / count}
            line |= {"cells": sums["accuracy"] / count}
            sums = dict.fromkeys(sums, 0.0)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if update % SAVE_EVERY == 0 or spent >= parsed.seconds:
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"update": update, "seconds": spent, "carry": carry}, checkpoint)
    return spent, update


def batches(examples: Sequence[Example], size: int, skip: int) -> Iterator[dict[str, torch.Tensor]]:
    """Shuffled batches without end, the same for every sitting: 0 is padding, 1 an empty cell, d + 1 the digit d."""
    data = encoded(examples)
    generator, order = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(examples), generator=generator)])
        rows, order = order[:size], order[size:]
        if skip > 0:
            skip -= 1
            continue
        yield {name: values[rows] for name, values in data.items()}


def encoded(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Puzzles and solutions as the reference code has them, (examples, cells), and the one task, (examples,)."""
    puzzles = [
        [1 if cell in "_0" else int(cell) + 1 for cell in re.findall(r"[_\d]", str(e.context))] for e in examples
    ]
    solutions = [[int(digit) + 1 for digit in example.answers] for example in examples]
    tasks = torch.zeros(len(examples), dtype=torch.long)
    return {"inputs": torch.tensor(puzzles), "labels": torch.tensor(solutions), "puzzle_identifiers": tasks}


@torch.inference_mode()
def answer(model: Any, examples: Sequence[Example], size: int) -> tuple[torch.Tensor, float]:
    """Whether each whole grid is right after the last step, and the share of right cells."""
    model.eval()
    data, found = encoded(examples), []
    for rows in torch.arange(len(examples)).split(size):
        batch = {name: values[rows] for name, values in data.items()}
        carry, finished = model.initial_carry(batch), False
        while not finished:
            carry, _, _, outputs, finished = model(return_keys=["preds"], carry=carry, batch=batch)
        found.append(outputs["preds"] == batch["labels"])
    right = torch.cat(found)
    return right.all(1), float(right.double().mean())


if __name__ == "__main__":
    main(sys.argv[1:])
