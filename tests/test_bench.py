"""The speed table: every row is measured, absent peers are named, nothing is timed against a clock here."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CHOICES, chain_examples, tiny_run
from test_training import write_data

from hybrid.bench import Bench, Row, markdown_table, matrix_rate, run_bench
from hybrid.cli import main
from hybrid.config import BackboneConfig
from hybrid.model import HybridModel


@pytest.fixture(scope="module")
def results(tmp_path_factory, backbone, backbone_folder):
    folder = tmp_path_factory.mktemp("bench")
    write_data(folder)
    config = tiny_run(folder)
    head = HybridModel.from_backbone(
        backbone,
        backbone_config=BackboneConfig(name_or_path=str(backbone_folder)),
        reasoner=config.reasoner,
        choices=CHOICES,
    )
    head.save_pretrained(folder / "head")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybrid.bench.REPEATS", 1)
        patch.setattr("hybrid.bench.MATRIX", 64)
        patch.setattr("hybrid.backbone.Backbone.compile", lambda backbone: False)  # slow; test_backbone.py tries it
        return run_bench(backbone, config, {"chains": chain_examples(40)}, (str(folder / "head"), chain_examples(24)))


@pytest.mark.slow  # a head is loaded in a process of its own, and each loop runs
def test_every_row_is_measured_and_absent_peers_are_named(results):
    rows = {(row["loop"], row["against"]): row for row in results["rows"]}
    skipped = {against: row["note"] for (_, against), row in rows.items() if row["note"].startswith("skipped")}
    assert "--trm-path" in skipped["TRM reference code"]
    measured = [row for row in rows.values() if row["note"] not in skipped.values()]
    assert all(row["ratio"] is None or row["ratio"] > 0 for row in measured)
    memory = [row for (loop, _), row in rows.items() if "memory" in loop]
    assert len(memory) == 2 and all(row["ratio"] <= 1.05 for row in memory)  # more cycles and steps hold no more
    assert any("cold start" in loop for loop, _ in rows)
    json.dumps(results)


@pytest.mark.slow
def test_table_has_a_line_for_each_row(results):
    lines = markdown_table(results).splitlines()
    assert len(lines) == 2 + len(results["rows"]) and all(line.count("|") == 8 for line in lines)


def test_medians_are_taken_in_turns():
    calls = []
    bench = Bench(None, torch.device("cpu"), 1.0)
    bench.medians(lambda: calls.append("a"), lambda: calls.append("b"), repeats=2)
    assert calls == ["a", "b", "a", "b"]


def test_matrix_rate_is_a_rate(monkeypatch):
    monkeypatch.setattr("hybrid.bench.MATRIX", 64)
    assert matrix_rate(torch.device("cpu")) > 1e6


def test_rows_without_a_ratio_show_a_dash():
    assert "| – |" in markdown_table({"rows": [vars(Row("a", "b", "1 s", "–", None, "< 8 s"))]})


def test_wrong_arguments_fail_before_the_long_work(tmp_path, capsys):
    for arguments, message in (
        (["--trm-path", str(tmp_path)], "no models/recursive_reasoning/trm.py"),
        ([str(tmp_path / "missing")], "no head at"),
        (["--output", str(tmp_path)], "expected the name of a file"),
        (["--device", "gpu"], "gpu"),
        ([str(tmp_path)], "has no run.yaml"),
        (["--data", str(tmp_path / "missing.jsonl")], "missing.jsonl"),
    ):
        with pytest.raises(SystemExit):
            main(["bench", "--output", str(tmp_path / "bench.json"), *arguments])
        assert message in capsys.readouterr().err
