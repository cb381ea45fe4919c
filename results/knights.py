"""Knights & Knaves puzzles in the words of the published ones, many from each set of statements.

    python results/knights.py ../shared/data/knights_knaves.jsonl --output runs/knights.jsonl

The published puzzles say one of six things (`Zoey is a knave`, `Zoey is not a knave`, and two such joined by `and`,
`or`, `if` or `if and only if`) in one of eighteen ways (`Noah remarked, "..."`). Groups of two to six people make six
statements each, and a choice of one for each person that has a single solution is a puzzle: a head that reads each
sentence apart embeds few of them for many puzzles. Each comes as it is, and with what some of the people are: its
depth is the number of the others, so that a curriculum can begin with a single one. The published training puzzles
of so many people are trained on, too, but for every tenth, which is kept for validation. The published test puzzles
stay as they are.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rows import read_rows, write_rows

GROUPS = {2: (3000, 20), 3: (1500, 40), 4: (600, 60), 5: (300, 120), 6: (300, 120)}  # people: groups, puzzles of one
KINDS = "knight", "knave"
HOLD_OUT = 10  # of so many published training puzzles, one is kept for validation
WAYS = (
    'According to {name}, "{words}".', "{name} expressed that {words}.", "{name} said that {words}.",
    'In {name}\'s words: "{words}".', '"{words}," {name} declared.', 'As {name} put it, "{words}".',
    'In a statement by {name}: "{words}".', '{name} was heard saying, "{words}".', '"{words}" - {name}.',
    '{name} commented, "{words}".', '{name} asserted: "{words}".', '{name} noted, "{words}".',
    "{name} told you that {words}.", '{name} said, "{words}."', '"{words}," {name} claimed.',
    '{name} stated, "{words}".', '{name} remarked, "{words}".', '"{words}," {name} mentioned.',
)  # fmt: skip
JOINED = {
    "{} and {}": lambda a, b: a and b,
    "{} or {}": lambda a, b: a or b,
    "If {} then {}": lambda a, b: not a or b,
    "{} if and only if {}": lambda a, b: a == b,
}
CONTEXT = (
    "A very special island is inhabited only by knights and knaves. Knights always tell the truth, and knaves always "
    "lie. You meet {number} inhabitants: {names}. {statements}"
)

Row = dict[str, Any]


def statement(speaker: int, names: Sequence[str], generator: random.Random) -> tuple[str, set[tuple[bool, ...]]]:
    """What one person of a group says, and the kinds of all people (true: a knight) with which it can be said.

    It is true if a knight says it, else false.
    """
    form = generator.choice(["{}", "{} not", *JOINED])
    number = 2 if form in JOINED else 1
    told = [(generator.randrange(len(names)), generator.choice(KINDS)) for _ in range(number)]
    inner = "{} is not a {}" if form == "{} not" else "{} is a {}"
    atoms = [inner.format(names[person], kind) for person, kind in told]
    words = form.format(*atoms) if form in JOINED else atoms[0]
    way = generator.choice(WAYS)
    if "that {words}" in way and form.startswith("If"):
        words = words[0].lower() + words[1:]
    possible = set()
    for solution in product((True, False), repeat=len(names)):
        truths = [solution[person] == (kind == "knight") for person, kind in told]
        truth = JOINED[form](*truths) if form in JOINED else truths[0] != (form == "{} not")
        if solution[speaker] == truth:
            possible.add(solution)
    return way.format(name=names[speaker], words=words), possible


def puzzles(
    names: Sequence[str], statements_each: int, number: int, generator: random.Random
) -> list[tuple[list[str], tuple[bool, ...]]]:
    """Texts of one statement a person, and their only solution, for at most `number` different choices of them."""
    said = [[statement(speaker, names, generator) for _ in range(statements_each)] for speaker in range(len(names))]
    found: dict[tuple[int, ...], tuple[list[str], tuple[bool, ...]]] = {}
    for _ in range(20 * number):
        if len(found) == number:
            break
        choice = tuple(generator.randrange(statements_each) for _ in names)
        chosen = [of_person[one] for of_person, one in zip(said, choice, strict=True)]
        solutions = set.intersection(*(possible for _, possible in chosen))
        if choice not in found and len(solutions) == 1:
            found[choice] = [text for text, _ in chosen], solutions.pop()
    return list(found.values())


def to_row(
    number: int, names: Sequence[str], statements: Sequence[str], solution: Sequence[bool], told: Sequence[int] = ()
) -> Row:
    """A puzzle in canonical columns, which tells what some of the people are."""
    listed = ", ".join(names[:-1]) + f", and {names[-1]}"
    kinds = {name: "knight" if is_knight else "knave" for name, is_knight in zip(names, solution, strict=True)}
    facts = [f"{names[person]} is a {kinds[names[person]]}." for person in told]
    answer = {name: kind for person, (name, kind) in enumerate(kinds.items()) if person not in told}
    return {
        "id": f"generated-{len(names)}-{number}", "split": "train", "depth": len(answer),
        "context": CONTEXT.format(number=len(names), names=listed, statements=" ".join([*statements, *facts])),
        "question": "So who is a knight and who is a knave?", "answer": answer,
        "fields": [{"name": name, "options": list(KINDS)} for name in answer],
    }  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--statements", type=int, default=6, help="statements that a person of a group makes")
    parsed = parser.parse_args(arguments)
    published = read_rows(parsed.data)
    names = sorted({name for row in published if row["split"] == "train" for name in row["answer"]})
    rows, generator, choices = [], random.Random(0), random.Random(1)
    for size, (num_groups, num_puzzles) in GROUPS.items():
        for _ in range(num_groups):
            group = generator.sample(names, size)
            for texts, solution in puzzles(group, parsed.statements, num_puzzles, generator):
                told = choices.sample(range(size), choices.randrange(1, size))
                rows += [to_row(len(rows), group, texts, solution, known) for known in ((), told)]
    generator.shuffle(rows)
    counts: dict[int, int] = {}
    for row in published:
        if row["split"] == "test":
            rows.append(row)
        elif row["split"] == "train":
            counts[row["depth"]] = number = counts.get(row["depth"], 0) + 1
            if number % HOLD_OUT == 0:
                rows.append(row | {"split": "valid"})
            elif row["depth"] in GROUPS:
                rows.append(row)
    write_rows(parsed.output, rows)
    said = {s for row in rows for s in re.split(r'(?<=[.])\s+|(?<=[.]")\s+', row["context"])}
    print(f"{len(rows)} rows, {len(said)} different sentences")


if __name__ == "__main__":
    main(sys.argv[1:])
