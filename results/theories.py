"""ProofWriter theories with further statements, whose truth forward chaining tells, in other words each time.

    python results/theories.py ../shared/data/proofwriter_d5.jsonl --output runs/theories.jsonl

3,000 questions are few. Each training theory comes `--copies` times: names, attributes and verbs exchanged for others
of their kind, facts and rules in another order, and with one to `--statements` statements, each a field that stands at
its last character. A statement that follows is true, one whose opposite follows is false, any other is unknown (open
world); each is drawn as often as another, and of those that follow each proof depth up to one that is drawn for the
row. That is the row's depth, so that a curriculum can begin with rows in which what follows is a fact; were it the
deepest proof among them, most single statements of shallow rows would be unknown. A theory in `HOLD_OUT` is kept for
validation, with its own question alone; test rows are those of the file.

`--head` and `--by_kind` ask a head about the held-out theories, one statement of each kind, alone: facts, what follows
by one inference and by more, what is unknown though a rule ends so, and what else is unknown.

`--beside N` asks, in validation and test rows, for so many other statements as well, drawn at random from all that the
theory's words allow, so that what follows on the way may have a place to stand; they have no answer in those rows.
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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import read_rows, write_rows

from hybrid.backbone import one_text
from hybrid.evaluation import accuracy_row, provenance, write_results
from hybrid.model import HybridModel

HOLD_OUT = 12  # of so many theories, one is kept for validation
SINGLE = 1 / 8  # of the training rows have one statement, as those of the file
OPTIONS = ("True", "False", "Unknown")
PEOPLE = ["Anne", "Bob", "Charlie", "Dave", "Erin", "Fiona", "Gary", "Harry"]
ANIMALS = ["bald eagle", "bear", "cat", "cow", "dog", "lion", "mouse", "rabbit", "squirrel", "tiger"]
VERBS = ["chase", "eat", "like", "need", "see", "visit"]
ATTRIBUTES = [
    "big", "blue", "cold", "furry", "green", "kind", "nice", "quiet", "red", "rough", "round", "smart", "white",
    "young",
]  # fmt: skip
WORD = re.compile(r"\b(?:bald eagle|[A-Za-z]+)\b")
ANYTHING = ("something", "someone", "it", "they")
NAME = r"(?:[Tt]he )?(?:bald eagle|\w+)"
CLAUSE = re.compile(
    rf"(?P<subject>{NAME}) (?:(?:is|are) (?P<attributes>.+)|(?P<not>do(?:es)? not )?(?P<verb>\w+) (?P<object>{NAME}))"
)
ALL = re.compile(r"(?:All )?(?P<attributes>.+) (?:things|people) are (?P<conclusion>.+)")


class Literal(NamedTuple):
    """A statement, or a part of a rule: `subject` is `None` where it stands for anything."""

    subject: str | None
    verb: str  # "is", or a verb without its ending
    object: str  # an attribute, or a name
    holds: bool

    def about(self, name: str) -> Literal:
        """The literal with anything replaced by a name."""
        return self._replace(subject=name) if self.subject is None else self


class Theory(NamedTuple):
    """What a context says."""

    facts: list[Literal]
    rules: list[tuple[list[Literal], list[Literal]]]  # conditions, conclusions

    def names(self) -> list[str]:
        """Whom it speaks of."""
        literals = [*self.facts, *(literal for rule in self.rules for part in rule for literal in part)]
        named = {literal.subject for literal in literals} | {x.object for x in literals if x.verb != "is"}
        return sorted(name for name in named if name is not None)

    def grounded(self) -> list[tuple[list[Literal], list[Literal]]]:
        """The rules, each once for everybody it can be applied to: conditions, conclusions."""
        return [
            ([literal.about(name) for literal in conditions], [literal.about(name) for literal in conclusions])
            for conditions, conclusions in self.rules
            for name in (self.names() if any(literal.subject is None for literal in conditions) else [""])
        ]

    def closure(self) -> dict[Literal, int]:
        """Everything that follows, with the length of its shortest proof (0: a fact)."""
        depth = dict.fromkeys(self.facts, 0)
        grounded = self.grounded()
        for length in range(1, len(grounded) + 1):
            fired = [c for conditions, c in grounded if all(depth.get(x, length) < length for x in conditions)]
            new = {literal for conclusions in fired for literal in conclusions} - set(depth)
            if not new:
                break
            depth |= dict.fromkeys(new, length)
        return depth


def main(arguments: Sequence[str]) -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=5, help="how often each training theory comes")
    parser.add_argument("--statements", type=int, default=24, help="at most so many in a row")
    parser.add_argument("--beside", type=int, default=0, help="so many other statements in validation and test rows")
    parser.add_argument("--labels", type=Path, help="a result file: how often forward chaining and the file agree")
    parser.add_argument("--head", type=Path, help="a head to ask")
    parser.add_argument("--by_kind", type=Path, help="a result file: what it answers, by kind of statement")
    parsed = parser.parse_args(arguments)
    if (parsed.head is None) != (parsed.by_kind is None):
        parser.error("--head and --by_kind go together: a head, and the file for what it answers")
    rows, command = read_rows(parsed.data), shlex.join(["python", "results/theories.py", *arguments])
    if parsed.labels:
        write_results(parsed.labels, {**agreement(rows), **provenance(command, seed=0)})
    if parsed.by_kind:
        found = by_kind(HybridModel.from_pretrained(parsed.head), held_out(rows))
        write_results(parsed.by_kind, {"by_kind": found, **provenance(command, seed=0)})
    written = [row for row in rows if row["split"] == "dev"] + with_statements(rows, parsed.copies, parsed.statements)
    if parsed.beside:
        draw = random.Random(0)
        written = [row if row["split"] == "train" else asked_beside(row, parsed.beside, draw) for row in written]
    write_rows(parsed.output, written)
    print(f"{len(written)} rows")


def training_theories(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The theories of the file's training split."""
    return sorted({row["context"] for row in rows if row["split"] == "train"})


