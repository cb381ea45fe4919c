"""StepGame, CLUTRR and PrOntoQA with what lies on the way to an answer as fields, which stand in the text.

    python results/chains.py ../shared/data/stepgame_clean.jsonl --output runs/stepgame_chains.jsonl
    python results/chains.py ../shared/data/clutrr_089907f8.jsonl --output runs/clutrr_chains.jsonl
    python results/chains.py ../shared/data/prontoqa.jsonl --output runs/prontoqa_chains.jsonl

Stories: how is each person related to the one asked about last? The answers of the people between follow from the
training rows alone: what one sentence says, in StepGame, is what it says in a story of one hop; how two relations
compose, in CLUTRR, is how they do in a story of two. PrOntoQA: which concepts does the subject belong to? Training
rows carry these answers, and those of CLUTRR that are held out for validation. In the others the fields are asked,
too, and the answer to the question alone counts. With `--due` an answer that lies two sentences away is asked for
from the second refinement step on, and so forth, and is `unknown` before. With `--shuffled` some stories of CLUTRR
are made of three, and all passages of joined stories are told in any order, as in its test stories. With
`--renamed` every training story of CLUTRR has names drawn for it: its few families recur, so that who is asked
about tells the answer of nine in ten questions of two and three hops, and what the story says need not be read.
With `--copies` every training story of StepGame comes so often, each time with other letters for its agents; with
`--beside` every second copy has the sentences of another training story among its own, and half of these are about
one of its agents, too: what is asked follows from five sentences at most, and has to be found among ten (the rows
of `configs/stepgame_chains_smollm2.yaml` are those of `--copies 4 --beside`). `--head` and `--by_distance` ask a
head validation stories of five and of ten sentences.
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from prontoqa_shortcut import SENTENCE, belongs_to, facts, singular
from rows import read_rows, write_rows

from hybrid.backbone import one_text
from hybrid.evaluation import accuracy_row, provenance, write_results
from hybrid.model import HybridModel

AGENT = re.compile(r"\b[A-Z]\b")
NAME = re.compile(r"\b[A-Z][a-z]+\b")
PAIR = re.compile(r"What is (\w+)'s family relation to (\w+)")
LINK = re.compile(r"[a-z]+(?:-in-law)?")
FEMALE = {
    "aunt", "daughter", "daughter-in-law", "granddaughter", "grandmother", "mother", "mother-in-law", "niece",
    "sister", "wife",
}  # fmt: skip
HOLD_OUT = 20  # of so many training stories of CLUTRR, one is kept for validation
NUM_JOINED = (12_000, 0), (600, 0)  # stories made of two and of three, for training and for validation
NUM_SHUFFLED = (8_000, 6_000), (600, 300)  # likewise with `--shuffled`
FEMALE_NAMES = """
Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Karen Sarah Lisa Nancy Sandra Ashley Emily Kimberly
Betty Margaret Donna Michelle Carol Amanda Melissa Deborah Stephanie Rebecca Sharon Laura Cynthia Amy Kathleen
Angela Dorothy Shirley Emma Brenda Nicole Pamela Samantha Anna Katherine Christine Debra Rachel Olivia Carolyn
Maria Janet Heather Diane Catherine Julie Victoria Helen Joyce Lauren Kelly Christina Joan Judith Ruth Hannah
Evelyn Andrea Virginia Megan Cheryl Jacqueline Madison Sophia Abigail Teresa Isabella Sara Janice Martha Gloria
Kathryn Ann Charlotte Judy Amber Julia Grace Denise Danielle Natalie Alice Marilyn Diana Beverly Jean Brittany
Theresa Frances Kayla Alexis Tiffany Lori Kathy Beatrice Rosemary Claudia Yolanda Marguerite Priscilla Loretta
Wilma Eunice Bernadette Ernestine Ramona Henrietta Geraldine Mildred Lucinda Delores Constance Guadalupe Antoinette
Agnes Bertha Camille Daphne Edith Fiona Gwendolyn Harriet Ingrid Jolene Keisha Lavonne Maribel Nadine Opal Paulette
Queenie Rhoda Sylvia Tamara Ursula Velma Winifred Xiomara Yvonne Zelda Adela Blanca Cecilia Dolly
""".split()  # a hundred names common in the United States, and fifty rarer ones
MALE_NAMES = """
James Michael Robert John David William Richard Joseph Thomas Christopher Charles Daniel Matthew Anthony Mark
Donald Steven Andrew Paul Joshua Kenneth Kevin Brian Timothy Ronald George Jason Edward Jeffrey Ryan Jacob Nicholas
Gary Eric Jonathan Stephen Larry Justin Scott Brandon Benjamin Samuel Gregory Alexander Patrick Frank Raymond Jack
Dennis Jerry Tyler Aaron Jose Adam Nathan Henry Zachary Douglas Peter Kyle Noah Ethan Jeremy Christian Walter Keith
Austin Roger Terry Sean Gerald Carl Dylan Harold Jordan Jesse Bryan Lawrence Arthur Gabriel Bruce Logan Billy Joe
Alan Juan Elijah Willie Albert Wayne Randy Mason Vincent Liam Roy Bobby Caleb Bradley Russell Lucas Cedric Reginald
Salvador Clifford Percy Rudolph Ignacio Ferdinand Leopold Bartholomew Humberto Sylvester Milton Clarence Wendell
Emanuel Archie Rufus Alonzo Barney Cornell Darnell Efrain Floyd Garrett Horace Irving Jarvis Kurt Lionel Mortimer
Neville Orlando Preston Quentin Rodrigo Seymour Theodore Ulysses Vernon Wilbur Xavier Yusuf Zane Abdul Boris Cyrus
Desmond Emilio Felix
""".split()
PRONOUNS = {"He", "She", "It", "They", "We", "His", "Her", "Their", "Its"}
SENTENCE_END = re.compile(r"\.\s+")
WHOLE_SENTENCES = re.compile(r"(?<=\.)\s+")  # what stands between them
DIRECTIONS = {
    "above": (0, 1), "below": (0, -1), "left": (-1, 0), "right": (1, 0), "overlap": (0, 0),
    "upper-left": (-1, 1), "upper-right": (1, 1), "lower-left": (-1, -1), "lower-right": (1, -1),
}  # fmt: skip
FARTHEST = 5  # sentences from which an answer may follow in training
BY_DIRECTION = {direction: name for name, direction in DIRECTIONS.items()}

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Write the rows with their fields."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--due", action="store_true", help="stories: say from which step an answer can be known")
    parser.add_argument("--shuffled", action="store_true", help="CLUTRR: passages in any order, and stories of three")
    parser.add_argument("--renamed", action="store_true", help="CLUTRR: other names in every training story")
    parser.add_argument(
        "--joined", type=int, nargs=2, metavar=("TWO", "THREE"), help="CLUTRR: stories made of so many"
    )
    parser.add_argument("--names", type=Path, help="CLUTRR: a result file of what names alone answer")
    parser.add_argument("--copies", type=int, default=0, help="StepGame: so many of every training story")
    parser.add_argument(
        "--beside", action="store_true", help="StepGame: half of the copies with another story in them"
    )
    parser.add_argument("--distances", type=Path, help="StepGame: a result file of how many sentences lie between")
    parser.add_argument("--head", help="StepGame: a head, to be asked stories of five and of ten sentences")
    parser.add_argument("--by_distance", type=Path, help="StepGame: a result file of what that head answers")
    parsed = parser.parse_args(arguments)
    rows = read_rows(parsed.data)
    if (parsed.shuffled or parsed.renamed or parsed.joined or parsed.names) and "f_comb" not in rows[0]:
        parser.error(f"--shuffled, --renamed, --joined, --names: {parsed.data} does not hold CLUTRR")
    if (parsed.copies or parsed.distances or parsed.by_distance) and ("f_comb" in rows[0] or "steps" in rows[0]):
        parser.error(f"--copies, --distances, --by_distance: {parsed.data} does not hold StepGame")
    if parsed.beside and parsed.copies < 2:
        parser.error("--beside: every second copy has another story: give --copies, at least 2")
    if (parsed.head is None) != (parsed.by_distance is None):
        parser.error("--head and --by_distance go together: a head, and the file for what it answers")
    of_clutrr = partial(clutrr, shuffled=parsed.shuffled, renamed=parsed.renamed, num_joined=parsed.joined)
    of_stepgame = partial(stepgame, copies=parsed.copies, add_stories=parsed.beside)
    to_chains = of_clutrr if "f_comb" in rows[0] else prontoqa if "steps" in rows[0] else of_stepgame
    chains, unknown = to_chains(rows)
    if not parsed.due:
        chains = [without_due(row) for row in chains]
    write_rows(parsed.output, chains)
    command = shlex.join(["python", "results/chains.py", *arguments])
    if parsed.distances:
        write_results(parsed.distances, {"distances": distances(rows), **provenance(command, seed=0)})
    if parsed.by_distance:
        found = by_distance(HybridModel.from_pretrained(parsed.head), rows, chains)
        write_results(parsed.by_distance, {"by_distance": found, **provenance(command, seed=0)})
    if parsed.names:
        write_results(parsed.names, {**by_names(rows), **provenance(command, seed=0)})
    print(f"{len(chains)} rows, {unknown} training rows of them without the answers on the way")


def without_due(row: Row) -> Row:
    """The row with every answer asked for from the first step on."""
    kept = {name: value for name, value in row.items() if name != "due"}
    return kept | {"choices": [choice for choice in row["choices"] if choice != "unknown"]} if "due" in row else kept


# -- StepGame ------------------------------------------------------------------------------------------------------


def stepgame(rows: Sequence[Row], copies: int = 0, add_stories: bool = False) -> tuple[list[Row], int]:
    """Rows with a field for each agent but the one that the answer is relative to; training rows in copies, if any.

    Args:
        rows: The set as it is.
        copies: So many of every training row, each with other letters.
        add_stories: Put another training story into every second copy.
    """
    stories = [row["context"] for row in rows if row["split"] == "train" and row["depth"] <= FARTHEST]
    says, chains, unknown, generator = patterns(rows), [], 0, random.Random(0)
    for row in rows:
        asked, origin = AGENT.findall(row["question"])
        agents = list(dict.fromkeys(AGENT.findall(row["context"])))
        others = [asked, *(agent for agent in agents if agent not in (asked, origin))]
        answers, due = {asked: row["answer"]}, {}
        if row["split"] == "train":
            places = positions(row["context"], origin, says)
            found = {agent: BY_DIRECTION[sign(x), sign(y)] for agent, (x, y, _) in places.items()}
            if found.get(asked) == row["answer"] and set(others) <= set(found):
                answers, due = {agent: found[agent] for agent in others}, {agent: places[agent][2] for agent in others}
            else:
                unknown += 1
        choices = [*row["choices"], "unknown"]
        chain = row | {"fields": others, "answer": answers, "choices": choices, "due": due}
        if not copies or row["split"] != "train":
            chains.append(chain)
            continue
        for copy in range(copies):
            copied = with_letters(chain, generator)
            is_mixed = add_stories and copy % 2 and due
            chains.append(beside(copied, generator.choice(stories), says, generator) if is_mixed else copied)
    return chains, unknown


def with_letters(row: Row, generator: random.Random) -> Row:
    """The story with other letters for its agents."""
    new = dict(zip(ascii_uppercase, generator.sample(ascii_uppercase, 26), strict=True))
    by_name = {key: {new[name]: value for name, value in row[key].items()} for key in ("answer", "due")}
    texts = {key: AGENT.sub(lambda match: new[match[0]], row[key]) for key in ("context", "question")}
    return row | by_name | texts | {"fields": [new[name] for name in row["fields"]]}


def beside(row: Row, story: str, says: Mapping[str, str], generator: random.Random) -> Row:
    """The row with the sentences of another story among its own, and its agents, where they are near enough.

    They get letters that the row has not, but that in half of the rows one of them is one of the row's.
    """
    (_, origin), own = AGENT.findall(row["question"]), sorted(set(AGENT.findall(row["context"])))
    agents, free = sorted(set(AGENT.findall(story))), [letter for letter in ascii_uppercase if letter not in own]
    new = dict(zip(agents, generator.sample(free, len(agents)), strict=True))
    if generator.random() < 0.5:
        new[generator.choice(agents)] = generator.choice(own)
    told = [*WHOLE_SENTENCES.split(row["context"]), *WHOLE_SENTENCES.split(AGENT.sub(lambda m: new[m[0]], story))]
    context = " ".join(generator.sample(told, len(told)))
    places = positions(context, origin, says)
    others = [agent for agent in new.values() if agent not in own and agent in places]
    near = [agent for agent in others if places[agent][2] <= FARTHEST]
    answers = {agent: BY_DIRECTION[sign(places[agent][0]), sign(places[agent][1])] for agent in near}
    due = {agent: places[agent][2] for agent in near}
    return row | {
        "context": context, "fields": [*row["fields"], *near], "answer": row["answer"] | answers,
        "due": row["due"] | due, "depth": max([row["depth"], *due.values()]),
    }  # fmt: skip


def distances(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many sentences lead from one agent asked about to the other, for stories of each length.

    Questions whose agents the sentences do not connect, or some of whose words no story of one hop has, are `None`.
    `follows` counts those whose answer in the file is what the sentences say, by the words of stories of one hop.
    """
    says, found, follows = patterns(rows), defaultdict(Counter), Counter()
    for row in rows:
        key, (asked, origin) = (row["split"], row["depth"]), AGENT.findall(row["question"])
        x, y, distance = positions(row["context"], origin, says).get(asked, (0, 0, None))
        found[key][str(distance)] += 1
        follows[key] += distance is not None and BY_DIRECTION[sign(x), sign(y)] == row["answer"]
    return [
        {"split": split, "depth": depth, "follows": follows[split, depth], "sentences": dict(sorted(counts.items()))}
        for (split, depth), counts in sorted(found.items())
    ]


