"""Sources become canonical examples, splits stay apart, and what is wrong is refused with one line that helps."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from jsonargparse import ArgumentParser

from hybrid.config import DataConfig, RunConfig
from hybrid.data import data_fingerprint, load_examples
from hybrid.decoder import Field

HERE = Path(__file__).parent
STEPGAME, KNIGHTS = HERE / "data/stepgame_sample.jsonl", HERE / "data/knights_knaves_sample.jsonl"
CONFIGS = sorted((HERE.parent / "configs").glob("*.yaml"))
SHARED = HERE.parent / "../shared/data"
LOCAL_COPIES = {  # of the sets whose licence or size keeps a sample from being shipped: file, role, rows at least
    "babi": ("babi_en.jsonl", "test", 20_000),  # with an answer that the training split lacks
    "clutrr": ("clutrr_089907f8.jsonl", "valid", 400),
    "prontoqa": ("prontoqa.jsonl", "valid", 200),
    "proofwriter": ("proofwriter_d5.jsonl", "test", 600),  # where the split is called dev
}
ROW = {"question": "Which?", "answer": "a", "choices": ["a", "b"]}


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(rows: list[dict], folder: Path, split: str = "train", **settings):
    return load_examples(DataConfig(path=write(folder / "rows.jsonl", rows), **settings), split)


def numbered(count: int) -> list[dict]:
    return [{**ROW, "question": f"Question {n}?", "depth": n % 4 + 1, "id": n} for n in range(count)]


def by_depth(examples) -> dict:
    return dict(sorted(Counter(example.depth for example in examples).items()))


def questions(examples) -> set:
    return {(example.context, example.question) for example in examples}


# A local file


def test_split_column_and_canonical_columns():
    config = DataConfig(path=str(STEPGAME))
    train, test = load_examples(config, "train"), load_examples(config, "test")
    assert by_depth(train) == by_depth(test) == {1: 20, 2: 20, 3: 20}
    first = train[0]
    assert first.context == "X is to the left of K and is on the same horizontal plane."
    assert first.question == "What is the relation of the agent X to the agent K?"
    assert first.answers == ("left",) and first.id == "clean-1-train-0"
    assert first.fields[0].name == "answer" and first.fields[0].options[:3] == ("above", "below", "left")
    assert {example.id.split("-")[2] for example in test} == {"test"}


def test_reading_leaves_no_cache_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = set(STEPGAME.parent.iterdir())
    assert len(load_examples(DataConfig(path=str(STEPGAME)), "valid")) == 60
    assert not (tmp_path / "cache").exists() and set(STEPGAME.parent.iterdir()) == before


def test_depth_filter_is_for_training_only():
    config = DataConfig(path=str(STEPGAME), train_depths=[1, 3])
    assert by_depth(load_examples(config, "train")) == {1: 20, 3: 20}
    assert by_depth(load_examples(config, "valid")) == {1: 20, 2: 20, 3: 20}


def test_subsample_is_even_over_depths_and_seeded(tmp_path):
    rows = numbered(40) + [{**ROW, "question": f"Rare {n}?", "depth": 9} for n in range(3)]
    some = load(rows, tmp_path, max_train_examples=15)
    assert by_depth(some) == {1: 3, 2: 3, 3: 3, 4: 3, 9: 3}
    assert some == load(rows, tmp_path, max_train_examples=15)
    assert some != load(rows, tmp_path, max_train_examples=15, seed=1)
    assert [example.id for example in some if example.depth != 9] == sorted(
        (example.id for example in some if example.depth != 9), key=int
    )  # the order of the source


@pytest.mark.parametrize("valid_split", ["train[-20%:]", "train[:8]", "train[4:12]"])
def test_slices_are_spread_over_depths_and_kept_from_training(tmp_path, valid_split):
    train, valid = (load(numbered(40), tmp_path, role, valid_split=valid_split) for role in ("train", "valid"))
    assert by_depth(valid) == {1: 2, 2: 2, 3: 2, 4: 2}
    assert len(train) == 32 and not questions(train) & questions(valid)
    assert valid == load(numbered(40), tmp_path, "valid", valid_split=valid_split, seed=7)  # no seed sees another's


def test_an_answer_in_words_is_read_beside_the_answer(tmp_path):
    first, second = load([{**ROW, "answer_text": "It is a."}, {**ROW, "question": "And?"}], tmp_path)
    assert (first.answer_text, first.answers, second.answer_text) == ("It is a.", ("a",), None)


def test_csv_keeps_texts_as_they_are(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        'context,question,answer,choices,depth\n0030,Which?,007,"[""007"", ""1.50""]",2\n,Which?,1.50,,3\n'
    )
    one, two = load_examples(DataConfig(path=str(path), choices=["007", "1.50"]), "train")
    assert (one.context, one.answers, one.depth) == ("0030", ("007",), 2)
    assert (two.context, two.answers, two.depth) == (None, ("1.50",), 3)
    path.write_text(",question,answer\n0,Is it?,true\n1,Is it not?,false\n")  # with an index, as pandas writes it
    for one in load_examples(DataConfig(path=str(path), choices=["yes", "no"]), "train"):
        assert one.answers == ("yes" if one.question == "Is it?" else "no",)
    with pytest.raises(ValueError, match="answer 'true' is not among the choices"):
        load_examples(DataConfig(path=str(path), choices=["correct", "incorrect"]), "train")
    path.write_text("question,answer,depth\nWhich?,a,1,\n")  # one comma too many
    (one,) = load_examples(DataConfig(path=str(path), choices=["a", "b"]), "train")
    assert (one.question, one.answers, one.depth) == ("Which?", ("a",), 1)
    path.write_bytes("question,answer\nÉté ?,a\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.path='.*rows\.csv' cannot be read as csv: .*utf-8"):
        load_examples(DataConfig(path=str(path), choices=["a", "b"]), "train")


def test_odd_cells_are_read_as_meant_or_refused(tmp_path):
    mixed = {"question": "Who?", "fields": ["A", {"name": "B", "options": ["c", "d"]}], "answer": {"A": "a", "B": "d"}}
    (example,) = load([{**mixed, "choices": ["a", "b", None]}], tmp_path)
    assert [(field.name, field.options) for field in example.fields] == [("A", ("a", "b")), ("B", ("c", "d"))]
    assert example.answers == ("a", "d")
    (told,) = load([{**ROW, "context": ["One.", None, "Two."]}], tmp_path)
    assert told.context == "One. Two."
    for wrong in ({"title": ["x"]}, [["x", "y"]]):
        with pytest.raises(ValueError, match="context .*: expected a text or a list of texts"):
            load([{**ROW, "context": wrong}], tmp_path)
    with pytest.raises(ValueError, match=r"fields \[1\]: each needs a name"):
        load([{**ROW, "fields": [1]}], tmp_path)
    with pytest.raises(ValueError, match="depth '1,000': expected a whole number"):
        load([{**ROW, "depth": "1,000"}], tmp_path)
    path = tmp_path / "rows.csv"
    path.write_text("a,b,c,question,answer\nx,,y  z,Which?,yes\n")
    for source, expected in (("{a} {b}", "x"), ("{a} {b} {question}", "x Which?"), ("{a} {c}", "x y  z")):
        mapping = {"context": source}
        (joined,) = load_examples(DataConfig(path=str(path), column_mapping=mapping, choices=["yes", "no"]), "train")
        assert joined.context == expected
    config = DataConfig(path=str(path), column_mapping={"context": "{b:.2f}"}, choices=["yes", "no"])
    with pytest.raises(ValueError, match="data.column_mapping: '{b:.2f}' finds nothing in"):
        load_examples(config, "train")


def test_many_different_answers_need_choices(tmp_path):
    rows = [{"question": f"Question {number}?", "answer": f"text {number}"} for number in range(1001)]
    with pytest.raises(ValueError, match="1,001 different answers and no choices"):
        load(rows, tmp_path)
    assert len(load(rows, tmp_path, choices=[row["answer"] for row in rows])) == 1001
    own = [{**row, "choices": [row["answer"], "another"]} for row in rows]
    assert len(load([*own, {"question": "Is it?", "answer": "text 0"}], tmp_path)) == 1002


def test_dates_in_json_are_refused_where_they_would_change(tmp_path):
    row = {"question": "When?", "answer": "2020-01-02", "choices": ["2020-01-02", "2021-03-04"]}
    with pytest.raises(ValueError, match=r"columns \['answer', 'choices'\] were read as dates"):
        load([row], tmp_path)
    named = {
        "question": "When?",
        "fields": [{"name": "timestamp", "options": ["a", "b"]}],
        "answer": {"timestamp": "a"},
    }
    assert load([named], tmp_path)[0].answers == ("a",)


def test_answers_are_all_texts_or_none_is(tmp_path):
    rows = [{**ROW, "answer": answer, "choices": ["7", "007"]} for answer in ("007", 7)]
    with pytest.raises(ValueError, match="column 'answer' mixes texts and numbers"):
        load(rows, tmp_path)
    rows = [{**ROW, "answer": answer, "fields": ["A"], "choices": ["7", "007"]} for answer in ({"A": "007"}, ["7"])]
    assert [example.answers for example in load(rows, tmp_path)] == [("007",), ("7",)]


def test_a_column_that_is_not_there_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"no column 'passage' and no 'context': .* not read: \['text'\]"):
        load([{"text": "A is left of B.", **ROW}], tmp_path, column_mapping={"context": "passage"})
    with pytest.warns(UserWarning, match="column 'contxt' is not read: is 'context' meant"):
        load([{"contxt": "A is left of B.", **ROW}], tmp_path)


def test_a_path_into_a_column(tmp_path):
    row = {"question": "Which?", "answerKey": "B", "choices": {"text": ["one", "two"], "label": ["A", "B"]}}
    mapping = {"choices": "choices.text", "answer": "answerKey"}
    (example,) = load([row], tmp_path, column_mapping=mapping)
    assert example.fields[0].options == ("one", "two") and example.answers == ("two",)
    with pytest.raises(ValueError, match=r"'choices\.texts' finds nothing in .*KeyError"):
        load([row], tmp_path, column_mapping=mapping | {"choices": "choices.texts"})
    assert load([ROW], tmp_path, column_mapping=mapping)[0].answers == ("a",)  # a local copy in canonical columns
    with pytest.raises(ValueError, match=r"'choices\.text' finds nothing in"):
        listed = [{"label": "A", "text": "one"}, {"label": "B", "text": "two"}]
        load([row | {"choices": listed}], tmp_path, column_mapping=mapping)


def test_a_column_misspelt_is_refused(tmp_path):
    rows = [{"passage": "A is left of B.", **ROW}]
    with pytest.raises(ValueError, match="names 'pasage': is 'passage' meant"):
        load(rows, tmp_path, column_mapping={"context": "pasage"})
    canonical = [{"context": "A is left of B.", **ROW}]
    assert load(canonical, tmp_path, column_mapping={"context": "story"})[0].context == "A is left of B."


@pytest.mark.parametrize("depth", [2.5, "0.5", -3])
def test_a_depth_is_a_whole_number(tmp_path, depth):
    with pytest.raises(ValueError, match="expected a whole number"):
        load([ROW | {"depth": depth}], tmp_path)


def test_a_field_needs_a_name(tmp_path):
    with pytest.raises(ValueError, match=r"row 1 .*needs a name"):
        load([{"question": "Which?", "fields": [{"options": ["a", "b"]}], "answer": ["a"]}], tmp_path)


def test_a_file_that_changed_is_read_anew(tmp_path):
    assert len(load(numbered(6), tmp_path)) == 6
    assert len(load(numbered(4), tmp_path)) == 4


def test_splits_are_joined_and_what_a_slice_took_of_one_stays_away(tmp_path):
    rows = [{**row, "split": "easy" if n < 30 else "hard"} for n, row in enumerate(numbered(80))]
    settings = {"train_split": "easy+hard", "valid_split": "hard[-10:]"}
    train, valid = (load(rows, tmp_path, role, **settings) for role in ("train", "valid"))
    assert len(train) == 70 and len(valid) == 10 and not questions(train) & questions(valid)
    assert questions(load(rows, tmp_path, "train", train_split="easy")) < questions(train)
    with pytest.raises(ValueError, match=r"data.train_split='easy\+harder': there are \['easy', 'hard'\]"):
        load(rows, tmp_path, "train", train_split="easy+harder")


def test_a_slice_has_each_depth_by_its_share(tmp_path):
    rows = [{**ROW, "question": f"Question {n}?", "depth": 1 if n < 30 else 2} for n in range(40)]
    assert by_depth(load(rows, tmp_path, "valid", valid_split="train[-20%:]")) == {1: 6, 2: 2}


def test_a_question_that_was_cut_is_kept_from_training_wherever_it_recurs(tmp_path):
    rows = numbered(10) * 4
    train, valid = (load(rows, tmp_path, role, valid_split="train[-3:]") for role in ("train", "valid"))
    assert len(valid) == 3 and train and not questions(train) & questions(valid)


def test_complementary_slices_lose_no_row(tmp_path):
    settings = {"train_split": "train[:93%]", "valid_split": "train[93%:]"}
    train, valid = (load(numbered(41), tmp_path, role, **settings) for role in ("train", "valid"))
    assert len(train) + len(valid) == 41 and len(questions(train) | questions(valid)) == 41


def test_a_small_slice_of_few_rows_is_never_everything(tmp_path):
    assert len(load(numbered(10), tmp_path, "valid", valid_split="train[-5%:]")) == 1


def test_valid_is_known_by_four_names(tmp_path):
    rows = [{**ROW, "split": "train"}, {**ROW, "question": "Dev?", "split": "dev"}]
    assert load(rows, tmp_path, "valid")[0].question == "Dev?"


def test_folder_with_one_file_per_split(tmp_path):
    shutil.copy(STEPGAME, tmp_path / "test.jsonl")
    datasets.Dataset.from_list([ROW, ROW]).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "valid.json").write_text(json.dumps([ROW]))
    config = DataConfig(path=str(tmp_path))
    assert [len(load_examples(config, role)) for role in ("train", "valid", "test")] == [2, 1, 180]


def test_table_cells(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        'question,answer,choices,depth\n"Who?",None,"[""None"", ""NA""]",2\n"Who?",NA,"[""None"", ""NA""]",\n'
    )
    examples = load_examples(DataConfig(path=str(path)), "train")
    assert [example.answers for example in examples] == [("None",), ("NA",)]
    assert [example.depth for example in examples] == [2, None]


# Fields


def test_mappings_of_different_names_stay_whole():
    examples = load_examples(DataConfig(path=str(KNIGHTS)), "train")
    rows = [json.loads(line) for line in KNIGHTS.read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    assert len({name for row in rows for name in row["answer"]}) > 8
    for example, row in zip(examples, rows, strict=True):
        assert {f.name: answer for f, answer in zip(example.fields, example.answers, strict=True)} == row["answer"]
        assert all(f.options == ("knight", "knave") for f in example.fields)


def test_two_rows_with_other_keys(tmp_path):  # too few names for `datasets` to fall back to JSON
    rows = [{"question": "Who?", "answer": {name: "yes"}} for name in ("Ann", "Bob")]
    first, second = load(rows, tmp_path, choices=["yes", "no"])
    assert first.fields == (Field("Ann", ("yes", "no")),) and second.fields == (Field("Bob", ("yes", "no")),)


def test_answers_by_letter_and_truth_value(tmp_path):
    rows = [{"question": "Which?", "answer": answer, "choices": ["red", "blue"]} for answer in ("B", "red")]
    assert [example.answers for example in load(rows, tmp_path)] == [("blue",), ("red",)]
    rows = [{"question": "Is it?", "answer": answer, "choices": ["wrong", "right"]} for answer in (False, True)]
    assert [example.answers for example in load(rows, tmp_path)] == [("wrong",), ("right",)]
    with pytest.raises(ValueError, match="'A' is not among"):  # a letter of its own is no position
        load([{"question": "Which?", "answer": "A", "choices": ["B", "C"]}], tmp_path)


# Column mapping


def test_mapping_joins_lists_formats_and_falls_back(tmp_path):
    mapping = {"context": "story", "question": "How is {pair[0]} to {pair[1]}?", "answer": "label", "depth": "task"}
    source = {"story": ["A saw B.", "B ran."], "pair": ["A", "B"], "label": "a", "task": "task_1.10"}
    examples = load([source], tmp_path, column_mapping=mapping, choices=["a", "b"])
    assert (examples[0].context, examples[0].question, examples[0].depth) == ("A saw B. B ran.", "How is A to B?", 10)
    copy = {"context": "A saw B.", "question": "How?", "answer": "b", "depth": 3}
    examples = load([copy], tmp_path, column_mapping=mapping, choices=["a", "b"])
    assert (examples[0].context, examples[0].question, examples[0].depth) == ("A saw B.", "How?", 3)


def test_mapping_that_fits_nothing_lists_the_columns(tmp_path):
    with pytest.raises(ValueError, match=r"'question' .* 'query'.*\['answer', 'choices', 'text'\]"):
        load([{"text": "?", "answer": "a", "choices": ["a"]}], tmp_path, column_mapping={"question": "query"})


# A Hub data set (a folder of the same form is read by the same code of `datasets`)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "hub"


def test_hub_labels_are_texts(hub_folder):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for split, labels in (("train", [0, 1]), ("validation", [1, 1])):
        rows = datasets.Dataset.from_dict({"text": ["One?", "Two?"], "label": labels}, features=features)
        rows.to_parquet(hub_folder / f"{split}.parquet")
    config = DataConfig(hub_id=str(hub_folder), column_mapping={"question": "text", "answer": "label"})
    assert [example.answers for example in load_examples(config, "train")] == [("no",), ("yes",)]
    assert load_examples(config, "valid")[0].fields == (Field("answer", ("no", "yes")),)


def test_hub_configurations_as_splits(hub_folder):
    """The form of Knights & Knaves on the Hub, read with the shipped config."""
    card = "---\nconfigs:\n"
    for name in ("train", "test"):
        card += f"- config_name: {name}\n  data_files:\n"
        for people in (["Ann", "Bo"], ["Ann", "Bo", "Cy"]):
            rows = [{"quiz": f"{name} {people}", "names": people, "solution": [True, False, True][: len(people)]}]
            write(hub_folder / f"{name}/{len(people)}.jsonl", rows)
            card += f"  - split: {len(people)}ppl\n    path: {name}/{len(people)}.jsonl\n"
    (hub_folder / "README.md").write_text(card + "---\n")
    config = parse(HERE.parent / "configs/knights_knaves_smollm2.yaml", "--data.hub_id", str(hub_folder)).data
    two, three = load_examples(config, "test")
    assert (two.depth, two.answers) == (2, ("knight", "knave"))
    assert (three.depth, three.answers) == (3, ("knight", "knave", "knight"))
    assert [field.name for field in three.fields] == ["Ann", "Bo", "Cy"]


def test_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"no-one/nothing.*data\.path") as error:
        load_examples(DataConfig(hub_id="no-one/nothing"), "train")
    assert "\n" not in str(error.value)


# Closed vocabularies


def test_options_default_to_the_answers_of_training(tmp_path):
    rows = [{"question": f"{n}?", "answer": answer, "split": "train"} for n, answer in enumerate("cab")]
    rows += [{"question": "4?", "answer": "b", "split": "test", "choices": None}]
    assert load(rows, tmp_path, "test")[0].fields[0].options == ("a", "b", "c")
    rows += [{"question": "5?", "answer": "d", "split": "test"}]
    with pytest.raises(ValueError, match=r"row 2 of split 'test'.*'d' is not among.*data\.choices"):
        load(rows, tmp_path, "test")
    assert load(rows, tmp_path, "test", choices=["a", "b", "c", "d"])[1].answers == ("d",)


# Refusals


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([ROW, {**ROW, "answer": "c", "id": "x7"}], {}, r"row 2 of split 'train' \(id 'x7'\).*'c' is not among.*'a'"),
        ([ROW, {**ROW, "question": " "}], {}, "row 2 .*question is empty"),
        ([ROW, {**ROW, "answer": None}], {}, "row 2 .*answer None is not among"),
        ([{**ROW, "choices": ["a", "b", "a"]}], {}, "row 1 .*twice.*'a'"),
        ([{**ROW, "choices": "a, b"}], {}, r"row 1 .*'a, b'.*expected lists.*data\.choices"),
        ([{**ROW, "answer": {"z": "a"}, "fields": ["x", "y"]}], {}, "row 1 .*an option for each.*'x', 'y'"),
        ([{**ROW, "answer": {"x": None}, "fields": ["x"]}], {}, r"row 1 .*an option for each.*\['x'\], or for some"),
        ([{**ROW, "depth": "deep"}], {}, "row 1 .*depth 'deep'.*whole number"),
        ([{"question": "?"}], {}, r"'answer'.*\['question'\].*column_mapping"),
        ([ROW], {"column_mapping": {"contxt": "a"}}, "contxt.*canonical columns"),
        ([{**ROW, "depth": 2}], {"train_depths": [7]}, r"train_depths=\[7\].*'2'"),
        ([ROW], {"train_split": "training"}, r"train_split='training'.*\['train'\]"),
        ([ROW], {"train_split": "train[3]"}, r"'train\[3\]'.*slice"),
        ([ROW], {"train_split": "train[:0]"}, "no train rows"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused(tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        load(rows, tmp_path, **settings)
    assert "\n" not in str(error.value)


def test_bad_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path.*data\.hub_id.*data\.reasoning_gym"):
        load_examples(DataConfig(), "train")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl.*does not exist"):
        load_examples(DataConfig(path=str(tmp_path / "nowhere.jsonl")), "train")
    for name, text in (("rows.txt", "a"), ("rows.jsonl", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}.*\.jsonl, \.csv, \.parquet"):
            load_examples(DataConfig(path=str(tmp_path / name)), "train")
    (tmp_path / "rows.jsonl").write_text('{"question": ')
    with pytest.raises(ValueError, match=r"rows\.jsonl.*json"):
        load_examples(DataConfig(path=str(tmp_path / "rows.jsonl")), "train")
    with pytest.raises(ValueError, match="expected 'train', 'valid' or 'test'"):
        load_examples(DataConfig(path=str(STEPGAME)), "dev")


# Procedural tasks


def test_sudoku_is_a_grid_of_fields():
    pytest.importorskip("reasoning_gym")
    config = DataConfig(reasoning_gym="mini_sudoku", max_train_examples=8, task_parameters={"max_empty": 9})
    for example in load_examples(config, "train"):
        assert [field.name for field in example.fields[:5]] == ["r1c1", "r1c2", "r1c3", "r1c4", "r2c1"]
        assert all(field.options == ("1", "2", "3", "4") for field in example.fields)
        given = example.context.split()
        assert [example.context[field.at] for field in example.fields] == given
        assert given.count("_") == example.depth <= 9
        assert all(cell in ("_", answer) for cell, answer in zip(given, example.answers, strict=True))
        lines = [example.answers[row : row + 4] for row in (0, 4, 8, 12)]
        assert all(sorted(line) == list("1234") for line in [*lines, *zip(*lines, strict=True)])


def test_the_training_puzzles_are_generated_once(monkeypatch):
    factory = pytest.importorskip("reasoning_gym.factory")
    create, sizes = factory.create_dataset, []

    def counted(task, **settings):
        sizes.append(settings["size"])
        return create(task, **settings)

    monkeypatch.setattr(factory, "create_dataset", counted)
    config = DataConfig(reasoning_gym="mini_sudoku", max_train_examples=11, max_eval_examples=3, seed=77)
    first = load_examples(config, "train")
    load_examples(config, "valid")
    assert load_examples(config, "train") == first and sizes == [11, 3]


def test_cells_of_a_large_sudoku_stand_at_their_digits():
    pytest.importorskip("reasoning_gym")
    for example in load_examples(DataConfig(reasoning_gym="sudoku", max_train_examples=4), "train"):
        given = [example.context[field.at] for field in example.fields]
        assert len(given) == 81 and given.count("0") == example.depth
        assert all(cell in ("0", answer) for cell, answer in zip(given, example.answers, strict=True))


def test_fields_of_a_file_may_stand_in_the_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    fields = [{"name": "first", "options": ["1", "2"], "at": 0}, {"name": "second", "options": ["1", "2"], "at": 2}]
    row = {"question": "1 ?", "fields": fields, "answer": {"first": "1", "second": "2"}}
    path.write_text(json.dumps(row) + "\n")
    [example] = load_examples(DataConfig(path=str(path)), "train")
    assert example.fields == (Field("first", "12", at=0), Field("second", "12", at=2))
    [nowhere] = load_examples(DataConfig(path=str(path), places=False), "train")
    assert nowhere.fields == (Field("first", "12"), Field("second", "12"))
    elsewhere = replace(example, fields=(replace(example.fields[0], at=1), example.fields[1]))
    assert data_fingerprint([example]) != data_fingerprint([elsewhere])


def test_fields_may_be_asked_without_an_answer(tmp_path):
    rows = [{**ROW, "fields": ["x", "y"], "answer": {"y": "a"}}, {**ROW, "fields": ["x"], "answer": {"x": "b"}}]
    one, other = load(rows, tmp_path)
    assert [field.name for field in one.fields] == ["x", "y"] and one.answers == (None, "a")
    assert one.answered == [(one.fields[1], "a")] and other.answered == [(other.fields[0], "b")]


def test_answers_may_be_due_later(tmp_path):
    rows = [{**ROW, "fields": ["x", "y"], "answer": {"x": "a", "y": "a"}, "due": {"y": 3}}, {**ROW, "due": {}}]
    one, other = load(rows, tmp_path)
    assert one.due == (1, 3) and other.due is None
    assert data_fingerprint([one]) != data_fingerprint([replace(one, due=None)])
    for due, message in (
        ({"y": 0}, "due .*'y: 0'.*from 1"),
        ({"z": 1}, r"due names \['z'\].*\['x', 'y'\]"),
        ("soon", "due 'soon'.*mapping"),
        ([1], r"due \[1\].*mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            load([rows[0] | {"due": due}], tmp_path)


def test_fields_can_stand_where_their_names_are(tmp_path):
    row = {"context": "Annabel met Ann.", "question": "Did Bo?", "fields": ["Ann", "Bo", "Cy"], "choices": ["1", "2"]}
    [example] = load([row | {"answer": dict.fromkeys(row["fields"], "1")}], tmp_path, find_names=True)
    assert [field.at for field in example.fields] == [12, 21, None]
    [example] = load([row | {"answer": dict.fromkeys(row["fields"], "1")}], tmp_path)
    assert {field.at for field in example.fields} == {None}
    with pytest.raises(ValueError, match=r"data\.find_names=True: expected false where data\.places is false"):
        DataConfig(path="x", find_names=True, places=False)


def test_the_answer_can_stand_at_the_end_of_the_question(tmp_path):
    row = {"question": "Did Bo?", "choices": ["yes", "no"]}
    [example] = load([row | {"answer": "no"}], tmp_path, answer_at=-1)
    assert example.fields == (Field("answer", ["yes", "no"], at=-1),)
    named = [{"name": name, "options": ["yes", "no"], "at": at} for name, at in (("Bo", 4), ("Cy", None))]
    [example] = load([row | {"fields": named, "answer": {"Bo": "no"}}], tmp_path, answer_at=-1)
    assert [field.at for field in example.fields] == [4, None]
    with pytest.raises(ValueError, match=r"data\.answer_at=-1: expected null where data\.places is false"):
        DataConfig(path="x", answer_at=-1, places=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": 3}, "row 1 of split 'train' .*: field 'only' stands at character 3: context and question have 3"),
        ({"at": -4}, "row 1 of split 'train' .*: field 'only' stands at character -4: context and question have 3"),
        ({"at": True}, "at=True: expected a character's number, from 0, or -1 for the last"),
        ({"question": " 1 ?"}, "give context and question as texts, no space around them"),
        ({"context": ["A", "B"]}, "give context and question as texts, no space around them"),
    ],
)
def test_places_outside_of_the_text(tmp_path, changes, message):
    path = tmp_path / "rows.jsonl"
    field = {"name": "only", "options": ["1", "2"], "at": changes.pop("at", 0)}
    path.write_text(json.dumps({"question": "1 ?", "fields": [field], "answer": {"only": "1"}} | changes) + "\n")
    with pytest.raises(ValueError, match=message):
        load_examples(DataConfig(path=str(path)), "train")


def test_knights_and_knaves_are_fields_by_name():
    pytest.importorskip("reasoning_gym")
    config = DataConfig(reasoning_gym="knights_knaves", max_train_examples=20, task_parameters={"n_people": 3})
    for example in load_examples(config, "train"):
        assert example.depth == len(example.fields) == 3 and example.question.endswith("?")
        starts = [field.at for field in example.fields]
        assert starts == sorted(starts) and example.context[: starts[0]].endswith(" 3 inhabitants: ")
        assert all(
            example.context[field.at :].startswith((f"{field.name},", f"{field.name}.")) for field in example.fields
        )
        for field, answer in zip(example.fields, example.answers, strict=True):
            assert field.name in example.context and answer in example.question
        assert "Format" not in example.context + example.question


def test_procedural_rows_of_several_sizes():
    pytest.importorskip("reasoning_gym")
    sizes = [{"n_people": 2}, {"n_people": 4}]
    config = DataConfig(reasoning_gym="knights_knaves", max_train_examples=10, task_parameters=sizes)
    assert [example.depth for example in load_examples(config, "train")] == [2] * 5 + [4] * 5
    with pytest.raises(ValueError, match=r"task_parameters=\{'people': 2\}"):
        load_examples(replace(config, task_parameters=[{"n_people": 2}, {"people": 2}]), "train")


def test_procedural_splits_and_seeds_share_nothing():
    pytest.importorskip("reasoning_gym")
    settings = {"reasoning_gym": "family_relationships", "max_train_examples": 60, "max_eval_examples": 30}
    first = load_examples(DataConfig(**settings), "train")[0]
    assert (first.question[:8], first.context[-1]) == ("What is ", ".") and first.depth in (1, 2)
    config = DataConfig(**settings, column_mapping={"depth": "family_size"})
    roles = {role: load_examples(config, role) for role in ("train", "valid", "test")}
    assert len(roles["train"]) == 60 and set(by_depth(roles["train"])) <= {4, 5, 6, 7, 8}
    assert roles["train"] == load_examples(config, "train")
    texts = [questions(examples) for examples in roles.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert not texts[0] & questions(load_examples(DataConfig(**settings, seed=1), "train"))


def test_questions_of_training_are_dropped_from_evaluation():
    pytest.importorskip("reasoning_gym")  # 50 different questions at most
    settings = {"max_train_examples": 30, "max_eval_examples": 100, "choices": ["0", "1", "2", "3", "4", "5", "6"]}
    config = DataConfig(reasoning_gym="count_bits", task_parameters={"min_n": 1, "max_n": 50}, **settings)
    train, valid = load_examples(config, "train"), load_examples(config, "valid")
    assert 0 < len(valid) < 100 and not questions(train) & questions(valid)


def test_bad_tasks_are_refused():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="sudokus.*sudoku, mini_sudoku"):
        load_examples(DataConfig(reasoning_gym="sudokus"), "train")
    with pytest.raises(ValueError, match=r"data\.valid_split='train\[-5%:\]': generated rows"):
        load_examples(DataConfig(reasoning_gym="sudoku", valid_split="train[-5%:]"), "train")
    with pytest.raises(ValueError, match="task_parameters.*sudoku.*'colour'"):
        load_examples(DataConfig(reasoning_gym="sudoku", task_parameters={"colour": 1}), "train")


# Fingerprint


def test_fingerprint_knows_content_and_order(tmp_path):
    examples = load(numbered(6), tmp_path)
    assert data_fingerprint(examples) == data_fingerprint(load(numbered(6), tmp_path))
    others = [examples[::-1], examples[1:], load(numbered(6), tmp_path, column_mapping={"question": "{question}!"})]
    assert len({data_fingerprint(each) for each in [examples, *others]}) == 4
    assert data_fingerprint(load_examples(DataConfig(path=str(STEPGAME)), "test")) == "42be1dc5daab6cdf"


# Shipped configs


def parse(config: Path, *flags: str) -> RunConfig:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig)
    values = parser.instantiate(parser.parse_args([f"--config={config}", *flags]))
    return RunConfig(**{name: values[name] for name in RunConfig.__dataclass_fields__})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_says_how_to_run_it(config):
    run, text = parse(config), config.read_text()
    assert bool(run.data.hub_id) != bool(run.data.reasoning_gym)
    assert run.training.output_folder == f"runs/{config.stem}"
    assert all(stage.start < run.training.num_updates for stage in run.training.recursion_schedule)
    for words in (
        f"hybrid train configs/{config.name}",
        *(["--data.path"] if run.data.hub_id else []),
        "Expected time:",
        "Expected score:",
        "Floors:",
    ):
        assert words in text


@pytest.mark.parametrize(("name", "sample"), [("stepgame", STEPGAME), ("knights_knaves", KNIGHTS)])
def test_config_reads_the_shipped_sample(name, sample):
    data = parse(HERE.parent / f"configs/{name}_smollm2.yaml", f"--data.path={sample}").data
    roles = {role: load_examples(data, role) for role in ("train", "valid", "test")}
    assert all(roles.values()) and not questions(roles["train"]) & questions(roles["valid"])


@pytest.mark.parametrize("name", LOCAL_COPIES)
def test_config_reads_the_local_copy(name):
    file, role, at_least = LOCAL_COPIES[name]
    if not (SHARED / file).exists():
        pytest.skip("no local copy")
    data = parse(HERE.parent / f"configs/{name}_smollm2.yaml", f"--data.path={SHARED / file}").data
    assert len(load_examples(data, role)) >= at_least
