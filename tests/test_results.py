"""The scripts behind the result files, on questions small enough to check by hand."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import CHOICES, tiny_run
from test_training import write_data
from torch import nn

from hybrid.backbone import load_backbone
from hybrid.cli import run_config
from hybrid.config import BackboneConfig, DataConfig, TextConfig, to_plain
from hybrid.data import load_examples
from hybrid.model import HybridModel

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))

import ablations
import chains
import counts
import knights
import prontoqa_shortcut
import puzzles
import render
import stories
import theories
import trm
import written
from prontoqa_shortcut import by_rule, facts, harder, with_facts

CONTEXT = (
    "Numpuses are not wooden. Each yumpus is wooden. Shumpuses are numpuses. A vumpus is a shumpus. Max is a vumpus."
)


@pytest.mark.parametrize(("asked", "answer"), [("Max is not wooden.", "True"), ("Max is wooden.", "False")])
def test_one_look_back_answers_prontoqa_until_the_distractor_is_mentioned(asked, answer):
    row = {"context": CONTEXT, "question": f"True or false: {asked}", "answer": answer}
    assert by_rule(row) == answer
    new = harder(row, random.Random(0))
    assert by_rule(new) is None and new["answer"] == answer
    added = set(facts(new["context"])) - set(facts(CONTEXT))
    assert set(facts(CONTEXT)) < set(facts(new["context"])) and new["context"].endswith("Max is a vumpus.")
    subjects, predicates = {subject for subject, *_ in added}, {predicate for *_, predicate in added}
    assert "yumpus" in predicates and not subjects & {"vumpus", "shumpus", "numpus", "max"}  # nobody is any of them
    assert not predicates & {"vumpus", "shumpus", "numpus"}


def test_facts_of_a_story_are_fields_beside_its_answer():
    row = {"context": CONTEXT, "question": "True or false: Max is not wooden.", "answer": "True", "steps": ["…"]}
    concepts = {"numpus": "True", "shumpus": "True", "vumpus": "True", "yumpus": "False"}
    assert with_facts(row, properties=False)["answer"] == {"answer": "True", **concepts}
    new = with_facts(row, properties=True)
    assert new["answer"] == {"answer": "True", **concepts, "wooden": "False"} and "steps" not in new
    assert new["fields"] == list(new["answer"])


def test_copies_of_a_story_have_other_concepts_and_the_same_answer():
    def row(split: str, number: int) -> dict[str, Any]:
        name, question = f"{split}-{number}", "True or false: Max is not wooden."
        texts = {"context": f"{CONTEXT} An impus is {number}.", "question": question}
        return {"id": name, "split": split, "depth": 2, **texts, "answer": "True", "choices": [], "steps": ["…"]}

    rows = [row(split, number) for split in ("train", "train_nodistractor") for number in range(103)]
    found = prontoqa_shortcut.mixed(rows, deepest=2, num_rows=2, num_easy=1, num_copies=3)
    counts = Counter((new["split"], new["depth"]) for new in found)
    assert counts == {("train", 2): 6, ("valid", 2): 100, ("train", 12): 3, ("valid", 12): 100}
    assert not any("steps" in new for new in found) and len({new["id"] for new in found}) == len(found)
    for new in found:
        assert by_rule(new) == new["answer"] == "True"  # as the rule says of the story that it is a copy of
        assert (CONTEXT in new["context"]) == ("+" not in new["id"])
        words = new["context"].lower().split()
        assert all(after[0] in "aeiou" for article, after in pairwise(words) if article == "an")
        assert all(after[0] not in "aeiou" for article, after in pairwise(words) if article == "a")
    other = {"context": "Rex is sour.", "question": "True or false: Rex is a vumpus."}
    kinds = [
        sorted(prontoqa_shortcut.CONCEPTS),
        *prontoqa_shortcut.names_and_properties(
            [{"context": CONTEXT, "question": "True or false: Max is not wooden."}, other]
        ),
    ]
    assert kinds[1:] == [["max", "rex"], ["sour", "wooden"]]
    told = {prontoqa_shortcut.reworded(row("train", 0), kinds, random.Random(n))["question"] for n in range(20)}
    assert told == {f"True or false: {name} is not {what}." for name in ("Max", "Rex") for what in ("sour", "wooden")}


def test_agents_between_are_fields_that_are_due_after_so_many_sentences():
    def row(split: str, depth: int, context: str, asked: str, answer: str) -> dict[str, Any]:
        question = f"What is the relation of the agent {asked[0]} to the agent {asked[1]}?"
        choices = list(chains.DIRECTIONS)
        return {
            "split": split, "depth": depth, "context": context, "question": question, "answer": answer,
            "choices": choices,
        }  # fmt: skip

    told = [
        row("train", 1, "A is over B.", "AB", "above"),
        row("train", 1, "C is left of D.", "DC", "right"),
        row("train", 2, "X is over Y. Z is left of X.", "ZY", "upper-left"),
        row("train", 2, "X is over Y. Z is left of X.", "ZY", "right"),  # not what the sentences say
        row("valid", 2, "X is over Y. Z is left of X.", "YZ", "lower-right"),
    ]
    [one, two, valid] = chains.distances(told)
    assert (one["depth"], one["sentences"], two["sentences"]) == (1, {"1": 2}, {"2": 2})
    assert (one["follows"], two["follows"]) == (2, 1)
    assert (valid["split"], valid["sentences"]) == ("valid", {"2": 1})
    (*_, two, wrong, valid), unknown = chains.stepgame(told)
    assert unknown == 1 and wrong["answer"] == {"Z": "right"} and wrong["due"] == {}
    assert two["fields"] == ["Z", "X"] and two["answer"] == {"Z": "upper-left", "X": "above"}
    assert two["due"] == {"Z": 2, "X": 1} and two["choices"][-1] == "unknown"
    assert valid["fields"] == ["Y", "X"] and valid["answer"] == {"Y": "lower-right"} and valid["due"] == {}
    answers = SimpleNamespace(
        answer=lambda *_, fields, **__: SimpleNamespace(value=dict.fromkeys(fields, "lower-right"))
    )
    [asked] = chains.by_distance(answers, told, [valid | {"depth": 5}])
    assert (asked["depth"], asked["sentences"], asked["n"], asked["accuracy"]) == (5, 2, 1, 1.0)
    copied, _ = chains.stepgame(told, copies=3)
    assert len(copied) == 4 * 3 + 1 and copied[-1] == valid and len({row["context"] for row in copied[6:9]}) == 3
    for row in copied[6:9]:  # other letters, the same story
        asked, origin = chains.AGENT.findall(row["question"])
        places = chains.positions(row["context"], origin, chains.patterns(told))
        assert places[asked] == (-1, 1, 2) and list(row["answer"].values()) == ["upper-left", "above"]
        assert list(row["answer"]) == list(row["due"]) == row["fields"] and row["fields"][0] == asked
    beside, _ = chains.stepgame(told, copies=40, add_stories=True)
    says, of_two, shared = chains.patterns(told), beside[2 * 40 : 3 * 40], Counter()
    assert beside[-1] == valid and all(row["context"].count(". ") == 1 for row in of_two[::2])
    assert all(
        "due" not in row or row["due"] == {} for row in beside[3 * 40 : 4 * 40]
    )  # which its sentences do not tell
    for row in of_two[1::2]:
        _, origin = chains.AGENT.findall(row["question"])
        places = chains.positions(row["context"], origin, says)
        assert places.keys() == {*row["fields"], origin} and row["context"].count(". ") > 1
        assert row["answer"] == {
            agent: chains.BY_DIRECTION[tuple(map(chains.sign, places[agent][:2]))] for agent in row["fields"]
        }
        assert (
            row["due"] == {agent: places[agent][2] for agent in row["fields"]}
            and max(row["due"].values()) == row["depth"]
        )
        shared[len(places) == len(set(chains.AGENT.findall(row["context"])))] += 1
    assert 5 < shared[True] < 15  # the other story has one of its agents, or none


def told(split: str, context: str, asked: str, link: str, answer: str) -> dict[str, Any]:
    asked, origin = asked.split()
    question = f"What is {asked}'s family relation to {origin}?"
    return {
        "id": context[:3], "split": split, "depth": link.count("-") + 1 - link.count("-in-law") * 2, "f_comb": link,
        "context": context, "question": question, "answer": answer, "choices": ["son", "grandson", "mother-in-law"],
    }  # fmt: skip


SONS = "Al has a son Bo. Bo has a son Cy.", "Cy Al", "son-son", "grandson"


def test_people_between_are_fields(monkeypatch):
    monkeypatch.setattr(chains, "NUM_JOINED", ((0, 0), (0, 0)))
    in_law = "Di has a son Ed. Flo is the mother-in-law of Ed.", "Flo Di", "son-mother-in-law", "mother-in-law"
    three = "Gus has a son Hal. Hal has a son Ian. Ian has a son Jo.", "Jo Gus", "son-son-son", "grandson"
    named = [told("test", "", pair, "son", "son") for pair in ("Bo Ed", "Hal Ian")]  # somebody is asked about them
    rows, unknown = chains.clutrr([told("train", *SONS), told("train", *in_law), told("train", *three), *named])
    rows = rows[:3]
    assert unknown == 0 and [row["split"] for row in rows] == ["valid", "train", "train"]
    assert rows[1]["answer"] == {"Flo": "mother-in-law", "Ed": "son"} and rows[1]["due"] == {"Ed": 1, "Flo": 2}
    assert rows[2]["answer"] == {"Jo": "grandson", "Hal": "son", "Ian": "grandson"}
    assert rows[2]["due"] == {"Hal": 1, "Ian": 2, "Jo": 3} and rows[2]["choices"][-2:] == ["wife", "unknown"]
    stories = [told("train", *SONS), told("train", "Gus, Hal, Ian, Jo.", *three[1:]), *named]
    unordered = chains.clutrr(stories)[0][1]
    assert unordered["answer"] == {"Jo": "grandson"} and unordered["fields"] == ["Jo", "Hal", "Ian"]
    test = chains.clutrr([told("test", *SONS), *named])[0][0]
    assert test["answer"] == {"Cy": "grandson"} and test["fields"] == ["Cy", "Bo"]


def test_stories_are_joined_at_a_person_of_the_same_gender():
    def story(origin: str, between: str, asked: str, split: str) -> dict[str, Any]:
        row = told(
            split, f"{origin} has a son {between}. {between} has a son {asked}.", f"{asked} {origin}", *SONS[2:]
        )
        answers, due = {asked: "grandson", between: "son"}, {between: 1, asked: 2}
        return row | {"fields": [asked, between], "answer": answers, "due": due}

    gender = dict.fromkeys(("Al", "Bo", "Cy", "Gus", "Hal", "Ian", "Kim"), False) | {"Flo": True}
    composed = {("grandson", "grandson"): Counter(["nephew"])}
    for split in ("train", "valid"):
        stories = [story("Al", "Bo", "Cy", split), story("Gus", "Bo", "Hal", split)]
        [row] = chains.joined(stories, stories, composed, gender, 1, random.Random(1))
        near, far = stories if "relation to Al" in row["question"] else reversed(stories)
        asked, middle, between, other = row["fields"]
        assert (middle, between, asked) == (*near["fields"], far["fields"][0])
        assert other not in ("Bo", "Flo", "Al", "Gus", "Cy", "Hal")  # the second Bo has another name
        assert f"{middle} has a son {other}. {other} has a son {asked}." in row["context"] and row["depth"] == 4
        assert near["context"] in row["context"] and row["due"] == {"Bo": 1, middle: 2, asked: 4}
        answers = {middle: "grandson", "Bo": "son", asked: "nephew"}
        assert row["answer"] == (answers if split == "train" else {asked: "nephew"})


def test_people_get_names_that_validation_does_not_share():
    row = told("train", *SONS) | {"fields": ["Cy", "Bo"], "answer": {"Cy": "grandson", "Bo": "son"}, "due": {"Bo": 1}}
    names, gender = {"train": set(), "valid": set()}, {"Al": False, "Bo": False, "Cy": True}
    for seed in range(200):
        for split in names:
            new = chains.with_names(row | {"split": split}, gender, random.Random(seed))
            cy, bo = new["fields"]
            ((asked, al),) = chains.PAIR.findall(new["question"])
            assert (asked, len({al, bo, cy})) == (cy, 3)
            assert new["context"] == f"{al} has a son {bo}. {bo} has a son {cy}."
            assert new["answer"] == {cy: "grandson", bo: "son"} and new["due"] == {bo: 1}
            assert cy in chains.FEMALE_NAMES and {al, bo} <= set(chains.MALE_NAMES)
            names[split] |= {al, bo, cy}
    assert not names["train"] & names["valid"] and len(names["valid"]) > 40


def test_stories_are_renamed_and_joined_as_often_as_asked(monkeypatch):
    monkeypatch.setattr(chains, "NUM_SHUFFLED", ((1, 1), (0, 0)))
    stories = [told("train", *SONS)]  # held out, being the first
    for a, b, c in (("Gus", "Hal", "Ian"), ("Kim", "Leo", "Max"), ("Ned", "Oz", "Pat")):
        stories.append(told("train", f"{a} has a son {b}. {b} has a son {c}.", f"{c} {a}", "son-son", "grandson"))
        stories.append(told("train", "", f"{a} Cy", "brother-son", "nephew"))  # so that the origins are men
    stories.append(told("train", "", "Cy Al", "grandson-grandson", "grandson"))
    stories.append(told("test", *SONS))
    rows, _ = chains.clutrr(stories, shuffled=True, renamed=True, num_joined=(5, 2))
    counts = Counter(row["id"].count("+") for row in rows if row["split"] == "train")
    assert (counts[1], counts[2]) == (5, 2)
    names = {*chains.MALE_NAMES, *chains.FEMALE_NAMES}
    for row in rows:
        ((asked, origin),) = chains.PAIR.findall(row["question"])
        given = {asked, origin, *row["fields"], *row["answer"]}
        assert given <= (names if row["split"] != "test" else {"Al", "Bo", "Cy"})
        assert not {"Gus", "Kim", "Ned"} & set(chains.NAME.findall(row["context"]))


def test_names_alone_answer_what_training_says_of_the_pair():
    rows = [told("train", *SONS), told("test", *SONS), told("test", "", "Al Cy", "son-son", "grandson")]
    found = chains.by_names(rows)
    [row] = found["names_alone"]
    assert (found["train_questions"], found["train_pairs"], row["n"], row["accuracy"]) == (1, 1, 2, 0.5)


def test_generated_puzzles_are_written_with_published_ones(tmp_path):
    pytest.importorskip("reasoning_gym")
    fields = [{"name": "Ann", "options": ["knight", "knave"]}]
    published = [
        {"id": f"{split}-{depth}", "split": split, "depth": depth, "context": "Ann is there.", "question": "Who?",
         "fields": fields, "answer": {"Ann": "knight"}}
        for split, depth in (("train", 2), ("train", 7), ("test", 2))
    ]  # fmt: skip
    (tmp_path / "published.jsonl").write_text("".join(json.dumps(row) + "\n" for row in published))
    config = str(Path(__file__).parent.parent / "configs" / "islanders_smollm2.yaml")
    out, flags = str(tmp_path / "rows.jsonl"), ["--data.max_train_examples", "5", "--data.max_eval_examples", "5"]
    puzzles.main([config, "--output", out, "--published", str(tmp_path / "published.jsonl"), *flags])
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [row["id"] for row in rows[-2:]] == ["train-2+0", "train-2+1"] and len(rows) == 17
    generated = load_examples(run_config([config, *flags], "train")[0].data, "train")
    again = load_examples(
        run_config([config, "--data.path", out, "--data.max_train_examples", "99"], "train")[0].data, "train"
    )
    assert [(row.fields, row.answers) for row in again[:5]] == [(row.fields, row.answers) for row in generated]


def test_a_puzzle_has_the_one_solution_that_its_words_have(tmp_path, monkeypatch):
    monkeypatch.setattr(knights, "GROUPS", dict.fromkeys(knights.GROUPS, (2, 20)))
    published = [
        {"id": f"{split}-{size}-{number}", "split": split, "depth": size, "context": "", "question": "Who?",
         "fields": [], "answer": dict.fromkeys("Ann Bo Cy Di Ed Flo Gus Hal".split()[:size], "knight")}
        for split, size, number in product(("train", "test"), (2, 6, 8), range(10))
    ]  # fmt: skip
    (tmp_path / "published.jsonl").write_text("".join(json.dumps(row) + "\n" for row in published))
    out = str(tmp_path / "rows.jsonl")
    knights.main([str(tmp_path / "published.jsonl"), "--output", out])
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    found = Counter((row["split"], row["depth"], row["id"].startswith("generated")) for row in rows)
    assert found["test", 8, False] == 10 and found["valid", 8, False] == 1 and found["train", 8, False] == 0
    assert found["train", 2, False] == 9 and found["train", 6, True] == 40

    atom = r"(\w+) is (not )?a (knight|knave)"
    told = re.compile(rf"([Ii]f )?{atom}(?:( if and only if | and | or | then ){atom})?")
    joins = {
        " and ": min,
        " or ": max,
        " then ": lambda a, b: b if a else True,
        " if and only if ": lambda a, b: a == b,
    }
    for row in [row for row in rows if row["id"].startswith("generated")]:
        listed, told_of_them = row["context"].split("inhabitants: ")[1].split(". ", 1)
        people, sentences = re.findall(r"[A-Z]\w+", listed), re.findall(r'\S.*?\.["]?(?=\s|$)', told_of_them)
        assert row["depth"] == len(row["answer"]) == len(sentences) and list(row["answer"]) == people
        fitting = []
        for kinds in product((True, False), repeat=len(people)):
            is_knight = dict(zip(people, kinds, strict=True))
            fits = []
            for statement in sentences:
                [(_, first, no, kind, join, second, also_no, other)] = told.findall(statement)
                [speaker] = set(re.findall(r"[A-Z]\w+", told.sub("", statement))) & set(people)
                truths = [(is_knight[first] == (kind == "knight")) != bool(no)]
                if join:
                    truths.append((is_knight[second] == (other == "knight")) != bool(also_no))
                fits.append(is_knight[speaker] == (joins[join](*truths) if join else truths[0]))
            fitting += [{name: "knight" if is_knight[name] else "knave" for name in row["answer"]}] * all(fits)
        assert fitting == [row["answer"]]

    assert found["valid", 0, False] > 100
    alone = [row for row in rows if "statement" in row["id"]]
    assert {row["depth"] for row in alone} == {0} and len({row["answer"]["the form"] for row in alone}) == 6
    for row in alone:
        words = row["context"].split(". ")[3]
        [(begin, first, no, kind, join, second, _, other)] = told.findall(words)
        answer, named = row["answer"], {first: f"a {kind} in the first place"}
        if join:
            named[second] = f"a {other} in the second place"
        assert {name: how for name, how in answer.items() if how in knights.NAMED[1:]} == named
        assert answer.pop("the form") == f"{begin.lower()}{join.strip() or ('is not' if no else 'is')}"
        assert answer.pop("the speaker") in set(re.findall(r"[A-Z]\w+", told.sub("", words))) & set(answer)


def test_passages_are_told_in_any_order(monkeypatch):
    first = "Al took his son Bo fishing. They caught nothing. His sister Cy had more luck!"
    second = "Bo met Di at the lake. He likes Di."
    assert chains.passages(f"{first} {second}") == [first, second]
    monkeypatch.setattr(chains, "NUM_SHUFFLED", ((6, 4), (0, 0)))
    monkeypatch.setattr(chains, "HOLD_OUT", 100)
    stories = [told("train", "", "Cy Al", "grandson-grandson", "grandson")]  # held out, being the first
    for a, b, c in (("Gus", "Hal", "Ian"), ("Kim", "Leo", "Max"), ("Ned", "Oz", "Pat")):
        stories.append(told("train", f"{a} has a son {b}. {b} has a son {c}.", f"{c} {a}", "son-son", "grandson"))
        stories.append(told("train", "", f"{a} Al", "brother-son", "nephew"))  # so that the origins are men
        stories.append(told("test", "", f"{b} Al", "son", "son"))  # somebody is asked about those between
    rows = [row for row in chains.clutrr(stories, shuffled=True)[0] if "+" in row["id"]]
    assert [row["depth"] for row in rows] == [4] * 6 + [6] * 4
    in_order = 0
    for row in rows:
        pairs = [tuple(chains.NAME.findall(passage)) for passage in chains.passages(row["context"])]
        chain = dict(pairs)  # each has a son
        person, found = row["question"].split()[-1].rstrip("?"), []
        while person in chain:
            found.append((person, chain[person]))
            person = chain[person]
        assert len(pairs) == row["depth"] and sorted(found) == sorted(pairs) and found[-1][1] == row["fields"][0]
        in_order += found == pairs
    assert in_order < len(rows)


THEORY = (
    "Anne is not kind. Bob sees the cat. The cat is round. All round, young things are red. If something is round "
    "then it is young and the cat sees Bob. If someone sees the cat and they are not kind then they do not like Anne. "
    "If the cat is red and the cat is not kind then the cat visits Bob. If something is red and young then it is kind."
)


def test_what_follows_from_a_theory():
    theory = theories.parse(THEORY)
    assert theory.names() == ["Anne", "Bob", "cat"] and len(theory.facts) == 3 and len(theory.rules) == 5
    told = {theories.to_text(literal): depth for literal, depth in theory.closure().items()}
    assert told == {
        "Anne is not kind.": 0, "Bob sees the cat.": 0, "The cat is round.": 0, "The cat is young.": 1,
        "The cat sees Bob.": 1, "The cat is red.": 2, "The cat is kind.": 3,
    }  # fmt: skip
    assert all(theories.clauses(text.removesuffix("."))[0] in theory.closure() for text in told)
    found = {theories.to_text(literal): (label, depth) for literal, label, depth in theories.labels(theory)}
    assert found["Anne is kind."] == ("False", 0) and found["The cat is not red."] == ("False", 2)
    assert found["Bob does not like Anne."] == found["The cat visits Bob."] == ("Unknown", None)
    with pytest.raises(ValueError, match="'Anne' is no clause"):
        theories.parse("Anne.")


def test_a_head_is_asked_about_theories_by_kind_of_statement():
    asked = []

    def answer(statement: str, context: str, choices: list[str]) -> SimpleNamespace:
        asked.append((statement, context, choices))
        return SimpleNamespace(value="Unknown")

    rows = theories.by_kind(SimpleNamespace(answer=answer), [THEORY])
    labels = {"fact": 0, "more inferences": 0, "one inference": 0, "unknown, a rule ends so": 1, "unknown, other": 1}
    assert {row["kind"]: row["accuracy"] for row in rows} == labels and {row["n"] for row in rows} == {1}
    assert all(question[1:] == (THEORY, ["True", "False", "Unknown"]) for question in asked)
    of_kind = dict(zip(labels, (statement for statement, *_ in asked), strict=True))
    assert of_kind["fact"] in {
        "Anne is kind.", "Anne is not kind.", "Bob sees the cat.", "Bob does not see the cat.", "The cat is round.",
        "The cat is not round.",
    }  # fmt: skip
    assert re.fullmatch(r"The cat (is (not )?young|sees Bob|does not see Bob)\.", of_kind["one inference"])
    ends = {
        "Anne is young.", "Bob is young.", "Anne is red.", "Bob is red.", "Bob is kind.", "The cat visits Bob.",
        "Bob does not like Anne.", "The cat does not like Anne.",
    }  # fmt: skip
    assert of_kind["unknown, a rule ends so"] in ends and of_kind["unknown, other"] not in ends


def test_statements_about_theories_in_other_words(tmp_path):
    question = {"split": "train", "question": "The cat is red.", "answer": "True", "depth": 2}
    rows = [{**question, "context": THEORY.replace("Anne", name)} for name in theories.PEOPLE[2:]]
    rows.append({**question, "context": THEORY, "split": "dev"})
    source, output, labels = tmp_path / "rows.jsonl", tmp_path / "theories.jsonl", tmp_path / "labels.json"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    theories.main([str(source), "--output", str(output), "--copies", "4", "--labels", str(labels)])
    assert json.loads(labels.read_text())["agreement"] == {"rows": 7, "answers": 7, "depths": 7}
    config = DataConfig(path=str(output), choices=list(theories.OPTIONS), answer_at=-1, test_split="dev")
    assert [example.context for example in load_examples(config, "test")] == [THEORY]
    assert len(load_examples(config, "valid")) == 1
    examples, spare = load_examples(config, "train"), []
    assert len(examples) == 20 and len({len(example.fields) for example in examples}) > 2
    for example in examples:
        theory, text = theories.parse(example.context), f"{example.context} {example.question}"
        assert len(theory.rules) == 5 and len(theory.closure()) == 7  # other words, the same logic
        labelled = {theories.to_text(literal): (label, depth) for literal, label, depth in theories.labels(theory)}
        deepest = 0
        for field, answer in example.answered:
            statement = example.question if len(example.fields) == 1 else field.name
            label, depth = labelled[statement]
            assert label == answer and (depth or 0) <= example.depth <= 3
            assert len(example.fields) == 1 or text[: field.at + 1].endswith(statement)
            deepest = max(deepest, depth or 0)
        spare.append(example.depth - deepest)
    assert any(spare)  # a row's depth is the one that was drawn
    theories.main([str(source), "--output", str(output), "--copies", "4", "--beside", "3"])
    for [asked] in (load_examples(config, "test"), load_examples(config, "valid")):
        assert len({field.name for field in asked.fields}) == 4 and asked.question.startswith("The cat is red. ")
        assert [(field.name, answer) for field, answer in asked.answered] == [("The cat is red.", "True")]


def test_stories_in_other_words(monkeypatch):
    def row(task: int, context: str, question: str, answer: str, split: str = "train") -> dict[str, Any]:
        return {"split": split, "task": task, "context": context, "question": question, "answer": answer}

    told = [
        row(19, "The office is east of the hallway. The kitchen is north of the office. The garden is west of the hall"
            "way. The garden is south of the bedroom.", "How do you go from the hallway to the kitchen?", "e,n"),
        row(15, "Mice are afraid of wolves. Emily is a mouse. Winona is a wolf.", "What is emily afraid of?", "wolf"),
        row(11, "Mary went to the garden. Then she went to the park. John is there. Sandra left.", "Where is Mary?",
            "park"),
        row(20, "Jason is thirsty. Yann went to the garden.", "Where will jason go?", "kitchen"),
        row(1, "Mary is in the park.", "Where is Mary?", "park", split="test"),
    ]  # fmt: skip
    rows = stories.in_other_words(told, copies=40)
    assert rows[-1] == told[-1] and len(rows) == 4 * 40 + 1 and [rows[40 * n] for n in range(4)] == told[:4]
    assert len({way["answer"] for way in rows[:40]}) == 8  # two ways, turned and mirrored
    for way in rows[:40]:
        said = re.findall(r"The (\w+) is (\w+) of the (\w+)", way["context"])
        (office, first, hallway), (kitchen, second, nearer) = said[:2]
        assert office == nearer and way["question"] == f"How do you go from the {hallway} to the {kitchen}?"
        assert way["answer"] == f"{first[0]},{second[0]}"
    for animals in rows[40:80]:
        plural = dict((other, form) for kind in stories.KINDS for form, *rest in kind for other in rest)
        first, second = re.findall(r"(\w+) are afraid of (\w+)", animals["context"])[0]
        who = animals["question"].split()[2]
        assert f"{who.capitalize()} is a {plural[first.lower()]}." in animals["context"]
        assert animals["answer"] == plural[second]
    assert all(people["context"].split()[0] in ("Mary", "Sandra") for people in rows[80:120])  # she
    assert all(motive["answer"] == "kitchen" and "garden" in motive["context"] for motive in rows[120:160])
    assert {motive["question"] for motive in rows[120:160]} == {"Where will jason go?", "Where will yann go?"}
    monkeypatch.setattr(stories, "HOLD_OUT", 1)
    assert {row["split"] for row in stories.in_other_words(told, copies=3)} == {"valid", "test"}
    monkeypatch.setattr(stories, "HOLD_OUT", 100)
    again = stories.in_other_words([told[2], told[4], told[2] | {"split": "test"}], copies=3)
    assert [row["split"] for row in again] == ["train"] * 3 + ["test"] and again[-1] == told[4]


def test_what_the_sets_hold_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(stories, "HOLD_OUT", 100)
    park = {"task": 1, "context": "Mary is in the park.", "question": "Where is Mary?", "answer": "park"}
    rows = [park | {"split": "train"}, park | {"split": "test"}, park | {"split": "test", "question": "Who?"}]
    found = counts.asked_again(rows)
    assert found == dict.fromkeys(("as it is", "in other words"), {"all": 1, "1": 1})
    assert counts.distinct(rows) == {" Mary is in the park.", " Where is Mary?", " Who?"}
    said = [
        ("Anne is red.", "True"),
        ("Bob is red.", "True"),
        ("Bob is big.", "Unknown"),
        ("Bob is not big.", "False"),
    ]
    polarity = counts.by_polarity([{"question": question, "answer": answer} for question, answer in said])
    assert polarity == {"n": 4, "right": 3, "accuracy": 0.75}
    for file in ("stepgame_clean", "babi_en", "proofwriter_d5"):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    theory = {"split": "train", "context": THEORY, "question": "The cat is red.", "answer": "True"}
    (tmp_path / "proofwriter_d5.jsonl").write_text(json.dumps(theory) + "\n")
    asked = [{"split": "test", "depth": 3, "answer": answer} for answer in ("son", "son-in-law")]
    (tmp_path / "clutrr_089907f8.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    monkeypatch.setattr(knights, "GROUPS", {2: (1, 1)})
    puzzle = {
        "depth": 2,
        "context": "Al and Bo. Al said that Bo lies.",
        "answer": dict.fromkeys("Al Bo Cy Di Ed".split()),
    }
    puzzles = [puzzle | {"id": split, "split": split} for split in ("train", "test")]
    (tmp_path / "knights_knaves.jsonl").write_text("".join(json.dumps(row) + "\n" for row in puzzles))
    counts.main([str(tmp_path), "--output", str(tmp_path / "counts.json")])
    written = json.loads((tmp_path / "counts.json").read_text())
    assert written["sentences"] == {"stepgame": 3, "babi": 3, "proofwriter": 9}
    found = {name: count for name, count in written["knights_test_said_in_training"].items() if "test" in name}
    assert found == dict(zip(found, (1, 1, 2, 2), strict=True))
    assert written["clutrr_test_in_laws"] == {"n": 2, "by_hops": {"3": 1}}
    assert written["proofwriter_validation_by_polarity"] == {"n": 1, "right": 1, "accuracy": 1.0}


def test_rows_with_and_without_distractors_are_mixed_and_held_out_by_depth(monkeypatch):
    monkeypatch.setattr(prontoqa_shortcut, "NUM_HELD_OUT", 2)
    rows = [
        {"id": f"{split} {depth} {n}", "split": split, "depth": depth, "steps": []}
        for split in ("train", "train_nodistractor", "test") for depth in (1, 2, 3) for n in range(5)
    ]  # fmt: skip
    found = prontoqa_shortcut.mixed(rows, deepest=2, num_rows=3, num_easy=1, num_copies=1)
    counts = Counter((row["split"], row["depth"]) for row in found)
    assert counts == {("train", 1): 3, ("train", 2): 3, ("train", 11): 1, ("train", 12): 1} | {
        ("valid", depth): 2 for depth in (1, 2, 11, 12)
    }
    assert len({row["id"] for row in found}) == len(found) and not any("steps" in row for row in found)


def test_an_untrained_text_decoder_writes_and_expects_what_the_model_does(backbone_folder, tmp_path, monkeypatch):
    write_data(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace('"split": "test"', '"split": "hard"'))
    config = tiny_run(tmp_path, text=TextConfig(enabled=True))
    config.backbone = BackboneConfig(name_or_path=str(backbone_folder), layers=[0, 1, 2], dtype="float32")
    model = HybridModel.from_backbone(
        load_backbone(config.backbone),
        backbone_config=config.backbone,
        reasoner=config.reasoner,
        text=config.text,
        choices=CHOICES,
    )
    model.save_pretrained(tmp_path / "head")
    (tmp_path / "head" / "run.yaml").write_text(yaml.safe_dump(to_plain(config)))
    for name, value in {"NUM_PASSAGES": 3, "PASSAGE": 120}.items():
        monkeypatch.setattr(written, name, value)
    flags = {"max_examples": 6, "split": "hard", "output": tmp_path / "out" / "written.json"}
    written.main([str(tmp_path / "head"), *(f"--{name}={value}" for name, value in flags.items())])
    results = json.loads((tmp_path / "out" / "written.json").read_text())
    frozen, steered = results["exact_match"]
    assert frozen["examples"] == steered["examples"] and steered["accuracy_by_depth"][-1]["n"] == 6
    assert results["unrelated"]["n"] == 3 and results["unrelated"]["change"] == 0.0


class Reference(nn.Module):
    """Calls as the reference code's loss head has them: each cell becomes what is most often there."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 6))

    def initial_carry(self, batch: dict[str, torch.Tensor]) -> int:
        return 0

    def forward(self, carry: int, batch: dict[str, torch.Tensor], return_keys: list[str]) -> tuple[Any, ...]:
        logits = self.table[batch["inputs"]]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        right = logits.argmax(-1) == batch["labels"]
        metrics = {"count": torch.tensor(len(right)), "lm_loss": loss.detach()}
        metrics |= {"exact_accuracy": right.all(1).sum(), "accuracy": right.float().mean(1).sum()}
        return carry + 1, loss, metrics, {"preds": logits.argmax(-1)}, carry == 3


