"""Questions as documents of lm-evaluation-harness, so that the harness asks what `hybrid eval` asks.

A shipped task (`hybrid/tasks/*.yaml`) holds a `data` section as in `configs/`, read here as everywhere else. Each
field of a question is a document of its own, with the prompt that a language model gets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import datasets

from hybrid.baselines import answer_prompt
from hybrid.config import DataConfig
from hybrid.data import VALID_NAMES, Example, load_examples, read_path, spread_depths, sudoku_row
from hybrid.decoder import Field, read_fields

TASKS = Path(__file__).parent / "tasks"
MAX_TRAIN_EXAMPLES = 1000  # few-shot examples are drawn from these; lm-eval lists them all before anything else


class Documents(dict[str, datasets.Dataset]):
    """The splits `train`, `valid` and `test` of a task, each read when it is first asked for.

    Every stretch of a split holds each depth equally often, so that `--limit` takes the questions that
    `hybrid eval --max_examples` takes.

    Args:
        read: Reads the examples of a split.
    """

    def __init__(self, read: Callable[[str], Sequence[Example]]):
        super().__init__()
        self._read, self._examples = read, {}

    def __missing__(self, split: str) -> datasets.Dataset:
        rows = [row for example in self.examples(split) for row in documents_of(example)]
        self[split] = datasets.Dataset.from_list(rows)
        return self[split]

    def examples(self, split: str) -> list[Example]:
        """The examples of a split, in the order of their documents."""
        if split not in self._examples:
            found = self._read(split)
            self._examples[split] = [found[row] for row in spread_depths(found, seed=0, proportional=False)]
        return self._examples[split]


def documents_of(example: Example) -> list[dict[str, Any]]:
    """A document for each field with an answer: what is asked, the options, the answer, a language model's prompt."""
    fields = json.dumps([asdict(field) for field in example.fields])
    shared = {"id": example.id, "depth": example.depth, "context": example.context, "question": example.question}
    return [
        {
            **shared,
            "fields": fields,
            "field": field.name,
            "choices": list(field.options),
            "answer": answer,
            "prompt": answer_prompt(example, field),
        }
        for field, answer in example.answered
    ]


def is_document(document: Any) -> bool:
    """Whether a document of a task is one of ours."""
    return isinstance(document, Mapping) and {"context", "question", "fields", "field", "prompt"} <= document.keys()


def fields_of(document: Mapping[str, Any]) -> tuple[Field, ...]:
    """All fields of the question that a document belongs to."""
    return _fields(document["fields"])


@lru_cache(maxsize=1024)  # the cells of a grid are as many documents with the same fields
def _fields(text: str) -> tuple[Field, ...]:
    return tuple(read_fields(json.loads(text)))


# -- what the YAML files name: each takes `dataset_kwargs` and, ignored, what lm-eval adds to them ------------------


def load(data: Mapping[str, Any], data_files: str | None = None, **metadata: Any) -> Documents:
    """Documents of a `data` section.

    Args:
        data: Keys of `DataConfig`.
        data_files: A local copy in the source's columns or in canonical ones, instead of the Hub.
        **metadata: Ignored.
    """
    config = DataConfig(**data)
    config.path = data_files or config.path
    few = replace(config, max_train_examples=min(config.max_train_examples or MAX_TRAIN_EXAMPLES, MAX_TRAIN_EXAMPLES))
    # What is generated leaves out training questions, of which a head may have seen all.
    return Documents(lambda split: load_examples(few if split == "train" else config, split))


def load_sudoku(data: Mapping[str, Any], data_files: str | None = None, **metadata: Any) -> Documents:
    """As `load`; a puzzle on the Hub is two lines of digits, with a `.` where a cell is empty."""
    if data_files is not None:
        return load(data, data_files)
    config = DataConfig(**data)

    def read(split: str) -> list[Example]:
        name = getattr(config, f"{split}_split")
        at: dict[str, Any] = {"name": config.hub_config, "revision": config.revision}
        rows = datasets.load_dataset(str(config.hub_id), split=name, **at)
        return [sudoku_example(cast(Mapping[str, str], row), f"{split}-{n}") for n, row in enumerate(rows, start=1)]

    return Documents(read)


def sudoku_example(row: Mapping[str, str], name: str) -> Example:
    """An example from `question` and `answer`, the cells of a grid line after line."""
    size = math.isqrt(len(row["question"]))
    puzzle, solution = (
        [
            [int(cell) if cell.isdigit() else 0 for cell in row[column][start : start + size]]
            for start in range(0, size * size, size)
        ]
        for column in ("question", "answer")
    )
    num_empty = sum(line.count(0) for line in puzzle)
    canonical = sudoku_row({"puzzle": puzzle, "solution": solution, "num_empty": num_empty})
    fields = tuple(read_fields(canonical["fields"]))
    answers = tuple(canonical["answer"].values())
    return Example(canonical["context"], canonical["question"], fields, answers, num_empty, name)


def read_splits(data_files: str, splits: Sequence[str], **metadata: Any) -> dict[str, datasets.Dataset]:
    """A local copy of the data of any other task, in that task's own columns.

    Args:
        data_files: A file, split by its column `split`, or a folder with a file for each split. A file without the
            column is the split to evaluate, whichever that is (`has_splits`).
        splits: The splits that the task names.
        **metadata: Ignored.

    Raises:
        ValueError: A split is missing.
    """
    found = cast(dict[str, datasets.Dataset], read_path(Path(data_files).expanduser()))
    if not has_splits(data_files):
        return dict.fromkeys(splits, found["train"])
    for split in splits:
        same = next((name for name in VALID_NAMES if name in found), split) if split in VALID_NAMES else split
        if same not in found:
            raise ValueError(f"{data_files} has no split {split!r}, which the task names; there are {sorted(found)}")
        found[split] = found[same]
    return found


def has_splits(data_files: str) -> bool:
    """Whether a local copy tells its splits apart."""
    path = Path(data_files).expanduser()
    return path.is_dir() or "split" in cast(datasets.Dataset, next(iter(read_path(path).values()))).column_names
