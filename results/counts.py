"""What the local copies hold: sentences that differ, test questions that training asks, answers by polarity.

    python results/counts.py ../shared/data --output results/counts.json

Read apart, a sentence is embedded once: how many are there? Of bAbI's test questions, how many does training ask in
the same words, as it is and with the copies of `results/stories.py`? And how many ProofWriter questions does the
polarity of the statement alone answer, of those that `results/theories.py` keeps for validation, and of the test's?
How many answers of CLUTRR begin with another option? How much of the test puzzles about knights does training say,
with the puzzles of `results/knights.py`?
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knights import with_generated
from rows import read_rows
from stories import in_other_words
from theories import with_statements

from hybrid.backbone import one_text, sentences
from hybrid.evaluation import provenance, write_results

COPIES = 8  # of a training story, as `results/stories.py` makes them


def main(arguments: Sequence[str]) -> None:
    """Write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the local copies")
    parser.add_argument("--output", type=Path, required=True)
    parsed = parser.parse_args(arguments)
    names = {
        "stepgame": "stepgame_clean",
        "babi": "babi_en",
        "proofwriter": "proofwriter_d5",
        "clutrr": "clutrr_089907f8",
        "knights": "knights_knaves",
    }
    sets = {name: read_rows(parsed.data / f"{file}.jsonl") for name, file in names.items()}
    held_out = [row for row in with_statements(sets["proofwriter"], copies=0, most=0) if row["split"] == "valid"]
    counts = {
        "sentences": {name: len(distinct(rows)) for name, rows in sets.items() if name not in ("clutrr", "knights")},
        "babi_test_questions_asked_in_training": asked_again(sets["babi"]),
        "proofwriter_validation_by_polarity": by_polarity(held_out),
        "proofwriter_test_by_polarity": by_polarity([row for row in sets["proofwriter"] if row["split"] == "dev"]),
        "clutrr_test_in_laws": in_laws([row for row in sets["clutrr"] if row["split"] == "test"]),
        "knights_test_said_in_training": said_again(with_generated(sets["knights"])),
    }
    write_results(parsed.output, {**counts, **provenance(shlex.join(["python", "results/counts.py", *arguments]), 0)})


def distinct(rows: Sequence[dict[str, Any]]) -> set[str]:
    """The sentences of contexts and questions, each once."""
    return {sentence for row in rows for _, sentence in sentences(one_text(row["context"], row["question"]))}


def in_laws(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Questions whose answer begins with another option (`son-in-law`), by hops."""
    by_hops = Counter(row["depth"] for row in rows if row["answer"].endswith("-in-law"))
    return {"n": len(rows), "by_hops": dict(sorted(by_hops.items()))}


def asked_again(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Test questions by task that training asks in the same words, before and after it comes in other words too."""
    found = {}
    for name, training in (("as it is", rows), ("in other words", in_other_words(rows, COPIES))):
        asked = {(row["context"], row["question"]) for row in training if row["split"] == "train"}
        again = [row for row in rows if row["split"] == "test" and (row["context"], row["question"]) in asked]
        found[name] = {
            "all": len(again),
            **{str(task): n for task, n in sorted(Counter(r["task"] for r in again).items())},
        }
    return found


def said_again(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Test puzzles with the sentences of one training puzzle, introductions included, and sentences training has.

    `rows` and `sentences` are of all splits.
    """
    in_all = [(row["split"], {sentence for _, sentence in sentences(row["context"])}) for row in rows]
    said = {split: [each for of, each in in_all if of == split] for split in ("train", "test")}
    puzzles, known = {frozenset(each) for each in said["train"]}, set().union(*said["train"])
    return {
        "rows": len(rows),
        "sentences": len(set().union(*(each for _, each in in_all))),
        "train_sentences": len(known),
        "test_puzzles": len(said["test"]),
        "test_puzzles_in_training": sum(frozenset(each) in puzzles for each in said["test"]),
        "test_sentences": len(set().union(*said["test"])),
        "test_sentences_in_training": len(set().union(*said["test"]) & known),
    }


def by_polarity(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many answers the commonest one of statements with, and of those without a negation gives."""
    answers: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for row in rows:
        answers[" not " in row["question"]][row["answer"]] += 1
    right = sum(max(counts.values(), default=0) for counts in answers.values())
    return {"n": len(rows), "right": right, "accuracy": right / max(1, len(rows))}


if __name__ == "__main__":
    main(sys.argv[1:])