def by_distance(
    model: HybridModel, rows: Sequence[Row], chains: Sequence[Row], number: int = 300
) -> list[dict[str, Any]]:
    """What a head answers of validation stories of five and of ten sentences, by how many lie between the agents.

    Questions whose agents the sentences do not connect are left out.
    """
    says, right = patterns(rows), defaultdict(list)
    held = [row for row in chains if row["split"] == "valid"]
    for depth in (5, 10):
        for row in [row for row in held if row["depth"] == depth][:number]:
            asked, origin = AGENT.findall(row["question"])
            fields = {name: [choice for choice in row["choices"] if choice != "unknown"] for name in row["fields"]}
            value = model.answer(row["question"], context=row["context"], fields=fields).value
            if (place := positions(row["context"], origin, says).get(asked)) is not None:
                right[depth, place[2]].append((value[asked] if len(fields) > 1 else value) == row["answer"][asked])
    return [
        {"depth": depth, "sentences": distance, **accuracy_row(torch.tensor(hits))}
        for (depth, distance), hits in sorted(right.items())
    ]


def patterns(rows: Sequence[Row]) -> dict[str, str]:
    """Which relation the first agent named in a sentence has to the second, by the words of the sentence."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["split"] == "train" and row["depth"] == 1:
            asked, _ = AGENT.findall(row["question"])
            sentence = SENTENCE_END.split(row["context"])[-1]  # one may go before: "The objects X and K are there."
            x, y = DIRECTIONS[row["answer"]]
            is_first = AGENT.findall(sentence)[0] == asked
            votes[pattern(sentence)][BY_DIRECTION[(x, y) if is_first else (-x, -y)]] += 1
    return {words: counts.most_common(1)[0][0] for words, counts in votes.items()}


def pattern(sentence: str) -> str:
    """A sentence without the names: `0 is above 1 and to the right of 1`."""
    numbers: dict[str, str] = {}
    return AGENT.sub(lambda match: numbers.setdefault(match[0], str(len(numbers))), sentence.strip().rstrip("."))


def positions(context: str, origin: str, says: Mapping[str, str]) -> dict[str, tuple[int, int, int]]:
    """Where each agent that the sentences connect with the origin stands, and after how many of them."""
    edges: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for sentence in SENTENCE_END.split(context):
        relation, agents = says.get(pattern(sentence)), list(dict.fromkeys(AGENT.findall(sentence)))
        if relation is None or len(agents) != 2:
            continue
        first, second = agents
        x, y = DIRECTIONS[relation]
        edges[second].append((first, x, y))
        edges[first].append((second, -x, -y))
    found, queue = {origin: (0, 0, 0)}, [origin]
    for agent in queue:
        for other, x, y in edges[agent]:
            if other not in found:
                found[other] = found[agent][0] + x, found[agent][1] + y, found[agent][2] + 1
                queue.append(other)
    return found


def sign(number: int) -> int:
    """−1, 0 or 1."""
    return (number > 0) - (number < 0)


# -- CLUTRR --------------------------------------------------------------------------------------------------------


def clutrr(
    rows: Sequence[Row], shuffled: bool = False, renamed: bool = False, num_joined: Sequence[int] | None = None
) -> tuple[list[Row], int]:
    """Rows with a field for each person but the one that the answer is relative to, and stories joined of them.

    Args:
        rows: The set as it is.
        shuffled: Tell the passages of joined stories in any order.
        renamed: Give the people of stories for training and validation other names.
        num_joined: Training stories made of two and of three, instead of `NUM_JOINED` or `NUM_SHUFFLED`.
    """
    named = {name for row in rows for name in PAIR.findall(row["question"])[0]}
    composed: dict[tuple[str, ...], Counter[str]] = {}
    more: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["split"] == "train" and row["depth"] == 2:
            composed.setdefault(links(row), Counter())[row["answer"]] += 1
    chains, unknown = [], 0
    for number, row in enumerate(rows):
        ((asked, origin),) = PAIR.findall(row["question"])
        people = [name for name in dict.fromkeys(NAME.findall(row["context"])) if name in named]
        between = [name for name in people if name not in (asked, origin)]
        answers, due = {asked: row["answer"]}, {}
        if row["split"] == "train" and row["depth"] in (2, 3):
            order = from_origin(row["context"], origin, asked, between)
            known = [Counter(links(row)[:1])] + [composed.get(links(row)[:2])][: row["depth"] - 2]
            if len(between) == row["depth"] - 1 and order is not None and all(known):
                answers |= {name: votes.most_common(1)[0][0] for name, votes in zip(order, known, strict=True)}
                due = {name: hops for hops, name in enumerate([*order, asked], start=1)}
            else:
                unknown += 1
        choices = [*sorted({*row["choices"], "husband", "wife"}), "unknown"]  # never the answer, but on the way
        chains.append(row | {"fields": [asked, *between], "answer": answers, "choices": choices, "due": due})
        if row["split"] == "train" and number % HOLD_OUT == 0:
            chains[-1]["split"] = "valid"
    for row in rows:  # with the relations that no single story says, such as that of a grandfather's sister
        if row["split"] == "train" and row["depth"] == 3 and (votes := composed.get(links(row)[:2])):
            pair = votes.most_common(1)[0][0], links(row)[2]
            if pair not in composed:
                more[pair][row["answer"]] += 1
    held = [[row for row in chains if row["split"] == split] for split in ("train", "valid")]
    genders: dict[str, Counter[bool]] = defaultdict(Counter)
    for row in held[0]:
        for name, relation in row["answer"].items():
            genders[name][relation in FEMALE] += 1
    gender = {name: votes.most_common(1)[0][0] for name, votes in sorted(genders.items())}
    generator, known_pairs = random.Random(0), {**composed, **more}
    for_training, for_validation = NUM_SHUFFLED if shuffled else NUM_JOINED
    for stories, (of_two, of_three) in zip(held, (num_joined or for_training, for_validation), strict=True):
        longer = joined(stories, stories, known_pairs, gender, of_two, generator)
        longest = joined(longer, stories, known_pairs, gender, of_three, generator)
        chains += longer + longest
        for row in longer + longest if shuffled else []:
            told = passages(row["context"])
            row["context"] = " ".join(generator.sample(told, len(told)))
    if renamed:
        chains = [with_names(row, gender, generator) if row["split"] in ("train", "valid") else row for row in chains]
    return chains, unknown


def with_names(row: Row, gender: Mapping[str, bool], generator: random.Random) -> Row:
    """The story with other names for its people; every fifth name is kept for validation."""
    new: dict[str, str] = {}
    ((_, origin),) = PAIR.findall(row["question"])
    for person in (*row["fields"], origin):
        female = gender.get(person, generator.random() < 0.5)  # of few nobody says
        names = FEMALE_NAMES if female else MALE_NAMES
        own = [name for number, name in enumerate(names) if (number % 5 == 0) == (row["split"] == "valid")]
        new[person] = generator.choice([name for name in own if name not in new.values()])
    by_name = {key: {new[name]: value for name, value in row[key].items()} for key in ("answer", "due")}
    texts = {key: exchanged(row[key], new) for key in ("context", "question")}
    return row | by_name | texts | {"fields": [new[name] for name in row["fields"]]}


def exchanged(text: str, new: Mapping[str, str]) -> str:
    """The text with the new names of those that have one."""
    return NAME.sub(lambda match: new.get(match[0], match[0]), text)


def by_names(rows: Sequence[Row]) -> dict[str, Any]:
    """How many test questions the two names alone answer: what training most often says of the pair, if it has it."""
    seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["split"] == "train":
            seen[PAIR.findall(row["question"])[0]][row["answer"]] += 1
    right: dict[int, list[bool]] = defaultdict(list)
    for row in rows:
        if row["split"] == "test":
            votes = seen.get(PAIR.findall(row["question"])[0])
            right[row["depth"]].append(votes is not None and votes.most_common(1)[0][0] == row["answer"])
    return {
        "train_questions": sum(map(Counter.total, seen.values())),
        "train_pairs": len(seen),
        "names_alone": [{"depth": depth, **accuracy_row(torch.tensor(hits))} for depth, hits in sorted(right.items())],
    }


def joined(
    nears: Sequence[Row],
    fars: Sequence[Row],
    composed: Mapping[tuple[str, ...], Counter[str]],
    gender: Mapping[str, bool],
    number: int,
    generator: random.Random,
) -> list[Row]:
    """Longer stories: the person asked about in a near one is the origin of a far one.

    Where the training stories do not say how the two answers compose, the pair is passed over; of the people between,
    those have an answer for whom they do.
    """
    rows: list[Row] = []
    for _ in range(100 * number):  # and no more, should hardly any pair compose
        if len(rows) == number:
            break
        near, far = generator.sample(nears, 2) if nears is fars else (generator.choice(nears), generator.choice(fars))
        (middle, *_), (asked, *between) = near["fields"], far["fields"]
        ((_, first),), ((_, origin),) = PAIR.findall(near["question"]), PAIR.findall(far["question"])
        if gender.get(origin) != gender.get(middle):
            continue
        relation, taken, new = near["answer"][middle], {*near["fields"], first}, {origin: middle}
        for name in (asked, *between):
            free = [other for other in gender if other not in {*taken, *far["fields"], origin}]
            new[name] = (
                name if name not in taken else generator.choice([o for o in free if gender[o] == gender.get(name)])
            )
            taken.add(new[name])
        answers, due = dict(near["answer"]), dict(near["due"])
        for name, answer in far["answer"].items():
            if votes := composed.get((relation, answer)):
                answers[new[name]] = votes.most_common(1)[0][0]
                due |= {new[name]: near["depth"] + far["due"][name]} if name in far["due"] else {}
        if new[asked] not in answers:
            continue
        text = exchanged(far["context"], new)
        rows.append(
            near | {
                "id": f"{near['id']}+{far['id']}", "depth": near["depth"] + far["depth"],
                "context": " ".join(generator.sample([near["context"], text], 2)),
                "question": f"What is {new[asked]}'s family relation to {first}?",
                "fields": [new[asked], *near["fields"], *(new[name] for name in between)],
                "answer": answers if near["split"] == "train" else {new[asked]: answers[new[asked]]}, "due": due,
            }
        )  # fmt: skip
    return rows


def passages(context: str) -> list[str]:
    """A story in parts that can be told in any order: each begins with a sentence that names two people by itself."""
    parts: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", context.strip()):
        if parts and (len(set(NAME.findall(sentence)) - PRONOUNS) < 2 or sentence.split()[0] in PRONOUNS):
            parts[-1] += f" {sentence}"
        else:
            parts.append(sentence)
    return parts


def links(row: Row) -> tuple[str, ...]:
    """The relations along the chain, from the person that the answer is relative to."""
    return tuple(LINK.findall(row["f_comb"]))


def from_origin(context: str, origin: str, asked: str, between: Sequence[str]) -> list[str] | None:
    """The people between in their order along the chain, by who shares a sentence with whom; nothing if it is open."""
    if len(between) < 2:
        return list(between)
    sentences = [set(NAME.findall(sentence)) for sentence in re.split(r"[.!?]", context)]
    near = {
        name: sum((origin in sentence) - (asked in sentence) for sentence in sentences if name in sentence)
        for name in between
    }
    return None if len(set(near.values())) < len(near) else sorted(near, key=near.__getitem__, reverse=True)


# -- PrOntoQA ------------------------------------------------------------------------------------------------------


def prontoqa(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Rows with a field for each concept that is said to be something, and the answer at the word asked for."""
    chains = []
    for row in rows:
        if row["split"] not in ("train", "train_nodistractor", "valid", "test"):
            continue
        ((subject, _, asked),) = facts(row["question"].removeprefix("True or false: "))
        known = facts(row["context"])
        concepts = {lower for lower, *_ in known} - {subject}
        is_a = belongs_to(subject, known, concepts)
        text = one_text(row["context"], row["question"])
        places = {"answer": text.rindex(asked)}
        sentences = [*SENTENCE.finditer(row["context"])]
        for about in (False, True):  # better where it is said to have the property asked for
            for sentence in sentences:
                concept, predicate = singular(sentence[1]), singular(sentence[3])
                if concept in concepts and (concept not in places or about and predicate == asked):
                    places[concept] = sentence.start(1)
        answers = {"answer": row["answer"]}
        if row["split"].startswith("train"):
            answers |= {concept: str(concept in is_a) for concept in sorted(concepts)}
        fields = [{"name": name, "options": ["True", "False"], "at": at} for name, at in places.items()]
        kept = {name: value for name, value in row.items() if name not in ("steps", "choices")}
        depth = row["depth"] + 10 * (row["split"] == "train_nodistractor")  # told apart by ten more
        chains.append(kept | {"fields": fields, "answer": answers, "depth": depth})
    return chains, 0


if __name__ == "__main__":
    main(sys.argv[1:])
