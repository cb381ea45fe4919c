"""Drawings of the refinement, from answers made by hand."""

from __future__ import annotations

import pytest

from hybrid.inference import Answer
from hybrid.trace import MAX_FIELDS, MAX_OPTIONS, grid_names, plot_trace, trace_text


def answer_of(*steps: dict[str, dict[str, float]]) -> Answer:
    return Answer(value=None, probability=1.0, steps=len(steps), trace=list(steps), halt_probability=1.0)


def grid_step(*rows: str) -> dict[str, dict[str, float]]:
    """A step whose likeliest digits are given."""
    return {
        f"r{r}c{c}": {option: 0.7 if option == digit else 0.1 for option in "1234"}
        for r, row in enumerate(rows, start=1)
        for c, digit in enumerate(row, start=1)
    }


GRID = answer_of(grid_step("123", "341"), grid_step("124", "341"), grid_step("124", "141"))
RELATION = answer_of({"where": {"left": 0.25, "right": 0.75}}, {"where": {"left": 1.0, "right": 0.0}})


def test_grid_with_changed_cells_in_brackets():
    assert trace_text(GRID, width=80).splitlines() == [
        "step 1             step 2: 1 changed  step 3: 1 changed",
        " 1  2  3            1  2 [4]           1  2  4",
        " 3  4  1            3  4  1           [1] 4  1",
    ]


def test_steps_that_do_not_fit_go_on_below():
    lines = trace_text(GRID, width=40).splitlines()
    assert lines[4].startswith("step 3") and lines[6] == "[1] 4  1"
    assert max(map(len, lines)) <= 40 and trace_text(GRID, width=1).count("step") == 3


def test_options_with_bars():
    assert trace_text(RELATION, width=80).splitlines() == [
        "where    step 1         step 2",
        "  left   0.25 ██        1.00 ████████",
        "  right  0.75 ██████    0.00",
    ]


def test_what_is_not_drawn_is_counted():
    many = {str(number): 0.01 for number in range(100)}
    text = trace_text(answer_of({f"field {number}": many for number in range(MAX_FIELDS + 3)}))
    assert text.count(f"{100 - MAX_OPTIONS} others") == MAX_FIELDS
    assert f"0.{100 - MAX_OPTIONS} " in text and text.endswith("and 3 more fields")


@pytest.mark.parametrize(
    "names", [["r1c1", "r1c2", "r2c1"], ["r0c1"], ["r1c1", "where"], ["where"], ["r2c1"], ["r1c01"]]
)
def test_names_that_are_no_grid(names):
    assert grid_names(names) is None


def test_grid_names_are_put_in_rows():
    assert grid_names(["r2c1", "r1c2", "r1c1", "r2c2"]) == [["r1c1", "r1c2"], ["r2c1", "r2c2"]]


@pytest.mark.parametrize("answer", [GRID, RELATION, answer_of({"a$b$": {"$\\frac": 0.5, "c": 0.5}, "d": {"e": 1.0}})])
def test_plots_are_written(answer, tmp_path):
    plot_trace(answer, tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
