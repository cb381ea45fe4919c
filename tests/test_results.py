"""The scripts behind the result files, on questions small enough to check by hand."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import CHOICES, tiny_run
from test_training import write_data
from torch import nn

from hybrid.backbone import load_backbone
from hybrid.config import BackboneConfig, TextConfig, to_plain
from hybrid.model import HybridModel

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))

import prontoqa_shortcut
import trm
import written
from prontoqa_shortcut import by_rule, facts, harder, with_facts

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


def test_facts_of_a_story_are_fields_beside_its_answer():
    row = {"context": CONTEXT, "question": "True or false: Max is not wooden.", "answer": "True", "steps": ["…"]}
    concepts = {"numpus": "True", "shumpus": "True", "vumpus": "True", "yumpus": "False"}
    assert with_facts(row, properties=False)["answer"] == {"answer": "True", **concepts}
    new = with_facts(row, properties=True)
    assert new["answer"] == {"answer": "True", **concepts, "wooden": "False"} and "steps" not in new
    assert new["fields"] == list(new["answer"])


def test_rows_with_and_without_distractors_are_mixed_and_held_out_by_depth(monkeypatch):
    monkeypatch.setattr(prontoqa_shortcut, "TRAIN_ROWS", 3)
    rows = [
        {"id": f"{split} {depth} {n}", "split": split, "depth": depth, "steps": []}
        for split in ("train", "train_nodistractor", "test") for depth in (1, 2, 3) for n in range(5)
    ]  # fmt: skip
    found = prontoqa_shortcut.mixed(rows, deepest=2, num_easy=1)
    counts = Counter((row["split"], row["depth"]) for row in found)
    assert counts == {("train", 1): 3, ("train", 2): 3, ("train", 11): 1, ("train", 12): 1} | {
        ("valid", depth): 2 for depth in (1, 2, 11, 12)
    }
    assert len({row["id"] for row in found}) == len(found) and not any("steps" in row for row in found)


def test_an_untrained_text_decoder_writes_and_expects_what_the_model_does(backbone_folder, tmp_path, monkeypatch):
    write_data(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace('"split": "test"', '"split": "hard"'))
    config = tiny_run(tmp_path, text=TextConfig(enabled=True))
    config.backbone = BackboneConfig(name_or_path=str(backbone_folder), layers=[0, 1, 2], dtype="float32")
    model = HybridModel.from_backbone(
        load_backbone(config.backbone),
        backbone_config=config.backbone,
        reasoner=config.reasoner,
        text=config.text,
        choices=CHOICES,
    )
    model.save_pretrained(tmp_path / "head")
    (tmp_path / "head" / "run.yaml").write_text(yaml.safe_dump(to_plain(config)))
    for name, value in {"NUM_PASSAGES": 3, "PASSAGE": 120}.items():
        monkeypatch.setattr(written, name, value)
    flags = {"max_examples": 6, "split": "hard", "output": tmp_path / "out" / "written.json"}
    written.main([str(tmp_path / "head"), *(f"--{name}={value}" for name, value in flags.items())])
    results = json.loads((tmp_path / "out" / "written.json").read_text())
    frozen, steered = results["exact_match"]
    assert frozen["examples"] == steered["examples"] and steered["accuracy_by_depth"][-1]["n"] == 6
    assert results["unrelated"]["n"] == 3 and results["unrelated"]["change"] == 0.0


def test_an_answer_is_right_word_for_word_up_to_its_last_line():
    assert written.is_answer(" left.\nWhat", "left") and written.is_answer("1 2 \n3 4\n\n", "1 2\n3 4")
    assert not written.is_answer("lefty", "left") and not written.is_answer("1 2", "1 2\n3 4")


class Reference(nn.Module):
    """Calls as the reference code's loss head has them: each cell becomes what is most often there."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 6))

    def initial_carry(self, batch: dict[str, torch.Tensor]) -> int:
        return 0

    def forward(self, carry: int, batch: dict[str, torch.Tensor], return_keys: list[str]) -> tuple[Any, ...]:
        logits = self.table[batch["inputs"]]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        right = logits.argmax(-1) == batch["labels"]
        metrics = {"count": torch.tensor(len(right)), "lm_loss": loss.detach()}
        metrics |= {"exact_accuracy": right.all(1).sum(), "accuracy": right.float().mean(1).sum()}
        return carry + 1, loss, metrics, {"preds": logits.argmax(-1)}, carry == 3


def test_reference_code_on_our_grids_goes_on_after_a_stop(tmp_path, monkeypatch):
    config = "data: {reasoning_gym: mini_sudoku, max_train_examples: 32, max_eval_examples: 8}"
    (tmp_path / "config.yaml").write_text(config)
    monkeypatch.setattr(trm, "reference_model", lambda parsed, num_digits: (Reference(), {"digits": num_digits}))
    for name, value in {"SAVE_EVERY": 10, "LOG_EVERY": 5, "WARMUP": 1}.items():
        monkeypatch.setattr(trm, name, value)
    clock = iter(range(10_000))
    second = SimpleNamespace(monotonic=lambda: next(clock) / 2)  # looked at twice an update, which takes a second
    monkeypatch.setattr(trm, "time", second)
    folders = {"trm-path": tmp_path, "folder": tmp_path / "run", "output": tmp_path / "trm.json"}
    flags = {"batch_size": 8, "learning_rate": 1, **folders}
    arguments = [str(tmp_path / "config.yaml"), *(f"--{name}={value}" for name, value in flags.items()), "--seconds"]
    trm.main([*arguments, "14"])
    trm.main([*arguments, "31"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [5, 10, 15, 20, 25, 30]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["seconds"] < 31
    results = json.loads((tmp_path / "trm.json").read_text())
    assert results["num_updates"] > 25 and results["sizes"] == {"digits": 4}
    assert 0.25 < results["field_accuracy"] < 1.0  # given cells are copied, others guessed
