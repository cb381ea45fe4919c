"""What a caller asks, as a head reads it: texts, and the fields with their options."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybrid.backbone import warn_caller
from hybrid.decoder import Field
from hybrid.model import HybridModel


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
        warn_caller(
            "choices ask for one field, and this head always was asked for fields by their names: expect guesses"
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
        warn_caller(
            f"fields {standing[:3]} say where they stand, which this head ignores: no field of its training set did"
        )
    if own is not None and (new := [name for name in names if name not in own]):
        warn_caller(
            f"fields {new[:3]} are unknown to this head, which always was asked {list(own)[:3]} …: expect guesses"
        )
    elif own is not None and len(names) < len(own):
        warn_caller(
            f"{len(names)} of the {len(own)} fields that this head always was asked together: expect worse answers"
        )
    return asked
