"""How many PrOntoQA questions a rule without any chain answers, and the same questions without that shortcut.

    python results/prontoqa_shortcut.py ../shared/data/prontoqa.jsonl --output results/prontoqa_shortcut/results.json

Two sentences speak of the property asked for: that of the concept where the chain ends, and that of a distractor. The
rule believes the one whose concept is also what another sentence calls something ("Shumpuses are numpuses"), which
distractors never are. `--harder FILE` writes the questions with more sentences, a chain to the distractor from
concepts that nobody belongs to: answers stay, that shortcut is gone. `--mixed FILE` writes rows that lead to the rule:
questions without distractors teach what the answer is once the sentence is found, those with distractors which it is.
With `--copies` each training row of it comes again with its concepts exchanged at random (wumpuses for yumpuses), so
that stories are harder to know by heart. With `--words` its names and properties are exchanged, too: where they stay,
they tell which story it is.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rows import read_rows, write_rows

from hybrid.evaluation import accuracy_row, provenance, write_results

SENTENCE = re.compile(r"(?:each |every |an? )?(\w+) (?:is|are) (not )?(?:an? )?(\w+)", re.IGNORECASE)
CONCEPTS = {
    "wumpus", "yumpus", "zumpus", "dumpus", "rompus", "numpus", "tumpus", "vumpus", "impus", "jompus", "gorpus",
    "shumpus", "lempus", "sterpus", "grimpus", "lorpus", "brimpus",
}  # fmt: skip
SPLITS = ("train", "valid", "test")  # those with distractors
NUM_HELD_OUT = 100  # of --mixed, a depth


def main(arguments: Sequence[str]) -> None:
    """Write the result file, and the harder questions if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--harder", type=Path)
    parser.add_argument("--facts", type=Path, help="the questions with what else follows of the subject as fields")
    parser.add_argument("--properties", action="store_true", help="of --facts: not only concepts")
    parser.add_argument("--mixed", type=Path, help="questions with distractors, and easy ones without")
    parser.add_argument("--deepest", type=int, default=4, help="of --mixed: hops of the deepest")
    parser.add_argument("--rows", type=int, default=1100, help="of --mixed: at most so many with distractors a depth")
    parser.add_argument("--easy", type=int, default=300, help="of --mixed: easy ones of one hop, and of two")
    parser.add_argument("--copies", type=int, default=1, help="of --mixed: how often each training row comes")
    parser.add_argument("--words", action="store_true", help="of --copies: exchange names and properties as well")
    parsed = parser.parse_args(arguments)
    rows = read_rows(parsed.data)
    if parsed.mixed:
        more = names_and_properties(rows) if parsed.words else []
        written = mixed(rows, parsed.deepest, parsed.rows, parsed.easy, parsed.copies, more)
        write_rows(parsed.mixed, written)
    rows = [row for row in rows if row["split"] in SPLITS]
    right: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for row in rows:
        right[row["split"], row["depth"]].append(by_rule(row) == row["answer"])
    accuracy = [
        {"split": split, "depth": depth, **accuracy_row(torch.tensor(values))}
        for (split, depth), values in sorted(right.items())
    ]
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "results/prontoqa_shortcut.py", *arguments])
    write_results(parsed.output, {"rule": accuracy, **provenance(command, seed=0)})
    if parsed.harder:
        generator = random.Random(0)
        write_rows(parsed.harder, (harder(row, generator) for row in rows))
    if parsed.facts:
        write_rows(parsed.facts, (with_facts(row, parsed.properties) for row in rows))
    print("\n".join(json.dumps(row) for row in accuracy))


def by_rule(row: dict[str, Any]) -> str | None:
    """The rule's answer; nothing where it does not single out one sentence."""
    ((_, denied, asked),) = facts(row["question"].removeprefix("True or false: "))
    known = facts(row["context"])
    mentioned = {predicate for *_, predicate in known}
    believed = [is_denied for subject, is_denied, predicate in known if predicate == asked and subject in mentioned]
    return str(believed[0] == denied) if len(believed) == 1 else None


