"""Losses: pure functions of tensors."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED = -100  # label of a field that does not exist


def answer_loss(
    scores: Float[Tensor, "batch fields options"], labels: Int[Tensor, "batch fields"]
) -> Float[Tensor, " batch"]:
    """Cross-entropy of each row, in nats, averaged over the row's fields."""
    exists = labels != IGNORED
    safe = scores.masked_fill(~exists.unsqueeze(-1), 0.0)  # a padded field has only -inf scores
    losses = F.cross_entropy(safe.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none").view_as(labels)
    return (losses * exists).sum(1) / exists.sum(1).clamp(min=1)


def all_fields_right(
    scores: Float[Tensor, "batch fields options"], labels: Int[Tensor, "batch fields"]
) -> Bool[Tensor, " batch"]:
    """Rows whose every field is answered correctly."""
    return ((scores.argmax(-1) == labels) | (labels == IGNORED)).all(1)


def halting_loss(halt_logits: Float[Tensor, " batch"], right: Bool[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Binary cross-entropy of the q head against "all fields are right"."""
    return F.binary_cross_entropy_with_logits(halt_logits, right.to(halt_logits.dtype), reduction="none")


def refinement_loss(
    scores: Float[Tensor, "batch fields options"],
    halt_logits: Float[Tensor, " batch"],
    labels: Int[Tensor, "batch fields"],
    halt_loss_weight: float = 0.5,
    answer_loss_weight: float = 1.0,
    due_labels: Int[Tensor, "batch fields"] | None = None,
) -> dict[str, Tensor]:
    """The training loss of one refinement step and what it is made of.

    Args:
        scores: Logits of the options.
        halt_logits: The q head.
        labels: The right options in the end, by which the q head is trained.
        halt_loss_weight: Weight of the halting loss.
        answer_loss_weight: Weight of the cross-entropy of the fields.
        due_labels: What is asked of this step, if that is less than `labels`.

    Returns:
        `loss` (scalar with gradient), and detached means `answer_loss`, `halt_loss`, `accuracy`.
    """
    due_labels = labels if due_labels is None else due_labels
    halts = halting_loss(halt_logits, all_fields_right(scores.detach(), labels)).mean()
    answers, right = answer_loss(scores, due_labels).mean(), all_fields_right(scores.detach(), due_labels)
    return {
        "loss": answer_loss_weight * answers + halt_loss_weight * halts,
        "answer_loss": answers.detach(),
        "halt_loss": halts.detach(),
        "accuracy": right.float().mean(),
    }
