"""Sources to canonical examples: a local file, a Hub data set or a procedural task, all read through `datasets`.

A source has splits, a split has rows, and `column_mapping` names what makes an example of a row. What a later stage
could trip over (a missing column, an answer outside the options) is refused here, before anything is embedded.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import operator
import random
import re
import reprlib
import string
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, cast

import datasets
import pandas
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from hybrid.backbone import one_text
from hybrid.config import DataConfig
from hybrid.decoder import Field, is_unnamed, named

ROLES = ("valid", "test", "train")  # in this order they cut slices of a split; what one takes, the next do not see
COLUMNS = ("context", "question", "answer", "choices", "fields", "due", "depth", "id", "answer_text")
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
VALID_NAMES = ("valid", "validation", "val", "dev")  # one split under four names
SLICE = re.compile(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")  # train[-1000:], train[:90%]
JSON = ('["', "[{", '{"')  # how a text begins that is a list or mapping in JSON
MAX_ANSWERS = 1000  # of the training split, which are the options where no choices are given
SEED_STRIDE = 10_000_000  # reasoning_gym seeds row i with seed + i: splits and seeds must lie further apart than rows

Rows = datasets.Dataset | list[dict[str, Any]]
Bounds = tuple[str | None, str | None]  # start and stop of a slice, as written

_field = lru_cache(maxsize=1024, typed=True)(Field)  # most rows ask for the same


@dataclass(frozen=True)
class Example:
    """One question.

    `answers` holds one option text per field, `None` for one that is asked without being trained or counted; `depth`
    is hops, proof depth or size, if known; `answer_text` is the answer in words, if the source has one; `due` holds
    the refinement step of each field from which training asks for its answer, if that is not the first.
    """

    context: str | None
    question: str
    fields: tuple[Field, ...]
    answers: tuple[str | None, ...]
    depth: int | None
    id: str
    answer_text: str | None = None
    due: tuple[int, ...] | None = None

    @property
    def answered(self) -> list[tuple[Field, str]]:
        """The fields that have an answer, with it."""
        pairs = zip(self.fields, self.answers, strict=True)
        return [(field, answer) for field, answer in pairs if answer is not None]


def load_examples(config: DataConfig, split: str) -> list[Example]:
    """Load the examples of a role (`train`, `valid`, `test`) in the order of the source, sub-sampled by the config.

    `config.train_split` and its like name the split of each role. A slice (`train[-5%:]`) is cut from a shuffle that
    spreads the depths evenly, the same for every seed; `train` sees no question that was cut for another role.

    Raises:
        ValueError: The source, a split, a column or a row is not as expected; the message names it and the fix.
        FileNotFoundError: `config.path` does not exist.

    """
    if split not in ROLES:
        raise ValueError(f"split={split!r}: expected 'train', 'valid' or 'test'")
    if config.path is None and bool(config.hub_id) == bool(config.reasoning_gym):
        raise ValueError("data: set one source: data.path (a local file), data.hub_id or data.reasoning_gym")
    examples = _role_examples(config, split)
    depths = sorted({str(example.depth) for example in examples})
    if split == "train" and config.train_depths is not None:
        examples = [example for example in examples if example.depth in config.train_depths]
    if not examples and not depths:
        raise ValueError(f"no {split} rows are left: other splits are too large a slice, or ask the same questions")
    if not examples:
        raise ValueError(f"no {split} rows: data.train_depths={config.train_depths}, depths of the source {depths}")
    limit = config.max_train_examples if split == "train" else config.max_eval_examples
    return take_examples(examples, limit, config.seed)


def take_examples(examples: Sequence[Example], count: int | None, seed: int) -> list[Example]:
    """Take at most `count` examples, spread evenly over depths, in the order they came; `None` takes all."""
    return [examples[row] for row in sorted(spread_depths(examples, seed, proportional=False)[:count])]


def data_fingerprint(examples: Iterable[Example]) -> str:
    """Hash everything in the examples, and their order, to 16 letters that are the same on every machine."""
    digest, separator = hashlib.sha256(), b""
    for example in examples:
        digest.update(separator + json.dumps(_hashed(example), sort_keys=True).encode())
        separator = b"\n"
    return digest.hexdigest()[:16]


def _hashed(example: Example) -> dict[str, Any]:
    """An example as it was before it could have an answer in words and steps, and fields a place."""
    row = vars(example) | {"fields": [_without_absent(vars(field), "at") for field in example.fields]}
    return _without_absent(row, "answer_text", "due")


def _without_absent(row: dict[str, Any], *columns: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None or key not in columns}


def _role_examples(config: DataConfig, role: str) -> list[Example]:
    if config.path or config.hub_id:
        splits = read_path(Path(config.path).expanduser()) if config.path else _read_hub(config)
        found = {each: _find_split(config, each, splits) for each in ROLES}
        for name in {name for name, _ in found.values()} - set(splits):
            if set(parts := name.split("+")) <= set(splits):
                splits[name] = datasets.concatenate_datasets([cast(datasets.Dataset, splits[part]) for part in parts])
    else:
        for each in ROLES:
            if (value := getattr(config, f"{each}_split")) != each:
                raise ValueError(f"data.{each}_split={value!r}: generated rows have train, valid and test; omit it")
        splits = {each: _generate(config, each) for each in dict.fromkeys(("train", role))}
        found = {each: (each, None) for each in ROLES}
    name, bounds = found[role]
    if name not in splits:
        raise ValueError(
            f"data.{role}_split={name!r}: there are {sorted(splits)}; name one, or a slice kept from training"
            " ('train[-5%:]'); `hybrid eval --split valid` reads the validation rows"
        )
    train_rows, taken = splits.get(found["train"][0], []), []
    examples = _to_examples(config, name, splits[name], train_rows)
    for other, other_bounds in (found[each] for each in ROLES[: ROLES.index(role)]):
        if other_bounds and set(other.split("+")) & set(name.split("+")):
            rows = examples if other == name else _to_examples(config, other, splits[other], train_rows)
            taken += _cut(rows, other_bounds)
    if config.path is None and config.hub_id is None and role != "train":  # generated questions can coincide
        taken = _to_examples(config, "train", train_rows, train_rows)
    texts = {(example.context, example.question) for example in taken}
    return [example for example in _cut(examples, bounds) if (example.context, example.question) not in texts]


def _find_split(config: DataConfig, role: str, present: Iterable[str]) -> tuple[str, Bounds | None]:
    """Find what the source calls the split of a role, and the bounds if it is a slice."""
    value = getattr(config, f"{role}_split")
    if (match := SLICE.fullmatch(value)) is None:
        raise ValueError(f"data.{role}_split={value!r}: expected a split or a slice of one, such as 'train[-1000:]'")
    name, start, stop = match.groups()
    if name not in present and name in VALID_NAMES:
        name = next((other for other in VALID_NAMES if other in present), name)
    return name, (start, stop) if "[" in value else None


def _cut(examples: list[Example], bounds: Bounds | None) -> list[Example]:
    rows = spread_depths(examples, seed=0, proportional=True)
    start, stop = (
        None if b is None else len(rows) * int(b[:-1]) // 100 if "%" in b else int(b) for b in bounds or (None, None)
    )
    return [examples[row] for row in sorted(rows[start:stop])]


def spread_depths(examples: Sequence[Example], seed: int, *, proportional: bool) -> list[int]:
    """Shuffle row numbers so that every stretch holds each depth, by its share or all depths equally often."""
    sizes, seen, places = Counter(example.depth for example in examples), Counter(), []
    for row in random.Random(seed).sample(range(len(examples)), len(examples)):
        depth = examples[row].depth
        places.append(((seen[depth] + 0.5) / (sizes[depth] if proportional else 1), str(depth), row))
        seen[depth] += 1
    return [row for *_, row in sorted(places)]


def read_path(path: Path) -> dict[str, Rows]:
    """Read a file, split by its column `split` if it has one, or a folder with one file per split."""
    if not path.exists():
        raise FileNotFoundError(
            f"data.path={str(path)!r} does not exist: expected a file, or a folder of files; `hybrid eval HEAD --data`"
            " takes another one"
        )
    if path.is_dir():
        return {file.stem: _read_file(file) for file in sorted(path.iterdir()) if file.suffix in READERS}
    rows = _read_file(path)
    if "split" not in rows.column_names:
        return {"train": rows}
    names = rows["split"][:]
    return {str(name): rows.select([i for i, x in enumerate(names) if x == name]) for name in dict.fromkeys(names)}


def _read_file(path: Path) -> datasets.Dataset:
    about = path.stat()
    return _read_rows(path, (about.st_size, about.st_mtime_ns))


@lru_cache(maxsize=4)  # every role of a run asks for the file; one that has changed since is read anew
def _read_rows(path: Path, _version: tuple[int, int]) -> datasets.Dataset:
    if path.suffix not in READERS or path.stat().st_size == 0:
        raise ValueError(f"data.path={str(path)!r}: expected a file with rows that ends in {', '.join(READERS)}")
    kind = READERS[path.suffix]
    try:
        if path.suffix == ".csv":  # as text, else a grid of digits were a number; "None" and "NA" are texts, too
            table = pandas.read_csv(path, dtype=str, keep_default_na=False, na_values=[""], index_col=False)
            return datasets.Dataset.from_pandas(table, preserve_index=False)
        # The cache is thrown away and the rows stay in memory: works offline and where nothing may be written.
        with tempfile.TemporaryDirectory() as folder:
            return datasets.load_dataset(
                kind, data_files={"rows": str(path)}, split="rows", cache_dir=folder, keep_in_memory=True
            )
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"data.path={str(path)!r} cannot be read as {kind}: {reason}") from error


def _read_hub(config: DataConfig) -> dict[str, Rows]:
    assert config.hub_id is not None
    hub_id = config.hub_id
    at: dict[str, Any] = {"revision": config.revision}
    try:
        if config.hub_config is None:
            names = datasets.get_dataset_config_names(hub_id, **at)
            if config.train_split.partition("[")[0] in names:  # Knights & Knaves: configurations are the splits
                parts = {name: datasets.load_dataset(hub_id, name, **at) for name in names}
                return {name: datasets.concatenate_datasets(list(part.values())) for name, part in parts.items()}
        # The Hub's own Parquet export of a loading script has folders where the script had configurations.
        key = "data_dir" if config.revision == "refs/convert/parquet" else "name"
        return dict(datasets.load_dataset(hub_id, **at, **{key: config.hub_config}))
    except (DatasetNotFoundError, ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(f"data.hub_id={hub_id!r}: {reason}; a local copy can be given as data.path") from error


def _to_examples(config: DataConfig, split: str, rows: Rows, train_rows: Rows) -> list[Example]:
    canonical, choices, examples = _canonical_rows(config, rows), config.choices, []
    if choices is None and any(row.get("choices") is None and row.get("fields") is None for row in canonical):
        # A closed vocabulary: the answers of the training split alone, lest the options tell of the test answers.
        trained = _canonical_rows(config, train_rows)
        answers = [row["answer"] for row in trained]
        choices = sorted({str(answer).strip() for answer in answers if answer is not None}) or None
        bare = {str(row["answer"]) for row in trained if row.get("choices") is None and row.get("fields") is None}
        if len(bare) > MAX_ANSWERS:
            raise ValueError(
                f"{len(bare):,} different answers and no choices, and a head chooses: give each question its own "
                "(a column `choices`), or list all of them in data.choices"
            )
    for number, row in enumerate(canonical, start=1):
        name = f"{split}-{number}" if row.get("id") is None else str(row["id"])
        try:
            example = _to_example(row, choices, name)
        except ValueError as error:
            raise ValueError(f"row {number} of split {split!r} (id {name!r}): {error}") from None
        examples.append(replace(example, fields=_placed(config, example)))
    return examples


def _canonical_rows(config: DataConfig, rows: Rows) -> list[dict[str, Any]]:
    if len(rows) == 0:
        return []
    sources = _column_sources(config, list(rows[0]))
    if isinstance(rows, datasets.Dataset):
        rows = rows.select_columns(sorted({name for _, names in sources.values() for name in names}))
        if dates := sorted(name for name, kind in rows.features.items() if "Value('timestamp" in str(kind)):
            raise ValueError(
                f"columns {dates} were read as dates, and would be other texts: a CSV file keeps them as text"
            )
        texts = {name: kind.names for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
        mixed = {name for name, kind in rows.features.items() if str(kind).startswith("Json")}
        rows = [row | {k: texts[k][row[k]] for k in texts if row[k] is not None} for row in rows.to_list()]
        texts_of = (sources[column][1] for column in ("context", "question", "answer") if column in sources)
        for name in sorted(mixed & {name for names in texts_of for name in names}):
            if any(isinstance(row[name], bool | int | float) for row in rows):
                raise ValueError(
                    f"column {name!r} mixes texts and numbers, and a text like '7' becomes one: quote all"
                )
    return [{key: _value(row, source) for key, (source, _) in sources.items()} for row in rows]


def _value(row: Mapping[str, Any], source: str) -> Any:
    """What a row has in a column, at a path into one (`choices.text`), or in a format string over several."""
    try:
        if "{" in source:
            text = source.format(**{name: "" if value is None else value for name, value in row.items()})
            has_gap = any(row.get(name) is None for name in _columns_read(source, list(row)))
            return re.sub(" {2,}", " ", text).strip(" ") if has_gap else text
        first = source.partition(".")[0]
        if source in row or first == source:
            return row.get(source)
        values = row[first] if isinstance(row[first], list) else [row[first]]
        if first in COLUMNS and all(isinstance(value, str) for value in values):  # a local copy in canonical columns
            return row[first]
        return reduce(operator.getitem, source.split("."), row)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        shown = reprlib.repr(dict(row))
        raise ValueError(f"data.column_mapping: {source!r} finds nothing in {shown}: {error!r}") from error


def _column_sources(config: DataConfig, present: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
    """Find the source of each canonical column, a column or a format string, and the columns that it reads.

    A file with none of the mapped columns is read in canonical ones.
    """
    if unknown := sorted(set(config.column_mapping) - set(COLUMNS)):
        raise ValueError(f"data.column_mapping has {unknown}: the canonical columns are {list(COLUMNS)}")
    read = [_columns_read(source, present) for source in config.column_mapping.values()]
    is_canonical = not any(set(names) <= set(present) for names in read) and {"question", "answer"} <= set(present)
    for name in sorted({name for names in read for name in names}) if is_canonical else ():
        if close := difflib.get_close_matches(name, set(present) - set(COLUMNS), cutoff=0.8):
            raise ValueError(f"data.column_mapping names {name!r}: is {close[0]!r} meant, of {sorted(present)}?")
    mapping = {} if is_canonical else config.column_mapping
    other = sorted(set(present) - set(COLUMNS) - {"split"} - {name for names in read for name in names})
    if is_canonical and "context" not in present and "context" in config.column_mapping:
        source = config.column_mapping["context"]
        warnings.warn(f"no column {source!r} and no 'context': questions have none; not read: {other}", stacklevel=2)
    for column in (column for column in COLUMNS if column != "id" and column not in {*present, *mapping}):
        if close := difflib.get_close_matches(column, other, n=1, cutoff=0.8):
            warnings.warn(f"column {close[0]!r} is not read: is {column!r} meant?", stacklevel=2)
    sources = {}
    for column in COLUMNS:
        source = mapping.get(column, column)
        names = _columns_read(source, present)
        missing = [name for name in names if name not in present]
        if not missing:
            sources[column] = source, names
        elif column in present:  # so that one config reads the Hub's columns and a local copy in canonical ones
            sources[column] = column, [column]
        elif column in mapping or column in ("question", "answer"):
            hint = f"the columns are {sorted(present)}; name the right one in data.column_mapping"
            raise ValueError(f"{column!r} is to come from the column {missing[0]!r}: {hint}")
    return sources


def _columns_read(source: str, present: Sequence[str]) -> list[str]:
    """The columns that a source names: one, one with a path into it, or those of a format string."""
    if "{" in source:
        return [re.split(r"[.\[]", part[1])[0] for part in string.Formatter().parse(source) if part[1]]
    return [source if source in present else source.partition(".")[0]]


def _to_example(row: Mapping[str, Any], choices: Sequence[str] | None, name: str) -> Example:
    texts = (row.get("context") or "", row["question"] or "")
    context, question = _one_line("context", texts[0]), _one_line("question", texts[1])
    if not question:
        raise ValueError("the question is empty")
    values = (row.get(column) for column in ("answer", "fields", "choices"))  # a table holds mappings as JSON
    answer, given, options = (json.loads(v) if isinstance(v, str) and v[:2] in JSON else v for v in values)
    options = choices if options is None else options
    if isinstance(answer, Mapping):  # None: a key of other rows, where `datasets` gave all rows the same keys
        answer = {key: value for key, value in answer.items() if value is not None}
        given = list(answer) if given is None else given
    elif given is None:
        given, answer = ["answer"], {"answer": answer}
    # A field is {name, options, at}, or a name; its options are the choices where it has none of its own.
    listed = [{"name": f} if isinstance(f, str) else f for f in cast(list[Any], given)]
    if nameless := [f for f in listed if not (isinstance(f, Mapping) and "name" in f)]:
        raise ValueError(f"fields {nameless}: each needs a name")
    asked: dict[str, Any] = {f["name"]: options if f.get("options") is None else f["options"] for f in listed}
    places = {f["name"]: f.get("at") for f in listed}
    if isinstance(answer, list) and len(answer) == len(asked):
        answer = {key: value for key, value in zip(asked, answer, strict=True) if value is not None}
    if not isinstance(answer, Mapping) or not answer or not set(answer) <= set(asked):
        raise ValueError(f"answer {answer!r}: expected an option for each of the fields {list(asked)}, or for some")
    if wrong := {key: values for key, values in asked.items() if not isinstance(values, list | tuple)}:
        raise ValueError(f"choices of the fields {wrong}: expected lists of texts, or set data.choices")
    fields = tuple(
        (_field if isinstance(at := places.get(key), int | None) else Field)(
            key, tuple(str(value).strip() for value in values if value is not None), at
        )
        for key, values in asked.items()
    )
    if any(field.at is not None for field in fields):
        _check_places(fields, texts, (context, question))
    answers = tuple(_pick(field, answer[field.name]) if field.name in answer else None for field in fields)
    words, due = row.get("answer_text"), _to_due(row.get("due"), fields)
    depth, words = _to_depth(row.get("depth")), str(words) if words else None
    return Example(context or None, question, fields, answers, depth, name, words, due)


def _one_line(column: str, value: Any) -> str:
    """A text or a number, or a list of them joined by spaces."""
    texts = value if isinstance(value, list) else [value]
    if nested := [text for text in texts if isinstance(text, list | Mapping)]:
        shown = reprlib.repr(nested[0])
        raise ValueError(
            f"{column} {shown}: expected a text or a list of texts; data.column_mapping takes a path to it"
        )
    return " ".join(str(text) for text in texts if text is not None).strip()


def _check_places(fields: Sequence[Field], given: tuple[Any, Any], texts: tuple[str, str]) -> None:
    if given != texts:
        raise ValueError("fields with `at` count characters: give context and question as texts, no space around them")
    length = len(one_text(*texts))
    for field in fields:
        if field.at is not None and not -length <= field.at < length:
            raise ValueError(
                f"field {field.name!r} stands at character {field.at}: context and question have {length}"
            )


def _to_due(value: Any, fields: Sequence[Field]) -> tuple[int, ...] | None:
    """The step from which each field is asked for: 1 where nothing is said."""
    given = json.loads(value) if isinstance(value, str) and value[:2] in JSON else value
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"due {value!r}: expected a mapping from fields to refinement steps; another column's name?")
    steps = {name: step for name, step in (given or {}).items() if step is not None}
    if not steps:
        return None
    if wrong := [f"{name}: {step}" for name, step in steps.items() if type(step) is not int or step < 1]:
        raise ValueError(f"due {wrong}: expected the number of a refinement step, from 1")
    if unknown := sorted(set(steps) - {field.name for field in fields}):
        raise ValueError(f"due names {unknown}: the fields are {[field.name for field in fields]}")
    return tuple(steps.get(field.name, 1) for field in fields)


def _placed(config: DataConfig, example: Example) -> tuple[Field, ...]:
    """The fields of an example where the configuration wants them to stand."""
    fields = example.fields
    if not config.places:
        return tuple(replace(field, at=None) for field in fields)
    if is_unnamed(fields) and fields[0].at is None:
        return (replace(fields[0], at=config.answer_at),)
    if not config.find_names:
        return fields
    text = one_text(example.context, example.question)
    return tuple(replace(field, at=named(field.name, text)) if field.at is None else field for field in fields)


def _pick(field: Field, value: Any) -> str:
    """Find the option that an answer means: by text, or by letter or truth value where these are no options."""
    text = "" if value is None else str(value).strip()
    if text in field.options:
        return text
    truth = value if isinstance(value, bool) else {"true": True, "false": False}.get(text.lower())
    if truth is not None and len(field.options) == 2:
        affirmative = [option for option in field.options if option.lower() in ("true", "yes")]
        if affirmative:
            return next(option for option in field.options if (option in affirmative) == truth)
        if isinstance(value, bool):
            return field.options[value]  # false, true
    letters = string.ascii_uppercase[: len(field.options)]
    if len(text) == 1 and text in letters and all(len(option) > 1 for option in field.options):
        return field.options[letters.index(text)]
    shown = f"{list(field.options[:12])}{'' if len(field.options) <= 12 else f' and {len(field.options) - 12} more'}"
    raise ValueError(f"{field.name} {value!r} is not among the choices {shown}: data.choices can list them all")


def _to_depth(value: Any) -> int | None:
    """Read a number, the number at the end of a text (`task_1.3`), or the length of a list."""
    if value is None or isinstance(value, list):
        return None if value is None else len(value)
    text, end = str(value).strip(), r"(\d+)(?:\.0+)?"
    is_number = re.fullmatch(r"[+-]?[\d.,]+(e[+-]?\d+)?", text)
    if (number := re.fullmatch(end, text) if is_number else re.search(f"{end}$", text)) is None:
        raise ValueError(f"depth {value!r}: expected a whole number")
    return int(number[1])


def _generate(config: DataConfig, role: str) -> list[dict[str, Any]]:
    size = (config.max_train_examples or 10_000) if role == "train" else (config.max_eval_examples or 500)
    seed = (config.seed * len(ROLES) + ROLES.index(role)) * SEED_STRIDE
    several = config.task_parameters if isinstance(config.task_parameters, list) else [config.task_parameters]
    task, rows = str(config.reasoning_gym), []
    for parameters in several:
        settings = {"size": math.ceil(size / len(several)), "seed": seed} | parameters
        try:
            rows += _generate_task(task, json.dumps(settings, sort_keys=True))
        except (TypeError, AssertionError) as error:
            raise ValueError(f"data.task_parameters={parameters}: {task} refuses them: {error}") from error
    to_row = PROCEDURAL.get(task, dict)
    return [to_row({**row["metadata"], **row}) for row in rows]  # metadata are columns, which can be mapped


@lru_cache(maxsize=32)  # every split leaves out what is among the training rows, which take long to generate
def _generate_task(task: str, settings: str) -> list[dict[str, Any]]:
    """Rows of one task, its parameters given as JSON."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise RuntimeError("data.reasoning_gym needs a package: pip install reasoning-gym") from error
    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS) or sorted(DATASETS)
        raise ValueError(f"data.reasoning_gym={task!r} is no task; close ones: {', '.join(close)}")
    return list(create_dataset(task, **json.loads(settings)))


