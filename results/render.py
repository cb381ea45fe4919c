"""Fill the tables of README.md and docs/ from the result files: `python results/render.py` (`--check` only compares).

A table stands between `<!-- table: results/NAME/results.json other.json … -->` and `<!-- end -->`, other files of the
same folder being baselines beside the head; an output copied from a run stands between
`<!-- file: results/NAME/FILE -->` and `<!-- end -->`; what `results/ablations.py` ran of a set between
`<!-- ablations: SET -->` and `<!-- end -->`; one table of all sets, with what others report
(`results/published.json`), between `<!-- summary: NAME+other.json … -->` and `<!-- end -->`; a row for each set, its
accuracy alone, between `<!-- matrix: NAME+other.json … -->` and `<!-- end -->`; accuracy by refinement steps and by
rollouts (`results/NAME/test_time.json`) between `<!-- steps: NAME … -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ablations
from written import table as written_table

from hybrid.bench import markdown_table
from hybrid.evaluation import COSTS, accuracy_cell, accuracy_lines, cost_cell, harness_lines

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"(<!-- (table|file|summary|matrix|steps|ablations): (\S+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.DOTALL
)
COLUMNS = {  # of the matrix, and how the names of its systems begin in result files
    "head": "**head**",
    "one pass": "no recursion, 2 layers",
    "untied layers": ("no recursion, 8 layers", "no recursion, 16 layers"),
    "no LLM": "no language model",
    "LoRA": "LoRA",
    "probe": ("linear probe", "MLP probe"),
    "frozen LLM": "frozen LLM",
}
TITLES = {
    "easy_sudoku_smollm2": "9×9 Sudoku",
    "mini_sudoku_smollm2": "4×4 Sudoku",
    "stepgame_chains_smollm2": "StepGame, agents as fields (validation)",
    "chains_clutrr_smollm2": "CLUTRR, people as fields",
    "prontoqa_smollm2": "PrOntoQA",
    "proofwriter_smollm2": "ProofWriter (dev)",
    "babi_smollm2": "bAbI, all twenty tasks",
    "family_smollm2": "families",
    "knights_knaves_smollm2": "Knights & Knaves",
}
SUMMARY = "set", "answered by", "n", "all", "deepest", "trainable", "training, s", "one answer, ms"


def render(text: str) -> str:
    """The text with every block filled anew."""

    def fill(match: re.Match[str]) -> str:
        start, kind, name, more, end = match.groups()
        if kind in OF_SETS:
            return f"{start}{OF_SETS[kind]([name, *more.split()])}\n{end}"
        if kind == "ablations":
            return f"{start}{ablations.table(ablations.read(ablations.FOLDER / f'{name}.jsonl'), name)}\n{end}"
        content = (ROOT / name).read_text()
        if kind == "table":
            results = json.loads(content)
            if "rows" in results:
                body = f"`{results['command']}`, {results['device']}:\n\n{markdown_table(results)}\n"
            elif "compared" in results:
                body = f"`{results['command']}`, scores with standard errors:\n\n{harness_lines(results)}\n"
            elif "exact_match" in results:
                body = f"`{results['command']}`, n and 95% intervals as shown:\n\n{written_table(results)}\n"
            else:
                files = [json.loads((ROOT / name).with_name(other).read_text()) for other in more.split()]
                others = [system for file in files for system in beside(file)]
                body = f"`{results['command']}`, n and 95% intervals as shown:\n\n{accuracy_lines(results, *others)}\n"
        else:
            body = f"```\n{content.rstrip()}\n```\n"
        return f"{start}{body}{end}"

    return BLOCK.sub(fill, text)


def beside(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file adds to a head's: its baselines, if it has any, else its own figures."""
    return results.get("baselines") or [results]


def summary(sets: Sequence[str]) -> str:
    """One table: each set's head, its baselines and what others report."""
    published = json.loads((ROOT / "results" / "published.json").read_text())
    lines = [f"| {' | '.join(SUMMARY)} |", "|---" * len(SUMMARY) + "|"]
    for part in sets:
        name = part.partition("+")[0]
        for number, system in enumerate(systems_of(part)):
            *by_depth, every = system["accuracy_by_depth"]
            deepest = ([row for row in by_depth if row["depth"] is not None] or by_depth)[-1]
            costs = [cost_cell(system, key) for key, _ in COSTS.values()]
            cells = [
                f"[{name.removesuffix('_smollm2')}](results/{name}/)" if number == 0 else "",
                system["name"],
                str(every["n"]) if system["split"] == "test" else f"{every['n']}, {system['split'].partition('[')[0]}",
                accuracy_cell(every),
                f"{deepest['depth']}: {accuracy_cell(deepest)}",
            ]
            lines.append(f"| {' | '.join([*cells, *costs])} |")
        for peer in published.get(name, []):
            who = f"[{peer['name']}]({peer['source']})"
            lines.append(f"| | {who} | – | – | {peer['questions']}: {peer['accuracy']} | – | – | – |")
    return "\n".join(lines)


