"""Documents are the questions of `hybrid eval`; the shipped tasks name their source and read local copies."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import yaml
from conftest import CHOICES
from test_training import write_data

from hybrid import documents
from hybrid.baselines import answer_prompt
from hybrid.config import DataConfig
from hybrid.data import load_examples
from hybrid.documents import TASKS, fields_of, is_document, load, load_sudoku, read_splits

ROOT = Path(__file__).parent.parent
SHIPPED = "clutrr folio knights_knaves mini_sudoku prontoqa proofwriter ruletaker stepgame sudoku".split()


class _Loader(yaml.SafeLoader):
    """Reads a task without its functions."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def task_config(name: str) -> dict:
    return yaml.load((TASKS / f"{name}.yaml").read_text(), _Loader)  # noqa: S506


@pytest.fixture
def data(tmp_path) -> dict:
    write_data(tmp_path)
    return {"path": str(tmp_path / "data.jsonl"), "choices": list(CHOICES)}


def test_documents_are_the_questions_of_hybrid_eval(data):
    found = load(data)
    rows = found["valid"][:6]
    config = DataConfig(**data, max_eval_examples=6)
    assert sorted(rows["id"]) == sorted(example.id for example in load_examples(config, "valid"))
    assert set(rows["depth"][:2]) == set(rows["depth"][2:4]) == {1, 2}  # however few, each depth equally often
    example = found.examples("valid")[0]
    assert rows["prompt"][0] == answer_prompt(example, example.fields[0])
    assert rows["answer"][0] == example.answers[0] and rows["choices"][0] == list(CHOICES)
    assert is_document(found["valid"][0]) and fields_of(found["valid"][0]) == example.fields
    assert not is_document({"context": "A", "question": "B"}) and not is_document(None)


def test_splits_are_read_when_they_are_asked_for(data, monkeypatch):
    read = []
    monkeypatch.setattr(
        documents, "load_examples", lambda config, split: read.append(split) or load_examples(config, split)
    )
    found = load(data)
    assert read == []
    assert len(found["valid"]) == 16 and len(found["valid"]) == 16
    assert read == ["valid"]


def test_several_fields_are_as_many_documents(tmp_path):
    path = tmp_path / "puzzles.jsonl"
    row = {"question": "Who is a knight ?", "answer": {"A": "knight", "B": "knave"}, "split": "valid"}
    path.write_text(json.dumps(row) + "\n")
    found = load({"hub_id": "not/read", "choices": ["knave", "knight"]}, data_files=str(path))["valid"]
    assert found["field"][:] == ["A", "B"] and found["answer"][:] == ["knight", "knave"]
    assert found["prompt"][1] == "Who is a knight ?\nB:"
    assert [field.name for field in fields_of(found[1])] == ["A", "B"]


def test_sudoku_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(hub_id, name, revision, split):
        asked.append((hub_id, name, revision, split))
        return [{"question": "1..4" + "." * 8 + "4..1", "answer": "1234341221434321"}]

    monkeypatch.setattr(documents.datasets, "load_dataset", load_dataset)
    found = load_sudoku(**task_config("sudoku")["dataset_kwargs"])["valid"]
    assert asked == [("sapientinc/sudoku-extreme", None, None, "train[-100:]")]
    assert len(found) == 16 and found["field"][5] == "r2c2" and found["answer"][5] == "4"
    assert found["context"][0].splitlines() == ["1 _ _ 4", "_ _ _ _", "_ _ _ _", "4 _ _ 1"]
    assert found["depth"][0] == 12 and found["choices"][0] == ["1", "2", "3", "4"]


def test_local_copies_of_other_tasks(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "A", "split": "dev"}\n{"text": "B", "split": "train"}\n')
    found = read_splits(str(path), ["train", "validation"])
    assert found["validation"]["text"][:] == ["A"] and isinstance(found["train"], datasets.Dataset)
    with pytest.raises(ValueError, match="no split 'test', which the task names; there are"):
        read_splits(str(path), ["test"])
    path.write_text('{"text": "A"}\n')
    assert read_splits(str(path), ["train", "test"])["test"]["text"][:] == ["A"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tasks_name_their_source(name):
    config = task_config(name)
    assert config["task"] == name and config["include"] == "_documents"
    data = config["dataset_kwargs"]["data"]
    assert config["dataset_path"] == (data.get("hub_id") or data["reasoning_gym"])
    assert "/" in data.get("hub_id", "/")
    DataConfig(**data)
    for path in (ROOT / "configs").glob(f"{name}_*.yaml"):  # what heads are trained with
        trained = yaml.safe_load(path.read_text())["data"]
        for key in ("hub_id", "reasoning_gym", "hub_config", "revision", "column_mapping", "choices"):
            assert data.get(key) == trained.get(key), key


def test_all_shipped_tasks_are_listed_here():
    assert sorted(path.stem for path in TASKS.glob("*.yaml")) == SHIPPED


def test_only_training_documents_are_few(monkeypatch):
    asked = []
    monkeypatch.setattr(documents, "load_examples", lambda config, split: asked.append((split, config)) or [])
    found = documents.load({"reasoning_gym": "mini_sudoku", "max_train_examples": 10_000})
    for split in ("train", "valid"):
        found.examples(split)
    sizes = {split: config.max_train_examples for split, config in asked}
    assert sizes == {"train": documents.MAX_TRAIN_EXAMPLES, "valid": 10_000}  # of which valid leaves out what is there