def sudoku_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Write a puzzle (lists of lines, 0 where a cell is empty; `num_empty`) in the canonical columns.

    9×9 grids have one digit a cell and no spaces (`530070000`). Each cell is a field that stands at its digit.
    """
    space, empty = (" ", "_") if len(row["puzzle"]) < 9 else ("", "0")
    puzzle = "\n".join(space.join(str(digit or empty) for digit in line) for line in row["puzzle"])
    cells = {f"r{r}c{c}": str(x) for r, line in enumerate(row["solution"], 1) for c, x in enumerate(line, 1)}
    options = [str(x + 1) for x in range(len(row["puzzle"]))]
    characters = (n for n, letter in enumerate(puzzle) if letter not in " \n")
    fields = [{"name": cell, "options": options, "at": at} for cell, at in zip(cells, characters, strict=True)]
    question = "Which digit belongs in each cell of this Sudoku?"
    return {"context": puzzle, "question": question, "fields": fields, "answer": cells, "depth": row["num_empty"]}


def _knights_knaves(row: Mapping[str, Any]) -> dict[str, Any]:
    context, _, question = row["question"].partition(" (Format")[0].rpartition(" So ")
    options = [str(row["knight_knave_terms"][kind]) for kind in ("knave", "knight")]
    first = {str(name): re.search(rf"\b{name}\b", context) for name in row["names"]}  # where the islanders are listed
    fields = [{"name": name, "options": options, "at": at.start() if at else None} for name, at in first.items()]
    answer = [bool(is_knight) for is_knight in row["solution"]]
    return {"context": context, "question": f"So {question}", "fields": fields, "answer": answer, "depth": len(fields)}


def _family_relationships(row: Mapping[str, Any]) -> dict[str, Any]:
    context, question = row["question"].partition(" Respond only")[0].split("\n\n")
    depth = 1 if row["answer"] in NEXT_OF_KIN else 2
    return {**row, "context": context, "question": question, "depth": depth}


NEXT_OF_KIN = ("husband", "wife", "father", "mother", "son", "daughter")  # others are two links away
PROCEDURAL: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "family_relationships": _family_relationships,
    "knights_knaves": _knights_knaves,
    "mini_sudoku": sudoku_row,
    "sudoku": sudoku_row,
}
