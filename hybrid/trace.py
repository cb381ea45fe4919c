"""The course of an answer, drawn as text and as a PNG.

Fields named `r1c1` ... `rRcC` are a grid: it is drawn at each refinement step, with the cells that changed marked. For
any other field it is the probability of each option by step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid.inference import Answer

MAX_FIELDS = 12  # drawn of an answer that is no grid
MAX_OPTIONS = 20  # listed as text
MAX_LINES = 9  # of a plot, and one for all other options
BAR_WIDTH = 8


def trace_text(answer: Answer, width: int = 100) -> str:
    """Draw an answer's course with characters; in a grid, brackets are around the cells that a step changed.

    Args:
        answer: The answer.
        width: Characters of a line; steps that do not fit beside each other go on below.
    """
    names = list(answer.trace[0])
    if grid := grid_names(names):
        blocks = [_grid_block(grid, step, *cells) for step, cells in enumerate(_best_by_step(answer), start=1)]
        return "\n".join(_side_by_side(blocks, width))
    lines = []
    for name in names[:MAX_FIELDS]:
        curves = _curves(answer, name, MAX_OPTIONS)
        blocks = [
            [f"step {step}", *(f"{p:.2f} {'█' * round(BAR_WIDTH * p):<{BAR_WIDTH}}" for p in probabilities)]
            for step, probabilities in enumerate(zip(*curves.values(), strict=True), start=1)
        ]
        lines += _side_by_side(blocks, width, labels=[name, *(f"  {option}" for option in curves)])
    more = [f"and {len(names) - MAX_FIELDS} more fields"] if len(names) > MAX_FIELDS else []
    return "\n".join([*lines, *more])


def plot_trace(answer: Answer, path: Path) -> None:
    """PNG of an answer's course: a grid per step with changed cells shaded, or a panel of curves per field."""
    from matplotlib.figure import Figure  # not pyplot, which would change what a notebook draws on

    names = list(answer.trace[0])
    grid = grid_names(names)
    num_panels = len(answer.trace) if grid else min(len(names), MAX_FIELDS)
    columns = min(num_panels, 4 if grid else 3)
    rows = -(-num_panels // columns)
    size = max(2.0, 0.3 * len(grid), 0.3 * len(grid[0])) if grid else 4.5  # inches
    figure = Figure(figsize=(columns * size, rows * (size if grid else 3.0)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[num_panels:]:
        axis.set_axis_off()
    if grid:
        for step, (axis, cells) in enumerate(zip(axes.flat, _best_by_step(answer), strict=False), start=1):
            _draw_grid(axis, grid, step, *cells)
    else:
        for axis, name in zip(axes.flat, names, strict=False):
            _draw_curves(axis, name, _curves(answer, name, MAX_LINES))
    figure.savefig(path, dpi=150)


def grid_names(names: Sequence[str]) -> list[list[str]] | None:
    """Arrange the names `r1c1` ... `rRcC` in rows; `None` if they are anything else than a full grid."""
    places = [re.fullmatch(r"r([1-9]\d*)c([1-9]\d*)", name) for name in names]
    found = {(int(place[1]), int(place[2])): place[0] for place in places if place}
    num_rows, num_columns = max(r for r, _ in found) if found else 0, max(c for _, c in found) if found else 0
    if len(found) < len(names) or len(found) < num_rows * num_columns:
        return None
    return [[found[row, column] for column in range(1, num_columns + 1)] for row in range(1, num_rows + 1)]


def _best_by_step(answer: Answer) -> list[tuple[dict[str, str], set[str]]]:
    """For each step, the likeliest option of each field, and the fields where it is not that of the step before."""
    best = [{name: max(options, key=options.__getitem__) for name, options in step.items()} for step in answer.trace]
    before = [best[0], *best]
    return [(now, {name for name in now if now[name] != old[name]}) for now, old in zip(best, before, strict=False)]


def _curves(answer: Answer, name: str, limit: int) -> dict[str, list[float]]:
    """Probability by step of a field's likeliest options, and of all others together."""
    by_step = [step[name] for step in answer.trace]
    peaks = {option: max(step[option] for step in by_step) for option in by_step[0]}
    kept = set(sorted(peaks, key=peaks.__getitem__, reverse=True)[:limit])
    curves = {option: [step[option] for step in by_step] for option in peaks if option in kept}
    if rest := set(peaks) - kept:
        curves[f"{len(rest)} others"] = [sum(step[option] for option in rest) for step in by_step]
    return curves


def _grid_block(grid: list[list[str]], step: int, cells: dict[str, str], changed: set[str]) -> list[str]:
    width = max(len(text) for text in cells.values())
    lines = [
        "".join(f"[{cells[name]:>{width}}]" if name in changed else f" {cells[name]:>{width}} " for name in row)
        for row in grid
    ]
    return [_title(step, changed), *lines, ""]


def _title(step: int, changed: set[str]) -> str:
    return f"step {step}: {len(changed)} changed" if step > 1 else "step 1"


def _side_by_side(blocks: list[list[str]], width: int, labels: Sequence[str] = ()) -> list[str]:
    """Put blocks of equal height beside each other, as many as fit; labels stand left of each row of blocks."""
    label_width = max((len(label) + 2 for label in labels), default=0)
    block_width = max(len(line) for block in blocks for line in block) + 2
    per_row = max(1, (width + 2 - label_width) // block_width)
    lines = []
    for start in range(0, len(blocks), per_row):
        rows = zip(*blocks[start : start + per_row], strict=True)
        for label, row in zip(labels or [""] * len(blocks[0]), rows, strict=True):
            lines.append((label.ljust(label_width) + "".join(cell.ljust(block_width) for cell in row)).rstrip())
    return lines


def _draw_grid(axis: Any, grid: list[list[str]], step: int, cells: dict[str, str], changed: set[str]) -> None:
    axis.imshow([[name in changed for name in row] for row in grid], cmap="Oranges", vmin=0, vmax=3)
    for r, row in enumerate(grid):
        for c, name in enumerate(row):
            axis.text(c, r, _plain(cells[name]), ha="center", va="center", fontsize="small")
    axis.set_xticks([c + 0.5 for c in range(len(grid[0]) - 1)], [])
    axis.set_yticks([r + 0.5 for r in range(len(grid) - 1)], [])
    axis.grid(color="lightgray")
    axis.tick_params(length=0)
    axis.set_title(_title(step, changed), fontsize="small")


def _draw_curves(axis: Any, name: str, curves: dict[str, list[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for option, curve in curves.items():
        axis.plot(range(1, len(curve) + 1), curve, marker="o", markersize=3, label=_plain(option))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="refinement step", ylabel="probability", ylim=(0, 1.02), title=_plain(name))
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _plain(text: str) -> str:
    """The text for matplotlib, which reads formulas between dollar signs."""
    return text.replace("$", r"\$")
