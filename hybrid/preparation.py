"""What a run starts from: its data, embedded, and a new head, or one with the weights of another."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from hybrid.backbone import Backbone, load_backbone
from hybrid.batches import (
    EmbeddedExamples,
    common_fields,
    common_options,
    common_places,
    embed_examples,
    known_options,
)
from hybrid.config import HybridConfig, RunConfig, stage_at
from hybrid.data import Example, load_examples
from hybrid.decoder import is_unnamed
from hybrid.generation import answer_text
from hybrid.hub import check_head_folder
from hybrid.model import HybridModel

# What a run may have otherwise than the head that it starts from; cycles only if its reasoner is trained.
CYCLES = {"num_cycles", "num_gradient_cycles"}
START_FREE = CYCLES | {
    "dtype", "quantization", "max_steps", "halting", "convergence_tolerance", "dropout", "state_noise",
}  # fmt: skip
NUM_STATISTICS_TOKENS = 16_384  # training tokens from which the adapter takes means and deviations


def prepare(
    config: RunConfig, accelerator: Accelerator, backbone: Backbone | None = None, resume: bool = False
) -> tuple[HybridModel, EmbeddedExamples, EmbeddedExamples]:
    """Data, backbone, feature cache and a new head; cheap checks come first.

    With `resume`, the weights of `training.start_from` are left to the checkpoint.
    """
    examples = {role: load_examples(config.data, role) for role in ("train", "valid")}
    if config.text.enabled:
        for example in (*examples["train"], *examples["valid"]):
            answer_text(config.text, example)
    check_due(config, examples["train"])
    accelerator.print(described(examples))
    if backbone is None:
        backbone = load_backbone(config.backbone, accelerator.device)
    else:
        own = config.backbone
        backbone = backbone.with_settings(own.layers or backbone.layers, own.template, own.memory)
    common = common_fields(examples["train"])
    is_single = common is not None and list(common) == ["answer"]
    options = common_options(examples["train"])
    torch.manual_seed(config.training.seed)
    model = HybridModel.from_backbone(
        backbone,
        backbone_config=config.backbone,
        adapter=config.adapter,
        reasoner=config.reasoner,
        text=config.text,
        known_options=known_options(examples["train"]),
        choices=options if any(is_unnamed(example.fields) for example in examples["train"]) else None,
        options=options,
        fields=None if is_single else common,
        places=common_places(examples["train"]),
        find_names=config.data.find_names,
        license=config.data.license,
    )
    for name, part in model.named_children():
        part.requires_grad_(config.training.parts is None or name in config.training.parts)
    if config.training.start_from is not None and not resume:
        load_weights(model, Path(config.training.start_from), config.training.parts)
    with accelerator.main_process_first(), accelerator.local_main_process_first():  # others find the cache filled
        progress = accelerator.is_main_process
        embedded = embed_examples(config.features, model.backbone, examples, progress)
    if config.training.start_from is None:
        model.adapter.fit_statistics(_sample_states(model, embedded["train"], config.training.seed))
    return model, embedded["train"], embedded["valid"]


def described(examples: Mapping[str, Sequence[Example]]) -> str:
    """What a run has before it, in a line: questions, those with a context, depths, options."""
    train, valid = examples["train"], examples["valid"]
    depths = sorted({example.depth for example in train if example.depth is not None})
    options = {option for fields in {e.fields for e in train} for field in fields for option in field.options}
    shown = reprlib.repr(sorted(options)) if len(options) <= 6 else f"{len(options):,} different"
    parts = [
        f"training on {len(train):,} questions, {sum(e.context is not None for e in train):,} of them with a context",
        f"{len(valid):,} for validation",
        f"depths {depths[0]} to {depths[-1]}" if depths else "no depths",
        f"options: {shown}",
    ]
    return "; ".join(parts)


def check_due(config: RunConfig, examples: Sequence[Example]) -> None:
    """Refuse answers that no step of the training would be asked for.

    Raises:
        ValueError: One is due later than the last step.
    """
    latest = max((max(example.due) for example in examples if example.due), default=1)
    max_steps = stage_at(config, math.inf).max_steps
    if latest > max_steps:
        raise ValueError(
            f"an answer is due from step {latest} on, and training ends with {max_steps} steps at most: raise "
            "reasoner.max_steps (or that of the last training.recursion_schedule), or leave out the column `due`"
        )


def load_weights(model: HybridModel, folder: Path, parts: Sequence[str] | None) -> None:
    """Start a head, of which some parts are trained, from another's weights; parts that it lacks stay as they are.

    Raises:
        ValueError: The folder is no head, or one of another kind.
    """
    check_head_folder(folder)
    other, own = HybridConfig.from_pretrained(folder).to_dict(), model.config.to_dict()
    free = START_FREE if parts is None or "reasoner" in parts else START_FREE - CYCLES
    for section in ("backbone", "adapter", "reasoner"):
        for key in sorted(own[section].keys() - free):
            if other[section][key] != own[section][key]:
                raise ValueError(
                    f"training.start_from={str(folder)!r} has {section}.{key}={other[section][key]!r}, and this run "
                    f"{own[section][key]!r}: use the same"
                )
    if other["text"]["enabled"] and model.text_decoder is None:
        raise ValueError(
            f"text.enabled=false, but training.start_from={str(folder)!r} has a text decoder: set text.enabled=true"
        )
    if (other["places"] is None) != (own["places"] is None):
        raise ValueError(
            f"training.start_from={str(folder)!r}: its fields stood in the text (at) in training, or those of this "
            "run do, but not both: set data.places (or data.answer_at) as it was there"
        )
    if other["known_options"] != own["known_options"]:
        raise ValueError(f"training.start_from={str(folder)!r} was trained on other options than these data have")
    model.load_state_dict(model.state_dict() | load_file(folder / "model.safetensors"))


def _sample_states(model: HybridModel, train: EmbeddedExamples, seed: int) -> Tensor:
    """Hidden states of random training rows (tokens, layers, backbone_dim), about `NUM_STATISTICS_TOKENS` of them."""
    states, num_tokens = [], 0
    for row in np.random.default_rng(seed).permutation(len(train)).tolist():
        hidden_states, mask, _, _ = train.batch(model, [row])
        states.append(hidden_states[mask])
        num_tokens += len(states[-1])
        if num_tokens >= NUM_STATISTICS_TOKENS:
            break
    return torch.cat(states)