def held_out(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Those that are kept for validation."""
    return training_theories(rows)[::HOLD_OUT]


def with_statements(rows: Sequence[dict[str, Any]], copies: int, most: int) -> list[dict[str, Any]]:
    """Validation rows, and training rows in other words with several statements."""
    theories, kept, draw = training_theories(rows), set(held_out(rows)), random.Random(0)
    written = [row | {"split": "valid"} for row in rows if row["context"] in kept]
    for number, context in enumerate(theories):
        if context in kept:
            continue
        labelled = labels(parse(context))
        for copy in range(copies):
            size = 1 if draw.random() < SINGLE else draw.randint(2, most)
            deepest = draw.choice(sorted({depth for _, _, depth in labelled if depth is not None}))
            within = [entry for entry in labelled if entry[2] is None or entry[2] <= deepest]
            chosen = draw_statements(within, size, draw)
            exchanged, told = exchange(draw), in_another_order(context, draw)
            texts = [reworded(to_text(literal), exchanged) for literal, _, _ in chosen]
            row = {"id": f"{number}-{copy}", "split": "train", "context": reworded(told, exchanged)}
            row |= {"question": " ".join(texts), "depth": deepest}
            answers = [label for _, label, _ in chosen]
            written.append(row | as_fields(row["context"], texts, answers))
    return written


def asked_beside(row: dict[str, Any], number: int, draw: random.Random) -> dict[str, Any]:
    """A row of the file with so many other statements as fields that have no answer."""
    question = row["question"]
    others = [text for literal, _, _ in labels(parse(row["context"])) if (text := to_text(literal)) != question]
    texts = [question, *draw.sample(others, min(number, len(others)))]
    kept = {key: value for key, value in row.items() if key != "choices"} | {"question": " ".join(texts)}
    return kept | as_fields(row["context"], texts, [row["answer"]])


def as_fields(context: str, texts: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """One answer to one statement, or a field for each of several, at its last character: as JSON, in one column.

    The first statements have the answers; those beyond are asked without one.
    """
    if len(texts) == 1:
        return {"answer": answers[0], "choices": list(OPTIONS)}
    fields, text = [], context
    for statement in texts:
        text = one_text(text, statement)
        fields.append({"name": statement, "options": list(OPTIONS), "at": len(text) - 1})
    answer = json.dumps(dict(zip(texts[: len(answers)], answers, strict=True)))
    return {"fields": json.dumps(fields), "answer": answer}


def draw_statements(
    labelled: Sequence[tuple[Literal, str, int | None]], size: int, draw: random.Random
) -> list[tuple[Literal, str, int | None]]:
    """Different statements: each label as often as another, and each depth where there is one."""
    groups: dict[str, dict[int | None, list[tuple[Literal, str, int | None]]]] = defaultdict(lambda: defaultdict(list))
    for entry in labelled:
        groups[entry[1]][entry[2]].append(entry)
    chosen: dict[Literal, tuple[Literal, str, int | None]] = {}
    for _ in range(20 * size):
        by_depth = groups[draw.choice(sorted(groups))]
        entry = draw.choice(by_depth[draw.choice(sorted(by_depth, key=str))])
        chosen.setdefault(entry[0], entry)
        if len(chosen) == size:
            break
    return list(chosen.values())


def by_kind(model: HybridModel, contexts: Sequence[str]) -> list[dict[str, Any]]:
    """What a head answers of a statement of each kind about each theory, asked alone."""
    right, draw = defaultdict(list), random.Random(0)
    for context in contexts:
        theory = parse(context)
        concluded = {literal for rule in theory.grounded() for literal in rule[1]}
        kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for literal, label, depth in labels(theory):
            if depth is None:
                kind = "unknown, a rule ends so" if literal in concluded else "unknown, other"
            else:
                kind = {0: "fact", 1: "one inference"}.get(depth, "more inferences")
            kinds[kind].append((to_text(literal), label))
        for kind, statements in sorted(kinds.items()):
            statement, label = draw.choice(statements)
            right[kind].append(model.answer(statement, context=context, choices=list(OPTIONS)).value == label)
    return [{"kind": kind, **accuracy_row(torch.tensor(hits))} for kind, hits in sorted(right.items())]


def labels(theory: Theory) -> list[tuple[Literal, str, int | None]]:
    """Every statement in a theory's own words, whether it is true, and how long its proof is."""
    names, closure = theory.names(), theory.closure()
    literals = {*theory.facts, *(x for rule in theory.rules for part in rule for x in part)}
    attributes = sorted({x.object for x in literals if x.verb == "is"})
    verbs = sorted({x.verb for x in literals} - {"is"})
    said = [(name, "is", attribute) for name in names for attribute in attributes]
    said += [(name, verb, other) for name in names for verb in verbs for other in names if name != other]
    labelled = []
    for subject, verb, thing in said:
        for holds in (True, False):
            literal = Literal(subject, verb, thing, holds)
            labelled.append((literal, *judged(literal, closure)))
    return labelled


def judged(literal: Literal, closure: dict[Literal, int]) -> tuple[str, int | None]:
    """Whether a statement is true, given what follows, and how long the proof is that tells."""
    opposite = literal._replace(holds=not literal.holds)
    label = "True" if literal in closure else "False" if opposite in closure else "Unknown"
    return label, closure.get(literal, closure.get(opposite))


# -- text to literals, and back ------------------------------------------------------------------------------------


def parse(context: str) -> Theory:
    """Read the facts and rules of a context.

    Raises:
        ValueError: A sentence is none that ProofWriter writes.
    """
    facts, rules = [], []
    for sentence in sentences(context):
        if sentence.startswith("If "):
            conditions, conclusions = sentence.removeprefix("If ").split(" then ")
            rules.append((clauses(conditions), clauses(conclusions)))
        elif match := ALL.fullmatch(sentence):
            conditions = [attribute(None, each) for each in conjuncts(match["attributes"].lower())]
            rules.append((conditions, [attribute(None, each) for each in conjuncts(match["conclusion"])]))
        else:
            facts += clauses(sentence)
    return Theory(facts, rules)


def sentences(context: str) -> list[str]:
    """The sentences of a context, without their full stops."""
    return re.split(r"\.\s*", context.strip())[:-1]


def clauses(text: str) -> list[Literal]:
    """Read `something is round and not young and it sees the cat`."""
    found: list[Literal] = []
    parts = re.split(rf" and (?=(?:{NAME}) (?:is|are|does|do|\w+s|{'|'.join(VERBS)})\b)", text)
    for part in parts:
        if not (match := CLAUSE.fullmatch(part)):
            raise ValueError(f"{part!r} is no clause that is known here")
        subject = bare(match["subject"])
        if match["attributes"]:
            found += [attribute(subject, each) for each in conjuncts(match["attributes"])]
        else:
            found.append(Literal(subject, base(match["verb"]), str(bare(match["object"])), not match["not"]))
    return found


def conjuncts(text: str) -> list[str]:
    """`red and not young` as two."""
    return re.split(r" and |, ", text)


def attribute(subject: str | None, text: str) -> Literal:
    """`not young`, said of somebody."""
    return Literal(subject, "is", text.removeprefix("not "), not text.startswith("not "))


def bare(name: str) -> str | None:
    """A name without its article; `None` for something."""
    name = re.sub(r"^[Tt]he ", "", name)
    return None if name.lower() in ANYTHING else name


def base(verb: str) -> str:
    """A verb without its ending."""
    return verb if verb in VERBS else verb.removesuffix("s")


def to_text(literal: Literal) -> str:
    """The statement in words."""
    subject, thing = (f"the {x}" if x in ANIMALS else x for x in (str(literal.subject), literal.object))
    if literal.verb == "is":
        predicate = f"is {'' if literal.holds else 'not '}{literal.object}"
    else:
        predicate = f"{literal.verb}s {thing}" if literal.holds else f"does not {literal.verb} {thing}"
    return f"{subject[0].upper()}{subject[1:]} {predicate}."


# -- other words ---------------------------------------------------------------------------------------------------


def exchange(draw: random.Random) -> dict[str, str]:
    """Every name, attribute and verb, and another of its kind for it."""
    exchanged: dict[str, str] = {}
    for words in (PEOPLE, ANIMALS, ATTRIBUTES, VERBS):
        exchanged |= zip(words, draw.sample(words, len(words)), strict=True)
    exchanged |= {f"{verb}s": f"{exchanged[verb]}s" for verb in VERBS}
    return exchanged


def reworded(text: str, exchanged: dict[str, str]) -> str:
    """The text with words exchanged; a capital stays where it was."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        new = exchanged.get(word) or exchanged.get(word.lower()) or exchanged.get(word.capitalize()) or word
        return (new[0].upper() if word[0].isupper() else new[0].lower()) + new[1:]

    return WORD.sub(other, text)


def in_another_order(context: str, draw: random.Random) -> str:
    """Facts first, then rules, as in the original, each in any order."""
    told: dict[bool, list[str]] = {False: [], True: []}
    for sentence in sentences(context):
        told[sentence.startswith("If ") or bool(ALL.fullmatch(sentence))].append(f"{sentence}.")
    return " ".join(sentence for part in told.values() for sentence in draw.sample(part, len(part)))


def agreement(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How often forward chaining gives the answer, and the proof depth, of the file."""
    counts: Counter[str] = Counter()
    for row in rows:
        [statement] = clauses(row["question"].removesuffix("."))
        label, depth = judged(statement, parse(row["context"]).closure())
        counts["rows"] += 1
        counts["answers"] += label == row["answer"]
        counts["depths"] += depth == row["depth"]
    return {"agreement": dict(counts)}


if __name__ == "__main__":
    main(sys.argv[1:])
