"""Answers: batching, early exit, rollouts, traces."""

from __future__ import annotations

import functools
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.backbone import length_batches
from hybrid.decoder import Field, FieldBatch
from hybrid.model import HybridModel
from hybrid.reasoner import has_halted, state_movement
from hybrid.schema import Form, read_schema

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


@dataclass
class Answer:
    """The answer to one question.

    Attributes:
        value: The chosen option, or a mapping field name → option when several fields were asked, or what a schema
            makes of the options: plain Python values, or an instance of the Pydantic model.
        probability: Probability of `value` over the offered options; of all fields together, when there are several.
        steps: Refinement steps used.
        trace: Per step, field name → option → probability.
        halt_probability: The q head's belief that every field is right.
        text: What the language model writes about it, if it was asked to explain.
    """

    value: Any
    probability: float
    steps: int
    trace: list[dict[str, dict[str, float]]]
    halt_probability: float
    text: str | None = None


def in_eval_mode(answering: Callable[..., Any]) -> Callable[..., Any]:
    """Answers without dropout, also of a head that is being trained, which then goes on as it was."""

    @functools.wraps(answering)
    def run(model: HybridModel, *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return answering(model, *args, **kwargs)
        model.eval()
        try:
            return answering(model, *args, **kwargs)
        finally:
            model.train()

    return run


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
    """
    reasoner = model.config.reasoner
    max_steps = reasoner.max_steps if max_steps is None else max_steps
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: expected a number > 0")
    halting = halting or reasoner.halting
    encoded = model.encode(hidden_states, memory_mask, fields)
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


# -- questions in, answers out -------------------------------------------------------------------------------------


def answer(
    model: HybridModel,
    question: str,
    *,
    context: str | None = None,
    choices: Sequence[str] | None = None,
    fields: Sequence[Field | str] | Mapping[str, Sequence[str]] | None = None,
    schema: Any = None,
    **kwargs: Any,
) -> Answer:
    """Answer one question.

    Args:
        model: A trained head with its backbone.
        question: The question, or the whole text with the question at its end.
        context: The text that comes before the question.
        choices: Options of a question with one answer; by default what the head was trained to answer.
        fields: What is asked, when there are several answers: `Field`s, a mapping of names to options, or names alone,
            which have the options of the head; not together with `choices`.
        schema: What is asked, as a Pydantic model or a JSON schema; see `hybrid.schema.read_schema`.
        **kwargs: `explain`, `max_steps`, `halting`, `rollouts`, `pick`, `seed`, as in `answer_batch`.

    Raises:
        ValueError: No options, or an empty or too long text, or an answer that the model of `schema` refuses.
    """
    if not isinstance(question, str):
        raise ValueError(f"question={question!r}: expected a text; answer_batch takes many")
    asked: dict[str, Any] = {"choices": choices, "fields": fields, "schema": schema}
    return answer_batch(model, [question], contexts=[context], **asked, **kwargs)[0]


@torch.no_grad()
@in_eval_mode
def answer_batch(
    model: HybridModel,
    questions: Sequence[str],
    *,
    contexts: Sequence[str | None] | None = None,
    choices: Sequence[str] | None = None,
    fields: Sequence[Field | str] | Mapping[str, Sequence[str]] | None = None,
    schema: Any = None,
    explain: bool = False,
    max_steps: int | None = None,
    halting: str | None = None,
    rollouts: int = 1,
    pick: str = "q",
    seed: int = 0,
) -> list[Answer]:
    """Answer many questions that share their fields, in batches of similar length.

    Args:
        model: A trained head with its backbone.
        questions: The questions.
        contexts: A context for each.
        choices: Options of a question with one answer; by default what the head was trained to answer.
        fields: What is asked, when there are several answers.
        schema: What is asked, as a Pydantic model or a JSON schema; not together with `choices` or `fields`.
        explain: Also let the language model write from the refined latents (`Answer.text`); needs a text decoder.
        max_steps: Refinement steps at most.
        halting: `learned`, `convergence` or `never`.
        rollouts: Noisy copies per question.
        pick: How one copy is chosen, `q` or `vote`.
        seed: Seed of the noise.

    Raises:
        ValueError: As `answer`; what the others would have been answered is lost with it.
    """
    from hybrid.generation import (  # which builds on this module
        NUM_TOKENS,
        check_text_decoder,
        read_texts,
        soft_tokens,
        text_prompts,
        write_texts,
    )

    if isinstance(questions, str):
        raise ValueError(f"questions={questions!r}: expected a list of texts; answer takes one")
    if empty := [row for row, question in enumerate(questions) if not question.strip()]:
        raise ValueError(f"question {empty[0]} is empty: ask something; a story alone goes into `context`")
    form = read_schema(schema) if schema is not None else None
    if form is not None and (choices is not None or fields is not None):
        raise ValueError("a schema brings its own fields and options: leave out choices and fields")
    asked = fields_asked(model, choices, fields if form is None else form.fields)
    if explain:
        check_text_decoder(model)
    texts = texts_asked(questions, contexts, asked)
    lengths = [len(prompt.token_ids) for prompt in model.backbone.prompts(texts)] if texts else []
    answers: dict[int, Answer] = {}
    for rows in length_batches(lengths, TOKEN_BUDGET):
        prompts = text_prompts(model, [texts[row] for row in rows]) if explain else []
        if explain:
            read, hidden_states, mask = read_texts(model, prompts)
        else:
            read, (hidden_states, mask) = None, model.embed([texts[row] for row in rows])
        batch_fields = [asked] * len(rows)
        batch = model.field_batch(batch_fields, starts=model.starts_of(batch_fields, [texts[row] for row in rows]))
        refined = refine_rollouts(
            model,
            hidden_states,
            mask,
            batch,
            rollouts=rollouts,
            pick=pick,
            seed=seed,
            max_steps=max_steps,
            halting=halting,
            by_step=True,
        )
        written: list[str | None] = [None] * len(rows)
        if read is not None:
            soft = soft_tokens(model, refined.answer_latent, batch)
            written[:] = write_texts(
                model, prompts, read, soft, max_new_tokens=NUM_TOKENS, do_sample=False, num_beams=1
            )
        answers.update((row, _read_answer(refined, i, asked, form, written[i])) for i, row in enumerate(rows))
    return [answers[row] for row in range(len(questions))]


def texts_asked(
    questions: Sequence[str], contexts: Sequence[str | None] | None, fields: Sequence[Field]
) -> list[tuple[str | None, str]]:
    """Context and question of each row, without space around them, as in training, unless a field counts characters.

    Raises:
        ValueError: There are not as many contexts as questions.
    """
    contexts = contexts if contexts is not None else [None] * len(questions)
    if isinstance(contexts, str) or len(contexts) != len(questions):
        given = f"the text {reprlib.repr(contexts)}" if isinstance(contexts, str) else f"{len(contexts)} of them"
        raise ValueError(f"contexts: expected a list with one for each of {len(questions)} questions, got {given}")
    pairs = list(zip(contexts, questions, strict=True))
    if any(field.at is not None and field.at >= 0 for field in fields):
        return pairs
    return [((context or "").strip() or None, question.strip()) for context, question in pairs]


def fields_asked(
    model: HybridModel,
    choices: Sequence[str] | None,
    fields: Sequence[Field | str] | Mapping[str, Sequence[str]] | None,
) -> tuple[Field, ...]:
    """The fields that a question asks: `fields`, or a single one with `choices`, or those of the head.

    Warns when a head that always was asked the same fields is asked others, or not all of them.

    Raises:
        ValueError: None or both are given, or names appear twice.
    """
    if isinstance(choices, str):
        raise ValueError(f"choices={choices!r}: expected a list of texts")
    if fields is not None and choices is not None:
        raise ValueError("both choices and fields were given: choices are the options of a single field")
    choices = choices if choices is not None else model.config.choices
    own = model.config.fields
    if fields is None and model.config.asks_by_name:
        if choices is None:
            raise ValueError(
                "this head is asked for fields by their names, whose options it has: give fields=['name', …] "
                """(`--fields '["name", …]'`), all that its training rows would have"""
            )
        warnings.warn(
            "choices ask for one field, and this head always was asked for fields by their names: expect guesses",
            stacklevel=4,
        )
    if isinstance(fields, Mapping):
        fields = [Field(name, options) for name, options in fields.items()]
    if fields is not None:
        if isinstance(fields, str) or (wrong := [field for field in fields if not isinstance(field, Field | str)]):
            given = f"fields={fields!r}" if isinstance(fields, str) else f"fields with {reprlib.repr(wrong[0])}"
            raise ValueError(
                f"{given}: expected a mapping of names to options, or a list of Field or of names, for all questions"
            )
        common = model.config.options or model.config.choices
        known = {name: (own or {}).get(name, common) for name in fields if isinstance(name, str)}
        if unknown := [name for name, options in known.items() if options is None]:
            raise ValueError(f"fields={unknown}: this head has no options of its own for them: give {{name: options}}")
        asked = tuple(Field(field, known[field] or ()) if isinstance(field, str) else field for field in fields)
        if len({field.name for field in asked}) < len(asked) or not asked:
            raise ValueError(f"fields={[field.name for field in asked]}: names must be there and differ")
    elif choices is not None:
        asked = (Field("answer", choices),)
    elif own is not None:
        asked = tuple(Field(name, options) for name, options in own.items())
    else:
        raise ValueError(
            "this head has no default choices: give choices, fields or a schema (flags of `hybrid ask` and "
            "`hybrid generate`, too)"
        )
    names = [field.name for field in asked]
    if model.config.places is None and (standing := [field.name for field in asked if field.at is not None]):
        warnings.warn(
            f"fields {standing[:3]} say where they stand, which this head ignores: no field of its training set did",
            stacklevel=4,
        )
    if own is not None and (new := [name for name in names if name not in own]):
        warnings.warn(
            f"fields {new[:3]} are unknown to this head, which always was asked {list(own)[:3]} …: expect guesses",
            stacklevel=4,
        )
    elif own is not None and len(names) < len(own):
        warnings.warn(
            f"{len(names)} of the {len(own)} fields that this head always was asked together: expect worse answers",
            stacklevel=4,
        )
    return asked


def _read_answer(refined: Refined, row: int, fields: Sequence[Field], form: Form | None, text: str | None) -> Answer:
    assert refined.scores_by_step is not None
    steps = int(refined.steps[row])
    probabilities = refined.scores_by_step[:steps, row].softmax(-1)  # (steps, fields, options)
    trace = [
        {
            field.name: dict(zip(field.options, step[index].tolist(), strict=False))
            for index, field in enumerate(fields)
        }
        for step in probabilities
    ]
    best, chosen = probabilities[-1].max(-1)
    values = {field.name: field.options[int(chosen[index])] for index, field in enumerate(fields)}
    single = next(iter(values.values())) if len(fields) == 1 else values
    return Answer(
        value=single if form is None else form.value(values),
        probability=float(best.prod()),
        steps=steps,
        trace=trace,
        halt_probability=float(refined.halt_logits[row].sigmoid()),
        text=text,
    )
