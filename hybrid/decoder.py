"""Refined latents to answers: fields and their options, and soft tokens for text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hybrid.layers import rms_norm

MIN_WEIGHT = 1e-4  # of a soft token in training: one that is not seen at all would get no gradient


@dataclass(frozen=True)
class Field:
    """One thing to answer: a name and a finite list of options.

    Args:
        name: What is asked, in words (`relation`, a person's name, `r1c1`).
        options: At least two different texts; a string is a sequence of one-character options (`"123456789"`).
        at: The character at which it stands, if it does, counted from 0 over context, one space and question, or from
            -1 backwards from their end. A head trained so starts from what the language model makes of the token
            there: a cell of a grid from its digit, an answer from the end of its question.

    Raises:
        ValueError: Fewer than two options, an empty one, one that appears twice, or an `at` that is no whole number.
    """

    name: str
    options: Sequence[str]
    at: int | None = None

    def __post_init__(self):
        if isinstance(self.options, str) and len(set(self.options)) < len(self.options):
            raise ValueError(f"field {self.name!r} has options {self.options!r}: give a list of texts")
        options = tuple(self.options)
        object.__setattr__(self, "options", options)
        if not self.name:
            raise ValueError("a field needs a name")
        if self.at is not None and (not isinstance(self.at, int) or isinstance(self.at, bool)):
            raise ValueError(
                f"field {self.name!r} has at={self.at!r}: expected a character's number, from 0, or -1 for the last"
            )
        if len(options) < 2:
            raise ValueError(f"field {self.name!r} has options {list(options)}: at least two are needed")
        if any(not isinstance(option, str) or not option.strip() for option in options):
            raise ValueError(f"field {self.name!r} has options {list(options)}: each must be a text that is not empty")
        if len(set(options)) < len(options):
            twice = sorted({option for option in options if options.count(option) > 1})
            raise ValueError(f"field {self.name!r} has options that appear twice: {twice}")


def is_unnamed(fields: Sequence[Field]) -> bool:
    """Whether a question asks for the one answer that nobody named."""
    return len(fields) == 1 and fields[0].name == "answer"


def named(name: str, text: str) -> int | None:
    """The character at which a text first has a name, as a word; `None` if it has not."""
    found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)
    return found.start() if found else None


def read_fields(given: Sequence[Mapping[str, Any]]) -> list[Field]:
    """Fields from what JSON says of them: each `{name, options}`, with `at` if it stands in the text.

    Raises:
        ValueError: One of them is anything else.
    """
    for field in given:
        if not isinstance(field, Mapping) or not {"name", "options"} <= field.keys() <= {"name", "options", "at"}:
            raise ValueError(
                f'field {field!r}: expected {{"name": ..., "options": [...]}}, and "at" if it has a place'
            )
    return [Field(**field) for field in given]


@dataclass
class FieldBatch:
    """The fields of a batch as tensors. Texts (field names and options) are numbered within the batch.

    Attributes:
        text_vectors: Static backbone vector of each text.
        known_index: Row of each text in the learned residual table, -1 if it has none.
        name_index: Text number of each field's name, -1 for padding.
        option_index: Text number of each option, -1 for padding.
        starts: Number of the memory vector that each field starts from, -1 for none; `None` if none does.
    """

    text_vectors: Float[Tensor, "texts backbone_dim"]
    known_index: Int[Tensor, " texts"]
    name_index: Int[Tensor, "batch fields"]
    option_index: Int[Tensor, "batch fields options"]
    starts: Int[Tensor, "batch fields"] | None = None

    @property
    def field_mask(self) -> Bool[Tensor, "batch fields"]:
        """Which fields exist."""
        return self.name_index >= 0

    def select(self, rows: Tensor) -> FieldBatch:
        """The fields of some rows."""
        starts = self.starts[rows] if self.starts is not None else None
        return FieldBatch(self.text_vectors, self.known_index, self.name_index[rows], self.option_index[rows], starts)

    def to(self, device: torch.device, dtype: torch.dtype) -> FieldBatch:
        """The batch on a device; vectors in `dtype`."""
        return FieldBatch(
            self.text_vectors.to(device, dtype),
            self.known_index.to(device),
            self.name_index.to(device),
            self.option_index.to(device),
            self.starts.to(device) if self.starts is not None else None,
        )


class FieldDecoder(nn.Module):
    """Scores each field slot of the answer latent against the options of its field.

    An option's vector is the projected backbone embedding of its text, so options never seen in training can be
    scored; options known at training time add a learned residual. Because a score depends on the option's text alone,
    permuting the options permutes the scores.

    Args:
        dim: Width of the slots.
        backbone_dim: Width of the text vectors.
        num_tape_slots: Free slots beside the fields.
        num_known: Rows of the residual table.
    """

    def __init__(self, *, dim: int, backbone_dim: int, num_tape_slots: int, num_known: int):
        super().__init__()
        self.text_projection = nn.Linear(backbone_dim, dim, bias=False)
        self.field_vector = nn.Parameter(torch.randn(dim))
        self.tape_vectors = nn.Parameter(torch.randn(num_tape_slots, dim))
        # Drawn apart from the first update on; none at all for open sets of options.
        self.known_residual = nn.Parameter(torch.randn(num_known, dim)) if num_known else None
        self.score_scale = nn.Parameter(torch.ones(()))
        self.halt_head = nn.Linear(dim, 1)

    def text_latents(self, fields: FieldBatch) -> Float[Tensor, "texts dim"]:
        """Vector of each text of the batch, in the reasoner's space."""
        latents = rms_norm(self.text_projection(rms_norm(fields.text_vectors)))
        if self.known_residual is None:
            return latents
        residual = self.known_residual[fields.known_index.clamp(min=0)]
        return latents + residual * (fields.known_index >= 0).unsqueeze(-1)

    def slots(self, fields: FieldBatch) -> tuple[Float[Tensor, "batch slots dim"], Bool[Tensor, "batch slots"]]:
        """What each slot stands for (field slots, then tape slots), and which slots exist."""
        names = self.text_latents(fields)[fields.name_index.clamp(min=0)] + self.field_vector
        tape = self.tape_vectors.expand(len(names), -1, -1)
        mask = torch.cat([fields.field_mask, fields.field_mask.new_ones(tape.shape[:2])], dim=1)
        return torch.cat([names, tape], dim=1), mask

    def forward(
        self, y: Float[Tensor, "batch slots dim"], fields: FieldBatch
    ) -> tuple[Float[Tensor, "batch fields options"], Float[Tensor, " batch"]]:
        """Scores of the options (float32 logits, -inf for padding) and halting logits (q)."""
        answers = y[:, : fields.name_index.shape[1]]
        all_scores = answers @ self.text_latents(fields).T  # (batch, fields, texts)
        scores = all_scores.float().gather(2, fields.option_index.clamp(min=0)) * self.score_scale.float()
        scores = scores * answers.shape[-1] ** -0.5
        mask = fields.field_mask.unsqueeze(-1)
        pooled = (answers * mask).sum(1) / mask.sum(1).clamp(min=1)
        return scores.masked_fill(fields.option_index < 0, float("-inf")), self.halt_head(pooled).squeeze(-1).float()


class TextDecoder(nn.Module):
    """Refined slots to soft tokens, each with a weight by which the attention paid to it is multiplied.

    All weights start at zero: an untrained decoder leaves what the language model writes as it is. A weight depends
    on its slot, so that the decoder can keep out of texts that it has nothing to say about.

    Args:
        dim: Width of the slots.
        backbone_dim: Width of the language model's token embeddings.
    """

    embedding_scale: Tensor

    def __init__(self, *, dim: int, backbone_dim: int):
        super().__init__()
        self.projection = nn.Linear(dim, backbone_dim, bias=False)
        self.gate = nn.Linear(dim, 1)
        self.register_buffer("embedding_scale", torch.ones(()))  # root mean square of the embeddings

    def forward(
        self, slots: Float[Tensor, "batch slots dim"], slot_mask: Bool[Tensor, "batch slots"]
    ) -> tuple[Float[Tensor, "batch slots backbone_dim"], Float[Tensor, "batch slots"]]:
        """Soft tokens and the logarithms of their weights (float32, -inf where one is not seen)."""
        soft = rms_norm(self.projection(slots)) * self.embedding_scale
        gate = self.gate(slots).squeeze(-1).float()
        weight = gate.clamp(min=0)
        if self.training:  # the gradient passes as if there were no lower end, so that a closed gate can open
            weight = gate + (weight + MIN_WEIGHT - gate).detach()
        return soft, weight.log().masked_fill(~slot_mask, float("-inf"))
