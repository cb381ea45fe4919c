"""bAbI stories in other words: people, places, things and directions exchanged for others of their kind.

    python results/stories.py ../shared/data/babi_en.jsonl --output runs/stories.jsonl

A thousand stories a task are learned by heart. Each training story comes `--copies` times, once as it is; what is
exchanged in a copy is exchanged throughout, so that the answer stays right. Words are exchanged for those that the
task has, too; the lists of task 8 come in new orders, which `data.choices` must name. One training question of twenty
is kept for validation: in most tasks the last of every fourth story, longer than others, whose beginning training has
seen. Validation and test rows are those that no training row asks in the same words. Rows have `split`, `task`,
`context`, `question` and `answer`.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import read_rows, write_rows
from theories import reworded

HOLD_OUT = 20
WORD = re.compile(r"[A-Za-z]+")
KINDS = [  # each word of a kind with its other forms
    [(name,) for name in names.split()]
    for names in (
        "Mary Sandra Julie",  # apart from the next, for "he" and "she" say who is meant
        "John Daniel Bill Fred Jeff",
        "Gertrude Jessica Winona Emily",
        "Lily Bernhard Brian Greg Julius",
        "Antoine Jason Sumit Yann",
        "bathroom bedroom garden hallway kitchen office cinema park school",
        "apple football milk",
        "frog lion rhino swan",
        "gray green white yellow red blue pink",
        "rectangle sphere square triangle",
    )
] + [[("mouse", "mice"), ("wolf", "wolves"), ("cat", "cats")]]  # not sheep, of which one or many are the same
COMPASS = ["north", "east", "south", "west"]
OPPOSITES = [("left", "right"), ("above", "below")]
NAMES_ALONE = 20  # a task where the place tells the motive, and the thing, too


def main(arguments: Sequence[str]) -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=8, help="how often each training story comes (8)")
    parsed = parser.parse_args(arguments)
    rows = in_other_words(read_rows(parsed.data), parsed.copies)
    write_rows(parsed.output, rows)
    print(f"{len(rows)} rows")


def in_other_words(rows: Sequence[dict[str, Any]], copies: int) -> list[dict[str, Any]]:
    """The rows, training rows in copies, and some of them for validation."""
    vocabulary: dict[int, set[str]] = defaultdict(set)
    for row in rows:
        vocabulary[row["task"]] |= set(WORD.findall(f"{row['context']} {row['question']}"))
    draw, seen, written = random.Random(0), defaultdict(int), []
    for row in rows:
        if row["split"] != "train":
            written.append(row)
            continue
        seen[row["task"]] += 1
        if seen[row["task"]] % HOLD_OUT == 0:
            written.append(row | {"split": "valid"})
            continue
        written.append(row)
        for _ in range(copies - 1):
            new = exchange(row["task"], vocabulary[row["task"]], draw)
            written.append(row | {key: reworded(row[key], new) for key in ("context", "question", "answer")})
    trained = {(row["context"], row["question"]) for row in written if row["split"] == "train"}
    return [row for row in written if row["split"] == "train" or (row["context"], row["question"]) not in trained]


def exchange(task: int, vocabulary: set[str], draw: random.Random) -> dict[str, str]:
    """Another word for each of the task's words that has a kind."""
    new: dict[str, str] = {}
    for kind in KINDS:
        if task == NAMES_ALONE and not kind[0][0].istitle():
            continue
        words = [forms for forms in kind if set(forms) & vocabulary]
        for forms, others in zip(words, draw.sample(words, len(words)), strict=True):
            new |= zip(forms, others, strict=True)
    if set(COMPASS) <= vocabulary:  # turned, and perhaps mirrored
        turn, sense = draw.randrange(4), draw.choice((1, -1))
        turned = {word: COMPASS[(turn + sense * number) % 4] for number, word in enumerate(COMPASS)}
        new |= turned | {word[0]: other[0] for word, other in turned.items()}  # a way is told in letters
    for pair in OPPOSITES:
        if set(pair) <= vocabulary:
            new |= zip(pair, draw.sample(pair, 2), strict=True)
    return new


if __name__ == "__main__":
    main(sys.argv[1:])
