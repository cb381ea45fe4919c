"""A released head answers as it did when it was released."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from hybrid.decoder import Field
from hybrid.hub import recorded_call, trained_on
from hybrid.model import HybridModel
from hybrid.release import differences, release

QUESTIONS = [
    {"question": "Where is A relative to B ?", "context": "A is left of B ."},
    {"question": "Where is A relative to B ?", "choices": ["left", "knave"]},
    {"question": "A says B is a knave .", "fields": {"A": ["knight", "knave"], "B": ["knight", "knave"]}},
]


@pytest.fixture
def released(model, backbone, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("{}\n")
    model.save_pretrained(tmp_path / "run" / "best")
    release(tmp_path / "run" / "best", tmp_path / "adapters" / "chains", QUESTIONS, backbone)
    return tmp_path / "adapters" / "chains"


def test_release_is_half_the_size_and_reproduces_its_answers(released, backbone):
    weights = load_file(released / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert {"README.md", "config.json", "expected.json", "log.jsonl"} <= {path.name for path in released.iterdir()}
    assert "chains" in (released / "README.md").read_text() and "partial" not in (released / "README.md").read_text()
    expected = json.loads((released / "expected.json").read_text())
    card = (released / "README.md").read_text()
    asked = f'    "{expected[0]["question"]}",\n    context="{expected[0]["context"]}",\n)\n'
    assert asked in card and f"print(answer.value)\n# {expected[0]['value']}\n" in card
    assert set(expected[2]["value"]) == {"A", "B"} and 0 < expected[0]["probability"] <= 1
    assert differences(released, backbone) == []


def test_card_shows_the_first_question_and_some_of_many_fields(tmp_path):
    assert recorded_call(tmp_path) is None
    many = {f"r{number}": str(number) for number in range(20)}
    (tmp_path / "expected.json").write_text(json.dumps([{"context": "1\n2", "question": "Which?", "value": many}]))
    imports, shown = recorded_call(tmp_path)
    assert imports == "HybridModel" and 'context="1\\n2",' in shown
    assert "'r7': '7', '…': '20 fields'" in shown and "'r8'" not in shown
    fields = [{"name": "Al", "options": ["son", "uncle"], "at": 3}, {"name": "Jo", "options": ["son", "uncle"]}]
    asked = {"question": "Who?", "choices": None, "fields": fields, "value": {"Al": "son", "Jo": "uncle"}}
    (tmp_path / "expected.json").write_text(json.dumps([asked]))
    imports, shown = recorded_call(tmp_path)
    assert imports == "Field, HybridModel"
    assert shown.splitlines() == [
        'options = ["son", "uncle"]',
        "answer = model.answer(",
        '    "Who?",',
        "    fields=[",
        '        Field("Al", options, at=3),',
        '        Field("Jo", options),',
        "    ],",
        ")",
        "print(answer.value)",
        "# {'Al': 'son', 'Jo': 'uncle'}",
    ]
    (tmp_path / "expected.json").write_text(json.dumps([{"question": "Who?", "value": "Al", "text": "It is\n Al."}]))
    assert recorded_call(tmp_path)[1].splitlines()[2:] == [
        "    explain=True,  # the language model writes it, too",
        ")",
        "print(answer.value, answer.text)",
        "# Al It is Al.",
    ]
    asked["fields"] = {"Al": ["son", "uncle"], "Jo": ["aunt"]}
    (tmp_path / "expected.json").write_text(json.dumps([asked]))
    assert '        Field("Jo", ["aunt"]),\n' in recorded_call(tmp_path)[1]


def test_card_says_what_the_head_was_trained_on(model, tmp_path):
    data = {"hub_id": "org/steps", "path": "/home/me/rows.jsonl", "train_depths": [1, 2], "max_train_examples": 6000}
    run = {"data": data, "training": {"start_from": "/home/me/runs/first/last"}}
    said = (
        "Trained on rows of `rows.jsonl`, in place of `org/steps`, depths 1, 2, 6,000 rows at most; it went on from "
    )
    said += "the weights of `first/last`. Its configuration is `run.yaml`."
    assert trained_on(run).startswith("\n") and " ".join(trained_on(run).split()) == said  # no folder of this machine
    assert max(map(len, trained_on(run).splitlines())) <= 115
    others = {"reasoning-gym's `sudoku`": {"reasoning_gym": "sudoku"}, "`rows.jsonl`": {"path": "rows.jsonl"}}
    for source, other in others.items():
        assert trained_on({"data": other}) == f"\nTrained on {source}. Its configuration is `run.yaml`."
    assert trained_on({"data": {"hub_id": None, "path": None}}) == trained_on({}) == ""
    staged = {"data": {"path": "rows.jsonl", "train_depths": [1]}, "training": {"curriculum": 0.5}}
    assert "`rows.jsonl`, depths 1, as far as its curriculum came. Its" in " ".join(trained_on(staged).split())
    model.save_pretrained(tmp_path)
    assert "Trained on" not in (tmp_path / "README.md").read_text()
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    model.write_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"is published.{trained_on(run)}\n\n```python" in card and "datasets:" not in card  # its rows are others
    (tmp_path / "run.yaml").write_text(json.dumps({"data": {"hub_id": "org/steps"}}))
    model.write_card(tmp_path)
    assert "\ndatasets: [org/steps]\ntags:" in (tmp_path / "README.md").read_text()


def test_questions_whose_fields_stand_in_the_text(model, backbone, tmp_path):
    model.config.places = {}
    model.save_pretrained(tmp_path / "best")
    fields = [{"name": "answer", "options": ["left", "right"], "at": 5}]
    question = {"question": "A is left of B . Where is A ?", "fields": fields}
    release(tmp_path / "best", tmp_path / "released", [question], backbone)
    [expected] = json.loads((tmp_path / "released" / "expected.json").read_text())
    asked = [Field("answer", ["left", "right"], at=5)]
    answer = HybridModel.from_pretrained(tmp_path / "released", backbone).answer(question["question"], fields=asked)
    assert 'Field("answer", options, at=5),' in (tmp_path / "released" / "README.md").read_text()
    assert "from hybrid import HybridModel\n" in (tmp_path / "best" / "README.md").read_text()  # it has choices
    model.config.choices = None
    model.write_card(tmp_path / "best")
    card = (tmp_path / "best" / "README.md").read_text()
    assert "from hybrid import Field, HybridModel\n" in card and 'Field("...", ["yes", "no"], at=0)' in card
    model.config.find_names = True
    model.write_card(tmp_path / "best")
    assert 'fields={"...": ["yes", "no"]}' in (tmp_path / "best" / "README.md").read_text()
    assert (expected["fields"], expected["probability"]) == (fields, round(answer.probability, 4))
    assert differences(tmp_path / "released", backbone) == []
    question["fields"][0]["posn"] = 5
    with pytest.raises(ValueError, match='\'posn\': 5.*: expected {"name": ..., "options": \\[...\\]}, and "at"'):
        release(tmp_path / "best", tmp_path / "again", [question], backbone)


def test_a_changed_answer_is_found(released, backbone):
    path = released / "expected.json"
    expected = json.loads(path.read_text())
    expected[1]["probability"] += 0.1
    path.write_text(json.dumps(expected))
    assert ["knave" in line or "left" in line for line in differences(released, backbone)] == [True]


def test_release_refuses_what_would_be_lost_or_empty(released, backbone, tmp_path):
    head = tmp_path / "run" / "best"
    with pytest.raises(ValueError, match="exists: remove it"):
        release(head, released, QUESTIONS, backbone)
    with pytest.raises(ValueError, match="no questions"):
        release(head, tmp_path / "new", [], backbone)
    with pytest.raises(ValueError, match="run: its head is"):
        release(tmp_path / "run", tmp_path / "new", QUESTIONS, backbone)


def test_released_head_halts_as_it_is_told(released, backbone, tmp_path):
    (tmp_path / "run" / "best" / "results.png").write_bytes(b"")  # of the steps that it was trained with
    release(tmp_path / "run" / "best", tmp_path / "same", QUESTIONS, backbone, halting=None, max_steps=None)
    assert (tmp_path / "same" / "results.png").exists()
    release(tmp_path / "run" / "best", tmp_path / "new", QUESTIONS, backbone, halting="never", max_steps=5)
    assert [row["steps"] for row in json.loads((tmp_path / "new" / "expected.json").read_text())] == [5, 5, 5]
    assert HybridModel.from_pretrained(tmp_path / "new", backbone).config.reasoner.max_steps == 5
    assert not (tmp_path / "new" / "results.png").exists()
    for wrong in (-1, 0):
        with pytest.raises(ValueError, match=f"max_steps={wrong}"):
            release(tmp_path / "run" / "best", tmp_path / "other", QUESTIONS, backbone, max_steps=wrong)