def matrix(sets: Sequence[str]) -> str:
    """One row for each set: the accuracy of its head and of what stands beside it, the highest bold.

    Of two probes the better one counts, else the first. A dagger marks what was trained for less than half as long as
    the head.
    """
    lines = [f"| set | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for part in sets:
        name, systems = part.partition("+")[0], systems_of(part)
        found = {}
        for column, start in COLUMNS.items():
            rows = [system for system in systems if system["name"].startswith(start)]
            if rows:
                chosen = max(rows, key=overall) if column == "probe" else rows[0]
                is_short = chosen.get("train_seconds", math.inf) < systems[0]["train_seconds"] / 2
                found[column] = f"{overall(chosen):.3f}", "†" if is_short and column != "probe" else ""
        best = max(text for text, _ in found.values())
        shown = [found.get(column, ("–", "")) for column in COLUMNS]
        cells = [f"**{text}**{mark}" if text == best else f"{text}{mark}" for text, mark in shown]
        lines.append(f"| {' | '.join([f'[{TITLES[name]}](results/{name}/)', *cells])} |")
    return "\n".join(lines)


def overall(system: dict[str, Any]) -> float:
    """Accuracy over all questions."""
    return system["accuracy_by_depth"][-1]["accuracy"]


def steps(sets: Sequence[str]) -> str:
    """Accuracy by refinement steps, none halting, and of rollouts, which halt as the head does; all and deepest."""
    lines: list[str] = []
    for name in sets:
        results = json.loads((ROOT / "results" / name / "test_time.json").read_text())
        by_steps, by_q = results["accuracy_by_steps"], results["accuracy_by_rollouts_q"][1:]
        by_vote = results["accuracy_by_rollouts_vote"][-1:]
        columns = ["set", "questions", "n", "its own", *(str(point["steps"]) for point in by_steps)]
        columns += [f"{pick} of {row['rollouts']}" for pick, few in (("q", by_q), ("vote", by_vote)) for row in few]
        lines = lines or [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        assert lines[0] == f"| {' | '.join(columns)} |", f"{name}: other steps or rollouts than those before"
        curves = [point["by_depth"] for point in [*by_steps, *by_q, *by_vote]]
        deepest = max(row for row, bucket in enumerate(curves[0][:-1]) if bucket["depth"] is not None)
        rows = [(-1, name.removesuffix("_smollm2"), f"{results['mean_steps_used']:.3g}"), (deepest, "", "")]
        for row, shown, own in rows[: 1 if deepest == 0 else 2]:  # with one depth, all are the deepest
            bucket, cells = curves[0][row], [f"{by_depth[row]['accuracy']:.3f}" for by_depth in curves]
            lines.append(f"| {' | '.join([shown, str(bucket['depth']), str(bucket['n']), own, *cells])} |")
    return "\n".join(lines)


def systems_of(part: str) -> list[dict[str, Any]]:
    """A set's head, then its baselines, from `NAME+other.json`.

    Other files, in the set's folder, add written answers, their baselines, or themselves.
    """
    name, *others = part.split("+")
    folder = ROOT / "results" / name
    results = json.loads((folder / "results.json").read_text())
    systems = [{"name": "**head**", **results}]
    measured = {"split": results["split"], "device": results.get("device")}
    systems += [measured | baseline for baseline in results.get("baselines", [])]
    for other in others:
        found = json.loads((folder / other).read_text())
        written = [system | {"name": f"{system['name']}, in words"} for system in found.get("exact_match", [])]
        systems += [{"split": found["split"], **system} for system in written or beside(found)]
    return systems


OF_SETS = {"summary": summary, "matrix": matrix, "steps": steps}


if __name__ == "__main__":
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        rendered = render(page.read_text())
        if "--check" not in sys.argv:
            page.write_text(rendered)
        elif rendered != page.read_text():
            sys.exit(f"{page.name} is not what the result files say: run results/render.py")
