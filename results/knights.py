"""Knights & Knaves puzzles in the words of the published ones, many from each set of statements.

    python results/knights.py ../shared/data/knights_knaves.jsonl --output runs/knights.jsonl

The published puzzles say one of six things (`Zoey is a knave`, `Zoey is not a knave`, and two such joined by `and`,
`or`, `if` or `if and only if`) in one of eighteen ways (`Noah remarked, "..."`). Groups of two to six people make six
statements each, and a choice of one for each person that has a single solution is a puzzle: a head that reads each
sentence apart embeds few of them for many puzzles. The depth of a puzzle is the number of its people. Each statement
of a group is a row of its own, too, of depth 0, that asks who says it, in which form, and as what each person is
named; a few of new groups are kept for validation. Of the published training puzzles every tenth is kept for
validation, the others of two to six people are trained on; the published test puzzles stay as they are.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rows import read_rows, write_rows

GROUPS = {2: (3000, 20), 3: (1500, 40), 4: (600, 60), 5: (300, 120), 6: (300, 120)}  # people: groups, puzzles of one
KINDS = "knight", "knave"
HELD_OUT_GROUPS = 30  # whose statements alone are for validation
HOLD_OUT = 10  # of so many published training puzzles, one is kept for validation
WAYS = (
    'According to {name}, "{words}".', "{name} expressed that {words}.", "{name} said that {words}.",
    'In {name}\'s words: "{words}".', '"{words}," {name} declared.', 'As {name} put it, "{words}".',
    'In a statement by {name}: "{words}".', '{name} was heard saying, "{words}".', '"{words}" - {name}.',
    '{name} commented, "{words}".', '{name} asserted: "{words}".', '{name} noted, "{words}".',
    "{name} told you that {words}.", '{name} said, "{words}."', '"{words}," {name} claimed.',
    '{name} stated, "{words}".', '{name} remarked, "{words}".', '"{words}," {name} mentioned.',
)  # fmt: skip
JOINED: dict[str, Callable[[bool, bool], bool]] = {
    "{} and {}": lambda a, b: a and b,
    "{} or {}": lambda a, b: a or b,
    "If {} then {}": lambda a, b: not a or b,
    "{} if and only if {}": lambda a, b: a == b,
}
WORDS = {"{}": "is", "{} not": "is not"} | {form: " ".join(form.replace("{}", "").lower().split()) for form in JOINED}
PLACES, NOT_NAMED = ("in the first place", "in the second place"), "not named"
NAMED = [NOT_NAMED, *(f"a {kind} {place}" for place in PLACES for kind in KINDS)]
CONTEXT = (
    "A very special island is inhabited only by knights and knaves. Knights always tell the truth, and knaves always "
    "lie. You meet {number} inhabitants: {names}. {statements}"
)

Row = dict[str, Any]


class Statement(NamedTuple):
    """What a person says: its form, whom it names as what, and the kinds of all people with which it can be said."""

    text: str
    form: str
    told: list[tuple[int, str]]
    possible: set[tuple[bool, ...]]


def statement(speaker: int, names: Sequence[str], generator: random.Random) -> Statement:
    """What one person of a group says. It is true if a knight says it, else false (kinds: true is a knight)."""
    form = generator.choice(list(WORDS))
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
    return Statement(way.format(name=names[speaker], words=words), form, told, possible)


def statements(names: Sequence[str], number: int, generator: random.Random) -> list[list[Statement]]:
    """What each person of a group may say."""
    return [[statement(speaker, names, generator) for _ in range(number)] for speaker in range(len(names))]


def puzzles(
    said: Sequence[Sequence[Statement]], number: int, generator: random.Random
) -> list[tuple[list[str], tuple[bool, ...]]]:
    """Texts of one statement a person, and their only solution, for at most `number` different choices of them."""
    found: dict[tuple[int, ...], tuple[list[str], tuple[bool, ...]]] = {}
    for _ in range(20 * number):
        if len(found) == number:
            break
        choice = tuple(generator.randrange(len(of_person)) for of_person in said)
        chosen = [of_person[one] for of_person, one in zip(said, choice, strict=True)]
        solutions = set.intersection(*(one.possible for one in chosen))
        if choice not in found and len(solutions) == 1:
            found[choice] = [one.text for one in chosen], solutions.pop()
    return list(found.values())


def to_row(number: int, names: Sequence[str], texts: Sequence[str], solution: Sequence[bool]) -> Row:
    """A puzzle in canonical columns."""
    return {
        "id": f"generated-{len(names)}-{number}", "split": "train", "depth": len(names),
        "context": context_of(names, texts), "question": "So who is a knight and who is a knave?",
        "answer": {name: KINDS[not is_knight] for name, is_knight in zip(names, solution, strict=True)},
        "fields": [{"name": name, "options": list(KINDS)} for name in names],
    }  # fmt: skip


def reading_rows(start: int, names: Sequence[str], said: Sequence[Sequence[Statement]]) -> list[Row]:
    """Rows of single statements, but those that name one person twice."""
    chosen = [(speaker, one) for speaker, of_person in enumerate(said) for one in of_person]
    clear = [(speaker, one) for speaker, one in chosen if len({person for person, _ in one.told}) == len(one.told)]
    return [reading_row(start + row, names, *one) for row, one in enumerate(clear)]


def reading_row(number: int, names: Sequence[str], speaker: int, one: Statement) -> Row:
    """A single statement, of which is asked who says it, in which form, and as what each person is named."""
    answer = {"the speaker": names[speaker], "the form": WORDS[one.form]} | dict.fromkeys(names, NOT_NAMED)
    for place, (person, kind) in zip(PLACES, one.told, strict=False):
        answer[names[person]] = f"a {kind} {place}"
    options = {"the speaker": list(names), "the form": list(WORDS.values())}
    return {
        "id": f"statement-{number}", "split": "train", "depth": 0, "context": context_of(names, [one.text]),
        "question": "Who says what?", "answer": answer,
        "fields": [{"name": name, "options": options.get(name, NAMED)} for name in answer],
    }  # fmt: skip


def context_of(names: Sequence[str], statements: Sequence[str]) -> str:
    """The text of a puzzle."""
    listed = ", ".join(names[:-1]) + f", and {names[-1]}"
    return CONTEXT.format(number=len(names), names=listed, statements=" ".join(statements))


def main(arguments: Sequence[str]) -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--statements", type=int, default=6, help="statements that a person of a group makes")
    parsed = parser.parse_args(arguments)
    rows = with_generated(read_rows(parsed.data), parsed.statements)
    write_rows(parsed.output, rows)
    print(f"{len(rows)} rows")


def with_generated(published: Sequence[Row], statements_each: int = 6) -> list[Row]:
    """The published rows, and generated ones in training."""
    names = sorted({name for row in published if row["split"] == "train" for name in row["answer"]})
    rows, generator = [], random.Random(0)
    for size, (num_groups, num_puzzles) in GROUPS.items():
        for _ in range(num_groups):
            group = generator.sample(names, size)
            said = statements(group, statements_each, generator)
            rows += reading_rows(len(rows), group, said)
            found = puzzles(said, num_puzzles, generator)
            rows += [to_row(len(rows) + number, group, *puzzle) for number, puzzle in enumerate(found)]
    generator.shuffle(rows)
    for number in range(HELD_OUT_GROUPS):
        group = generator.sample(names, 5)
        new = reading_rows(5 * number, group, statements(group, 1, generator))
        rows += [row | {"id": f"new-{row['id']}", "split": "valid"} for row in new]
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
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