def harder(row: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """The row with a chain to each distractor, of the concepts that the row does not use, its sentences spread."""
    ((_, _, asked),) = facts(row["question"].removeprefix("True or false: "))
    known, sentences = facts(row["context"]), row["context"].split(". ")
    mentioned = {predicate for *_, predicate in known}
    unused = sorted(CONCEPTS - mentioned - {subject for subject, *_ in known})
    for distractor in [subject for subject, _, predicate in known if predicate == asked and subject not in mentioned]:
        chain = [*generator.sample(unused, len(unused)), distractor]
        for lower, upper in pairwise(chain):
            sentences.insert(generator.randrange(len(sentences) - 2), f"Each {lower} is {with_article(upper)}")
    return row | {"context": ". ".join(sentences)}


def with_facts(row: dict[str, Any], properties: bool) -> dict[str, Any]:
    """The row with a field for each concept, whether the subject is one, and for each property that follows."""
    ((subject, _, _),) = facts(row["question"].removeprefix("True or false: "))
    known = facts(row["context"])
    concepts = CONCEPTS & {word for lower, _, upper in known for word in (lower, upper)}
    is_a = belongs_to(subject, known, concepts)
    answers = {"answer": row["answer"], **{concept: str(concept in is_a) for concept in sorted(concepts)}}
    if properties:
        answers |= {word: str(not no) for lower, no, word in known if lower in is_a and word not in concepts}
    kept = {name: value for name, value in row.items() if name != "steps"}
    return kept | {"fields": list(answers), "answer": answers}


def belongs_to(subject: str, known: Sequence[tuple[str, bool, str]], concepts: set[str]) -> set[str]:
    """The subject and the concepts that it belongs to, over as many sentences as it takes."""
    is_a = {subject}
    while new := {upper for lower, no, upper in known if lower in is_a and not no and upper in concepts} - is_a:
        is_a |= new
    return is_a


def mixed(
    rows: Sequence[dict[str, Any]],
    deepest: int,
    num_rows: int,
    num_easy: int,
    num_copies: int,
    more: Sequence[Sequence[str]] = (),
) -> list[dict[str, Any]]:
    """Training rows with and without distractors; the last hundred of what is taken of a depth are for validation.

    The depth of easy rows is ten more, so that validation tells them apart.

    Args:
        rows: The set as it is.
        deepest: Hops at most, with distractors.
        num_rows: Training rows of a depth at most, with distractors.
        num_easy: Likewise without, of one hop and of two.
        num_copies: How often each training row comes, from the second time on with its concepts exchanged.
        more: Other kinds of words that are exchanged as well, each for one of its kind.
    """
    found: list[dict[str, Any]] = []
    kinds = [sorted(CONCEPTS), *more]
    generator, seen, total = random.Random(1), Counter(), Counter((row["split"], row["depth"]) for row in rows)
    for row in rows:
        key, is_easy = (row["split"], row["depth"]), row["split"] == "train_nodistractor"
        if not (row["split"] == "train" and row["depth"] <= deepest or is_easy and row["depth"] <= 2):
            continue
        seen[key] += 1
        size = min(num_rows, total[key] - NUM_HELD_OUT)
        is_held_out = seen[key] > size
        if is_easy and num_easy < seen[key] <= size or seen[key] > size + NUM_HELD_OUT:
            continue
        kept = {name: value for name, value in row.items() if name != "steps"}
        kept |= {"split": "valid" if is_held_out else "train", "depth": row["depth"] + 10 * is_easy}
        copies = range(1, 1 if is_held_out else num_copies)
        found += [kept, *(reworded(kept, kinds, generator) | {"id": f"{row['id']}+{copy}"} for copy in copies)]
    return random.Random(0).sample(found, len(found))


def with_article(word: str) -> str:
    """A wumpus, an impus."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def reworded(row: dict[str, Any], kinds: Sequence[Sequence[str]], generator: random.Random) -> dict[str, Any]:
    """The row with its words exchanged for others of their kind, one for one."""
    new = {word: other for kind in kinds for word, other in zip(kind, generator.sample(kind, len(kind)), strict=True)}
    pattern = re.compile(rf"\b(an? )?({'|'.join(new)})(?=(?:es)?\b)", re.IGNORECASE)

    def other(match: re.Match[str]) -> str:
        word = new[match[2].lower()]
        text = with_article(word) if match[1] else word
        return text.capitalize() if match[0][0].isupper() else text

    return row | {name: pattern.sub(other, row[name]) for name in ("context", "question")}


def names_and_properties(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Whom stories are about, and what is said of them but concepts, in small letters."""
    names = {facts(row["question"].removeprefix("True or false: "))[0][0] for row in rows}
    said = {predicate for row in rows for _, _, predicate in facts(row["context"])}
    return [sorted(names), sorted(said - CONCEPTS)]


def facts(text: str) -> list[tuple[str, bool, str]]:
    """(subject, is denied, predicate) of each sentence, nouns in the singular, in small letters."""
    return [(singular(subject), bool(no), singular(predicate)) for subject, no, predicate in SENTENCE.findall(text)]


def singular(word: str) -> str:
    """`Numpuses` → `numpus`."""
    return word.lower().removesuffix("es") if word.lower().endswith("uses") else word.lower()


if __name__ == "__main__":
    main(sys.argv[1:])
