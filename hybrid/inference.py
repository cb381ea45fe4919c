"""Questions in, answers out: batching, traces, schemas, what the language model writes about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybrid.asking import fields_asked, in_eval_mode, texts_asked
from hybrid.backbone import length_batches
from hybrid.decoder import Field
from hybrid.generation import NUM_TOKENS, check_text_decoder, read_texts, soft_tokens, text_prompts, write_texts
from hybrid.model import HybridModel
from hybrid.refinement import TOKEN_BUDGET, Refined, refine_rollouts
from hybrid.schema import Form, read_schema


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