def test_reference_code_on_our_grids_goes_on_after_a_stop(tmp_path, monkeypatch):
    config = "data: {reasoning_gym: mini_sudoku, max_train_examples: 32, max_eval_examples: 8}"
    (tmp_path / "config.yaml").write_text(config)
    monkeypatch.setattr(trm, "reference_model", lambda parsed, num_digits: (Reference(), {"digits": num_digits}))
    for name, value in {"SAVE_EVERY": 10, "LOG_EVERY": 5, "WARMUP": 1}.items():
        monkeypatch.setattr(trm, name, value)
    clock = iter(range(10_000))
    second = SimpleNamespace(monotonic=lambda: next(clock) / 2)  # looked at twice an update, which takes a second
    monkeypatch.setattr(trm, "time", second)
    folders = {"trm-path": tmp_path, "folder": tmp_path / "run", "output": tmp_path / "trm.json"}
    flags = {"batch_size": 8, "learning_rate": 1, **folders}
    arguments = [str(tmp_path / "config.yaml"), *(f"--{name}={value}" for name, value in flags.items()), "--seconds"]
    trm.main([*arguments, "14"])
    trm.main([*arguments, "31"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [5, 10, 15, 20, 25, 30]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["seconds"] < 31
    results = json.loads((tmp_path / "trm.json").read_text())
    assert results["num_updates"] > 25 and results["sizes"] == {"digits": 4}
    assert 0.25 < results["field_accuracy"] < 1.0  # given cells are copied, others guessed


@pytest.mark.parametrize("task", sorted(ablations.VARIANTS))
def test_each_ablation_changes_something(task):
    config = partial(ablations.run_of, task, 0, [])
    runs = {name: to_plain(config(changes)) for name, changes in ablations.VARIANTS[task].items()}
    assert len({json.dumps(run, sort_keys=True) for run in runs.values()}) == len(runs)
    assert runs["one pass, 16 untied layers"]["reasoner"]["num_layers"] == 16


def test_ablations_are_run_once_and_tabled(tmp_path, monkeypatch, capsys):
    accuracy = iter((0.5, 0.7, 0.1))
    monkeypatch.setattr(ablations, "FOLDER", tmp_path / "ablations")
    monkeypatch.setattr(ablations, "VARIANTS", {"mini_sudoku": {"base": [], "one pass, 2 layers": ["one_pass"]}})

    def trained(task, changes, seed, flags):
        by_depth = {"11": 1.0, "12": next(accuracy), "all": 0.9}
        steps = [1] if changes else [1, 4, 16]
        return {"train_seconds": 60.4, "num_parameters": 2100, "accuracy_by_steps": dict.fromkeys(steps, by_depth)}

    monkeypatch.setattr(ablations, "trained", trained)
    ablations.main(["mini_sudoku", "--seeds", "0,1", "--only", "^ba"])
    ablations.main(["mini_sudoku", "--seeds", "0"])  # the base is there
    ablations.main(["mini_sudoku", "--table"])
    *_, base, one_pass = capsys.readouterr().out.strip().splitlines()
    assert base.startswith(
        "| base | 2 | 0.900 ± 0.000 | 0.900 ± 0.000 | 0.900 ± 0.000 | 12: 0.600 ± 1.271 | 2,100 | 60 |"
    )
    assert one_pass == "| one pass, 2 layers | 1 | 0.900 | 0.900 | – | 12: 0.100 | 2,100 | 60 |"


def test_an_ablation_is_trained_and_asked(tmp_path, backbone_folder):
    pytest.importorskip("reasoning_gym")
    flags = {
        "backbone.name_or_path": backbone_folder, "backbone.layers": "[0, 1]", "backbone.dtype": "float32",
        "features.folder": tmp_path, "data.max_train_examples": 16, "data.max_eval_examples": 4, "reasoner.dim": 32,
        "training.num_updates": 2, "training.batch_size": 4, "training.log_every": 1,
    }  # fmt: skip
    given = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    base = ablations.trained("mini_sudoku", [], 0, given)
    assert list(base["accuracy_by_steps"]) == [1, 2, 4, 8, 16] and base["num_updates"] == 2
    assert base["accuracy_by_steps"][4].keys() > {"all"} and base["train_seconds"] > 0
    one_pass = ablations.trained("mini_sudoku", ["one_pass"], 0, given)
    assert list(one_pass["accuracy_by_steps"]) == [1] and one_pass["num_parameters"] == base["num_parameters"]


def test_one_table_of_all_sets(tmp_path, monkeypatch):
    def figures(accuracy):
        row = {"accuracy": accuracy, "interval": [0.0, 1.0], "n": 8}
        return {"accuracy_by_depth": [{"depth": 1, **row}, {"depth": 9, **row}, {"depth": "all", **row}]}

    files = {
        "published.json": {"x_smollm2": [{"name": "They", "source": "S", "questions": "9 hops", "accuracy": "0.5"}]},
        "x_smollm2/results.json": {
            **figures(0.75),
            "split": "test",
            "num_parameters": 2100,
            "baselines": [{"name": "probe", **figures(0.25)}],
        },
        "x_text/written.json": {
            "split": "valid[:9]",
            "exact_match": [{"name": "LoRA", "train_seconds": 9.6, **figures(0.125)}],
        },
    }
    files["x_smollm2/more.json"] = {"split": "test", "baselines": [{"name": "other probe", **figures(0.5)}]}
    for name, content in files.items():
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    monkeypatch.setattr(render, "ROOT", tmp_path)
    start, end = "<!-- summary: x_smollm2+more.json+../x_text/written.json -->", "<!-- end -->"
    found = render.render(f"Before\n{start}\nold\n{end}\nafter")
    first, *lines, last = found.split("\n")[1:-1]
    assert (first, last) == (start, end) and "old" not in lines
    assert lines[2:] == [
        "| [x](results/x_smollm2/) | **head** | 8 | 0.750 (0.000–1.000) | 9: 0.750 (0.000–1.000) | 2,100 | – | – |",
        "|  | probe | 8 | 0.250 (0.000–1.000) | 9: 0.250 (0.000–1.000) | – | – | – |",
        "|  | other probe | 8 | 0.500 (0.000–1.000) | 9: 0.500 (0.000–1.000) | – | – | – |",
        "|  | LoRA, in words | 8, valid | 0.125 (0.000–1.000) | 9: 0.125 (0.000–1.000) | – | 10 | – |",
        "| | [They](S) | – | – | 9 hops: 0.5 | – | – | – |",
    ]


def test_a_row_for_each_set_and_what_more_steps_give(tmp_path, monkeypatch):
    def by_depth(accuracy):
        return [{"depth": depth, "n": 8, "accuracy": accuracy} for depth in (1, 9, None, "all")]

    def system(name, accuracy, **more):
        return {"accuracy_by_depth": by_depth(accuracy), **({"name": name} if name else {}), **more}

    probes = [system("linear probe, pooled states", 0.5, train_seconds=1), system("MLP probe, pooled states", 0.25)]
    files = {
        "results.json": system("", 0.75, split="test", train_seconds=100, baselines=probes),
        "deep.json": system("no recursion, 16 layers once", 0.75, split="test", train_seconds=49),
        "lora.json": system("LoRA", 0.625, split="test", train_seconds=50),
        "test_time.json": {
            "mean_steps_used": 4.0,
            "accuracy_by_steps": [{"steps": steps, "by_depth": by_depth(steps / 8)} for steps in (1, 8)],
            "accuracy_by_rollouts_q": [{"rollouts": count, "by_depth": by_depth(count / 16)} for count in (1, 4)],
            "accuracy_by_rollouts_vote": [{"rollouts": count, "by_depth": by_depth(0.875)} for count in (1, 4)],
        },
    }
    folder = tmp_path / "results" / "x"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setitem(render.TITLES, "x", "The X")
    assert render.matrix(["x+deep.json+lora.json"]).splitlines()[2:] == [
        "| [The X](results/x/) | **0.750** | – | **0.750**† | – | 0.625 | 0.500 | – |"
    ]
    assert render.steps(["x"]).splitlines() == [
        "| set | questions | n | its own | 1 | 8 | q of 4 | vote of 4 |",
        "|---|---|---|---|---|---|---|---|",
        "| x | all | 8 | 4 | 0.125 | 1.000 | 0.250 | 0.875 |",
        "|  | 9 | 8 |  | 0.125 | 1.000 | 0.250 | 0.875 |",
    ]
