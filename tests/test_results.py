"""The scripts behind the result files, on questions small enough to check by hand."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))

from prontoqa_shortcut import by_rule, facts, harder

CONTEXT = (
    "Numpuses are not wooden. Each yumpus is wooden. Shumpuses are numpuses. A vumpus is a shumpus. Max is a vumpus."
)


@pytest.mark.parametrize(("asked", "answer"), [("Max is not wooden.", "True"), ("Max is wooden.", "False")])
def test_one_look_back_answers_prontoqa_until_the_distractor_is_mentioned(asked, answer):
    row = {"context": CONTEXT, "question": f"True or false: {asked}", "answer": answer}
    assert by_rule(row) == answer
    new = harder(row, random.Random(0))
    assert by_rule(new) is None and new["answer"] == answer
    added = set(facts(new["context"])) - set(facts(CONTEXT))
    assert set(facts(CONTEXT)) < set(facts(new["context"])) and new["context"].endswith("Max is a vumpus.")
    subjects, predicates = {subject for subject, *_ in added}, {predicate for *_, predicate in added}
    assert "yumpus" in predicates and not subjects & {"vumpus", "shumpus", "numpus", "max"}  # nobody is any of them
    assert not predicates & {"vumpus", "shumpus", "numpus"}
