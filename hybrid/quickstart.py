"""`hybrid quickstart`: the whole chain on a real model and real questions, in a few minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hybrid.backbone import load_backbone
from hybrid.baselines import zero_shot
from hybrid.batches import embed_examples
from hybrid.config import BackboneConfig, DataConfig, ReasonerConfig, RecursionStage, RunConfig, TrainingConfig
from hybrid.data import Example, load_examples
from hybrid.evaluation import (
    accuracy_lines,
    evaluate_head,
    harness_fields,
    plot_steps,
    provenance,
    training_cost,
    write_results,
)
from hybrid.inference import Answer
from hybrid.model import HybridModel
from hybrid.training import CHECKPOINT, train

SAMPLE = Path(__file__).parent / "samples" / "stepgame_small.parquet"
DIRECTIONS = "above below left right upper-left upper-right lower-left lower-right overlap".split()


def quickstart_config(output_folder: str) -> RunConfig:
    """A head of dim 256 on 5,000 StepGame questions with one and two hops (sample shipped under the MIT licence)."""
    return RunConfig(
        backbone=BackboneConfig(),
        reasoner=ReasonerConfig(
            dim=256, num_heads=4, intermediate_size=640, num_tape_slots=8,
            num_latent_passes=2, num_cycles=1, max_steps=4,
        ),
        data=DataConfig(path=str(SAMPLE), choices=list(DIRECTIONS)),
        training=TrainingConfig(
            output_folder=output_folder, num_updates=800, ema_decay=0.99, eval_every=200, save_every=200, log_every=20,
            recursion_schedule=[
                RecursionStage(num_latent_passes=1, max_steps=1),  # first learn to read, at a quarter of the cost
                RecursionStage(start=400, num_latent_passes=2, max_steps=4),
            ],
        ),
    )  # fmt: skip


def quickstart(output_folder: str) -> bool:
    """Embed, train, evaluate beside the frozen model's own answers, and ask one question; `False` if interrupted.

    Args:
        output_folder: Where the head, its log and its results go; an interrupted quickstart goes on from there.
    """
    start = time.perf_counter()
    config = quickstart_config(output_folder)
    _say(start, "load SmolLM2-135M (the first time, its GGUF is converted: 20 s)")
    backbone = load_backbone(config.backbone)
    resume = (Path(output_folder) / CHECKPOINT).exists()
    _say(start, "embed 5,600 questions once, then train a small recursive reasoner on the cached hidden states")
    best = train(config, resume=resume, backbone=backbone)
    if best is None:
        return False  # `hybrid quickstart` goes on from the checkpoint
    _say(start, "evaluate on questions it has not seen, some with more hops than in training")
    model = HybridModel.from_pretrained(best, backbone)
    test = load_examples(config.data, "test")
    embedded = embed_examples(config.features, model.backbone, {"test": test})["test"]
    figures = evaluate_head(model, embedded, [1, 2, 3, 4, 6, 8])
    frozen = zero_shot(model.backbone, test)
    results = {
        "split": "test",
        "data": "StepGame sample (hybrid/samples/stepgame_small.parquet)",
        "total_seconds": round(time.perf_counter() - start),
        **training_cost(best),
        **figures,
        "baselines": [frozen],
        **harness_fields(SAMPLE.stem, figures, str(best), config.training.seed),
        **provenance("hybrid quickstart", config.training.seed),
    }
    write_results(best / "results.json", results)
    plot_steps(results, best / "results.png")
    model.write_card(best)
    print(accuracy_lines(results))
    _show_refinement(model, test)
    _say(start, f"done. The head is in {best}; ask it more:")
    question = "P is above Q. Q is to the left of R. What is the relation of the agent P to the agent R?"
    print(f'  hybrid ask {best} "{question}"')
    return True


def _show_refinement(model: HybridModel, examples: Sequence[Example]) -> None:
    """Print how an answer came about, for a question whose answer changed on the way if there is one."""
    two_hops = [example for example in examples if example.depth == 2]
    answers = [
        model.answer(example.question, context=example.context, max_steps=4, halting="never") for example in two_hops
    ]
    example, answer = max(zip(two_hops, answers, strict=True), key=lambda pair: _interest(*pair))
    print(f"\n{example.context}\n{example.question}   (right answer: {example.answered[0][1]})")
    for step, options in enumerate((fields["answer"] for fields in answer.trace), start=1):
        best = sorted(options.items(), key=lambda option: -option[1])[:3]
        print(f"  step {step}:  " + "   ".join(f"{text} {p:.2f}" for text, p in best))
    print(f"  answer: {answer.value}, probability {answer.probability:.2f}\n")


def _interest(example: Example, answer: Answer) -> tuple[bool, float]:
    """Right in the end first; among those, the one whose probability rose most."""
    ((field, right),) = example.answered
    return answer.value == right, answer.trace[-1][field.name][right] - answer.trace[0][field.name][right]


def _say(start: float, text: str) -> None:
    print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True)
