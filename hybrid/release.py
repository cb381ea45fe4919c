"""Releasing a head: what goes under `adapters/`, and the check that it still answers as it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hybrid.backbone import Backbone
from hybrid.decoder import read_fields
from hybrid.hub import check_head_folder
from hybrid.inference import Answer
from hybrid.model import HybridModel

EXPECTED = "expected.json"
TOLERANCE = 0.02  # bfloat16 products differ a little between machines
FIGURES = ("results.json", "results.png", "written.json")


def release(
    head: Path,
    target: Path,
    questions: Sequence[Mapping[str, Any]],
    backbone: Backbone | None = None,
    *,
    halting: str | None = None,
    max_steps: int | None = None,
) -> None:
    """Copy a trained head in bfloat16, with its run, log, results and card, and record how it answers some questions.

    Args:
        head: Folder of the head, as training wrote it.
        target: Folder to write.
        questions: Each with `question`, and optionally `context`, `choices`, or `fields` (name → options, or a list of
            `{name, options, at}`). They are published with the head, so they must not come from data that may not be.
        backbone: A loaded backbone to share.
        halting: How the released head halts by default, if not as it was trained. What was measured before does not
            hold for it then and is not copied.
        max_steps: Its refinement steps at most, likewise.

    Raises:
        ValueError: `head` is no head, `target` exists, a number is out of range, or a question cannot be asked.
    """
    check_head_folder(head)
    if target.exists():
        raise ValueError(f"{target} exists: remove it, or give another name")
    if not questions:
        raise ValueError("no questions: a release records how it answers some")
    model = HybridModel.from_pretrained(head, backbone, dtype=torch.bfloat16)
    own = model.config.reasoner
    given = {"halting": halting, "max_steps": max_steps}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    model.config.reasoner = replace(own, **changes)
    copied = ("run.yaml", *(FIGURES if model.config.reasoner == own else ()))
    expected = [{**question, **_recorded(_ask(model, question))} for question in questions]
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in [*(head / name for name in copied), head.parent / "log.jsonl"]:
        if path.exists():
            shutil.copy(path, partial)
    model.save_pretrained(partial)
    (partial / EXPECTED).write_text(json.dumps(expected, indent=2) + "\n")
    partial.rename(target)
    model.write_card(target)


def differences(folder: Path, backbone: Backbone | None = None) -> list[str]:
    """What a released head answers otherwise than recorded, in words; empty if nothing."""
    model = HybridModel.from_pretrained(folder, backbone)
    found = []
    for recorded in json.loads((folder / EXPECTED).read_text()):
        now = _recorded(_ask(model, recorded))
        same = all(now[name] == recorded[name] for name in now if name != "probability")
        if not same or abs(now["probability"] - recorded["probability"]) > TOLERANCE:
            found.append(f"{recorded['question']!r}: {now}, recorded { ({name: recorded[name] for name in now}) }")
    return found


def _ask(model: HybridModel, question: Mapping[str, Any]) -> Answer:
    fields = question.get("fields") or None
    if isinstance(fields, list):
        fields = read_fields(fields)
    return model.answer(
        question["question"],
        context=question.get("context"),
        choices=question.get("choices"),
        fields=fields,
        explain=model.text_decoder is not None,
    )


def _recorded(answer: Answer) -> dict[str, Any]:
    recorded = {"value": answer.value, "probability": round(answer.probability, 4), "steps": answer.steps}
    return recorded | ({"text": answer.text} if answer.text is not None else {})
