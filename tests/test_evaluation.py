"""Figures of a result file, against values computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import chain_examples

from hybrid.evaluation import (
    StepRecord,
    accuracy_lines,
    accuracy_row,
    by_depth,
    calibration,
    cost_cell,
    evaluate_head,
    harness_fields,
    plot_steps,
    provenance,
    run_rollouts,
    run_steps,
    summarize,
    train_device,
    train_seconds,
    wilson_interval,
    write_results,
)
from hybrid.refinement import refine, refine_rollouts


def test_wilson_interval_matches_published_values():
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_accuracy_row():
    row = accuracy_row(torch.tensor([True, True, True, False]))
    assert row["accuracy"] == 0.75 and row["n"] == 4
    assert row["stderr"] == pytest.approx(0.25)


def test_by_depth_adds_up():
    examples = chain_examples(6)  # depths 1, 2, 1, 2, …
    rows = by_depth(torch.tensor([True, False, True, False, False, True]), examples)
    assert [(row["depth"], row["n"]) for row in rows] == [(1, 3), (2, 3), ("all", 6)]
    assert [row["accuracy"] for row in rows] == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0.5]


def record() -> StepRecord:
    right = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])
    halt = torch.tensor([[3.0, -1.0, -1.0], [3.0, 2.0, -1.0], [3.0, 2.0, -1.0]])
    return StepRecord(right, right.float(), halt, halt > 0, right.float(), 1.0)


def test_halting_is_read_off_the_run_without_halting():
    assert record().steps_used(3).tolist() == [1, 2, 3]
    assert record().when_halted(record().right, 3).tolist() == [True, True, True]
    assert record().steps_used(2).tolist() == [1, 2, 2]
    assert record().when_halted(record().right, 2).tolist() == [True, True, False]


def test_cells_are_counted_where_the_answer_halts():
    later = replace(record(), fields_right=torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.7, 0.0], [0.0, 0.0, 0.9]]))
    assert summarize(later, chain_examples(3), [1], 3)["field_accuracy"] == pytest.approx(0.7)


def test_calibration_of_a_head_that_knows_and_one_that_does_not():
    right = torch.tensor([[True] * 5 + [False] * 5])
    knows = StepRecord(right, right.float(), torch.where(right, 9.0, -9.0), right, right.float(), 1.0)
    figures = calibration(knows, 1)
    assert figures["auroc"] == 1.0 and figures["expected_calibration_error"] < 0.01
    belief = torch.full((1, 10), 2.1972246)  # 0.9, of every answer
    blind = StepRecord(right, right.float(), belief, right, right.float(), 1.0)
    figures = calibration(blind, 1)
    assert figures["auroc"] == 0.5 and figures["expected_calibration_error"] == pytest.approx(0.4, abs=1e-3)
    assert [entry["n"] for entry in figures["bins"]] == [10]


def test_recorded_steps_equal_the_run_with_halting(model, embedded):
    with torch.no_grad():
        torch.manual_seed(0)
        model.decoder.halt_head.weight.normal_()
        first = run_steps(model, embedded, 1, progress=False).halt_logits
        model.decoder.halt_head.bias -= first.median()
    recorded = run_steps(model, embedded, 3, progress=False)
    assert len(set(recorded.steps_used(3).tolist())) > 1
    hidden_states, mask, fields, labels = embedded.batch(model, range(len(embedded)))
    live = refine(model, hidden_states, mask, fields, max_steps=3, halting="learned")
    assert live.steps.tolist() == recorded.steps_used(3).tolist()
    right = (live.scores.argmax(-1) == labels).all(1)
    assert right.tolist() == recorded.when_halted(recorded.right, 3).tolist()


def test_rollouts_are_counted_from_the_same_copies(model, embedded):
    figures = run_rollouts(model, embedded, [1, 3], progress=False)
    for pick in ("q", "vote"):
        one, three = figures[f"accuracy_by_rollouts_{pick}"]
        assert (one["rollouts"], three["rollouts"]) == (1, 3) and one["by_depth"][-1]["n"] == len(embedded)
        hidden_states, mask, fields, labels = embedded.batch(model, range(len(embedded)))
        for row in (one, three):
            live = refine_rollouts(model, hidden_states, mask, fields, rollouts=row["rollouts"], pick=pick)
            right = float((live.scores.argmax(-1) == labels).all(1).float().mean())
            assert row["by_depth"][-1]["accuracy"] == pytest.approx(right)
    with pytest.raises(ValueError, match="expected numbers > 0"):
        run_rollouts(model, embedded, [0])


def test_a_head_that_never_halts_is_reported_as_such(model, embedded):
    model.config.reasoner.halting = "never"
    with torch.no_grad():
        model.decoder.halt_head.bias.fill_(5.0)
    assert evaluate_head(model, embedded, [1, 3], progress=False)["mean_steps_used"] == 3.0


def test_result_file_has_what_a_number_needs(model, embedded, tmp_path):
    results = evaluate_head(model, embedded, [1, 2, 5], progress=False)
    moved = results["movement_by_steps"]
    assert len(moved) == 5 and all(step > 0 for step in moved)
    results |= {"split": "test", **provenance("hybrid eval …", seed=3)}
    assert [point["steps"] for point in results["accuracy_by_steps"]] == [1, 2, 5]
    for key in ("command", "seed", "package_versions", "device", "date", "data_fingerprint", "num_parameters"):
        assert results[key] is not None, key
    results |= harness_fields("chain", results, "runs/x", seed=3)
    assert results["results"]["chain"]["acc,none"] == results["accuracy_by_depth"][-1]["accuracy"]
    assert results["n-samples"]["chain"]["effective"] == len(embedded)
    path = tmp_path / "results.json"
    write_results(path, results)
    assert json.loads(path.read_text())["seed"] == 3
    plot_steps(results, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    table = accuracy_lines(results)
    assert table.count("\n") == 1 + 3 + 2  # head, rule, two depths and all, parameters and time
    other = {"name": "LoRA", "accuracy_by_depth": results["accuracy_by_depth"]}
    grids = results | {"num_fields": 4, "field_accuracy": 0.875}
    assert "| single fields | | 0.875 | – |" in accuracy_lines(grids, other)
    with pytest.raises(ValueError, match="LoRA was evaluated on other questions"):
        accuracy_lines(
            results, {"name": "LoRA", "accuracy_by_depth": [dict(row, n=1) for row in results["accuracy_by_depth"]]}
        )
    with pytest.raises(ValueError, match=r"steps=\[0\]"):
        evaluate_head(model, embedded, [0], progress=False)


def test_costs_say_on_which_gpu_they_were_measured(tmp_path):
    lines = [{"seconds": 5}, {"valid_accuracy": 0.5, "device": "NVIDIA H200"}, {"seconds": 1234.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (train_seconds(tmp_path), train_device(tmp_path / "best")) == (1234.5, "NVIDIA H200")
    system = {"train_seconds": 1234.5, "train_device": "NVIDIA H200"}
    system |= {"milliseconds_per_question": 7.2, "device": "some processor, 2 threads"}
    assert cost_cell(system, "train_seconds") == "1,234 (H200)"
    assert cost_cell(system, "milliseconds_per_question") == "7"
    assert cost_cell(system, "num_parameters") == "–"
    assert cost_cell({"train_seconds": 9.0}, "train_seconds") == "9"
