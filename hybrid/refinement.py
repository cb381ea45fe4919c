"""Refinement without a gradient: early exit, what every step gives, rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.decoder import FieldBatch
from hybrid.model import Encoded, HybridModel
from hybrid.reasoner import has_halted, state_movement

ROLLOUT_NOISE = 1.0  # standard deviation on z, whose own components have unit variance
MOST_ROLLOUTS = 100_000  # seeds of the noise lie so far apart
PICKS = ("q", "vote")
FINAL = ("scores", "halt_logits", "steps", "answer_latent")
BY_STEP = ("scores_by_step", "halt_logits_by_step", "wants_halt_by_step", "movement_by_step")
TOKEN_BUDGET = 8192  # tokens of one inference batch, padding included


@dataclass
class Refined:
    """A batch after refinement, on the CPU.

    Attributes:
        scores: Logits of the options at each row's last step, (batch, fields, options).
        halt_logits: The q head at that step, (batch,).
        steps: Refinement steps that each row used, (batch,).
        answer_latent: Answer latent of the field and tape slots at that step, (batch, slots, dim).
        scores_by_step: (steps, batch, fields, options), a halted row keeps its last scores; `None` unless asked for.
        halt_logits_by_step: (steps, batch), likewise.
        wants_halt_by_step: (steps, batch), whether the row would halt there by the head's own halting.
        movement_by_step: (steps, batch), how far the step moved the answer latent, relative to its length.
    """

    scores: Tensor
    halt_logits: Tensor
    steps: Tensor
    answer_latent: Tensor
    scores_by_step: Tensor | None = None
    halt_logits_by_step: Tensor | None = None
    wants_halt_by_step: Tensor | None = None
    movement_by_step: Tensor | None = None


@torch.inference_mode()
def refine(
    model: HybridModel,
    hidden_states: Tensor,
    memory_mask: Tensor,
    fields: FieldBatch,
    *,
    max_steps: int | None = None,
    halting: str | None = None,
    noise_seed: int | None = None,
    by_step: bool = False,
    encoded: Encoded | None = None,
) -> Refined:
    """Refine a batch; rows that halt leave it at once, so their compute is saved.

    Args:
        model: The head, in eval mode.
        hidden_states: (batch, tokens, layers, backbone_dim).
        memory_mask: (batch, tokens).
        fields: What is asked.
        max_steps: Refinement steps at most; more than in training are allowed.
        halting: `learned`, `convergence` or `never`.
        noise_seed: Seed of noise on the initial scratch latent; `None` is without noise.
        by_step: Keep scores of every step.
        encoded: What `model.encode` makes of the batch, where several copies share it.
    """
    reasoner = model.config.reasoner
    max_steps = reasoner.max_steps if max_steps is None else max_steps
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: expected a number > 0")
    halting = halting or reasoner.halting
    encoded = encoded or model.encode(hidden_states, memory_mask, fields)
    num_slots = model.num_answer_slots(fields)
    noise: Any = 0.0
    if noise_seed is not None:
        num_fields = fields.name_index.shape[1]
        kinds = num_fields, num_slots - num_fields, encoded.slots.shape[1] - num_slots
        noise = slot_noise(kinds, encoded.slots.shape[2], noise_seed)
    state = model.reasoner.initial_state(encoded.slots, noise)
    result = _empty_result(fields, max_steps, by_step, encoded.slots[:, :num_slots])
    active = torch.arange(len(hidden_states))
    for step in range(1, max_steps + 1):
        previous_y = state.y
        state, y = model.reasoner.refinement_step(encoded.slots, encoded.memory, state)
        scores, halt_logits = model.decoder(y, fields)
        result.answer_latent[active] = y[:, :num_slots].cpu()
        signs = halt_logits, y, previous_y, encoded.slot_mask, reasoner.convergence_tolerance
        wants, movement = has_halted(reasoner.halting, *signs), state_movement(y, previous_y, encoded.slot_mask)
        _record(result, step, active, scores.cpu(), halt_logits.cpu(), wants.cpu(), movement.cpu())
        halted = has_halted(halting, *signs)
        if step == max_steps or not halted.any():
            continue
        rows = (~halted).nonzero().squeeze(1)
        active, state, encoded, fields = (
            active[rows.cpu()],
            state.select(rows),
            encoded.select(rows),
            fields.select(rows),
        )
        if len(active) == 0:
            break
    last = int(result.steps.max())
    for name in BY_STEP if by_step else ():
        setattr(result, name, getattr(result, name)[:last])
    return result


def slot_noise(sizes: Sequence[int], dim: int, seed: int) -> Tensor:
    """Noise on z for slots of several kinds: fields, tape, memory.

    What a slot gets depends on its kind and its number alone, so that no answer depends on how many fields and tokens
    the other rows of its batch have.

    Args:
        sizes: Slots of each kind.
        dim: Width of a slot.
        seed: Seed of the noise.

    Returns:
        Tensor of shape (slots, dim).
    """
    noise = []
    for kind, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(len(sizes) * seed + kind)
        # One by one: fewer are the first of more.
        noise += [torch.randn(dim, generator=generator) for _ in range(size)]
    return ROLLOUT_NOISE * torch.stack(noise)


def _empty_result(fields: FieldBatch, max_steps: int, by_step: bool, slots: Tensor) -> Refined:
    shape = tuple(fields.option_index.shape)
    steps, latent = torch.zeros(shape[0], dtype=torch.long), torch.empty_like(slots, device="cpu")
    result = Refined(torch.empty(shape), torch.empty(shape[0]), steps, latent)
    if by_step:
        result.scores_by_step = torch.empty(max_steps, *shape)
        result.halt_logits_by_step = torch.empty(max_steps, shape[0])
        result.wants_halt_by_step = torch.zeros(max_steps, shape[0], dtype=torch.bool)
        result.movement_by_step = torch.empty(max_steps, shape[0])
    return result


def _record(result: Refined, step: int, active: Tensor, *values: Tensor) -> None:
    """Keep the values of a step, in the order of `BY_STEP`, for the rows that ran it."""
    result.scores[active], result.halt_logits[active], result.steps[active] = values[0], values[1], step
    for name, value in zip(BY_STEP, values, strict=True):
        if (by_step := getattr(result, name)) is not None:
            by_step[step - 1 :, active] = value  # a halted row keeps its last values


def refine_rollouts(
    model: HybridModel,
    hidden_states: Tensor,
    memory_mask: Tensor,
    fields: FieldBatch,
    *,
    rollouts: int,
    pick: str = "q",
    seed: int = 0,
    **kwargs: Any,
) -> Refined:
    """Refine `rollouts` noisy copies of each row and keep one of them.

    Args:
        model: The head.
        hidden_states: (batch, tokens, layers, backbone_dim).
        memory_mask: (batch, tokens).
        fields: What is asked.
        rollouts: Copies per row; the first is without noise, so one copy is `refine` itself.
        pick: `q` keeps the copy the q head believes in most; `vote` a copy with the most frequent answer.
        seed: Seed of the noise.
        **kwargs: Passed to `refine`.
    """
    if pick not in PICKS:
        raise ValueError(f"pick={pick!r}: expected 'q' or 'vote'")
    return pick_rollout(noisy_copies(model, hidden_states, memory_mask, fields, rollouts, seed, **kwargs), pick)


@torch.inference_mode()
def noisy_copies(
    model: HybridModel,
    hidden_states: Tensor,
    memory_mask: Tensor,
    fields: FieldBatch,
    rollouts: int,
    seed: int = 0,
    **kwargs: Any,
) -> list[Refined]:
    """The copies that `refine_rollouts` picks from; fewer rollouts are the first of more."""
    if not 1 <= rollouts <= MOST_ROLLOUTS:
        raise ValueError(f"rollouts={rollouts}: expected a number from 1 to {MOST_ROLLOUTS}")
    seeds = [None, *range(seed * MOST_ROLLOUTS, seed * MOST_ROLLOUTS + rollouts - 1)]
    kwargs["encoded"] = model.encode(hidden_states, memory_mask, fields)
    return [refine(model, hidden_states, memory_mask, fields, noise_seed=each, **kwargs) for each in seeds]


def pick_rollout(runs: Sequence[Refined], pick: str) -> Refined:
    """Keep one copy per row: the one that q believes in most (`q`), or one with the most frequent answer (`vote`)."""
    halt_logits = torch.stack([run.halt_logits for run in runs])  # (rollouts, batch)
    if pick == "vote":
        answers = torch.stack([run.scores.argmax(-1) for run in runs])  # (rollouts, batch, fields)
        agreement = (answers[:, None] == answers[None]).all(-1).sum(1).float()  # (rollouts, batch)
        best = (agreement + halt_logits.sigmoid() / 2).argmax(0)  # ties go to the higher q
    else:
        best = halt_logits.argmax(0)
    return _pick_rows(runs, best)


def _pick_rows(runs: Sequence[Refined], best: Tensor) -> Refined:
    """For each row, what the run number `best[row]` says of it."""
    rows = torch.arange(len(best))
    picked = {name: torch.stack([getattr(run, name) for run in runs])[best, rows] for name in FINAL}
    if runs[0].scores_by_step is not None:
        longest = max(len(run.scores_by_step) for run in runs if run.scores_by_step is not None)
        for name in BY_STEP:  # runs end at different steps: the last one is repeated
            values = [getattr(run, name) for run in runs]
            values = [torch.cat([v, v[-1:].expand(longest - len(v), *v.shape[1:])]) for v in values]
            picked[name] = torch.stack(values)[best, :, rows].transpose(0, 1)
    return Refined(**picked)
