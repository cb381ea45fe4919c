"""`hybrid harness`: a head on tasks of lm-evaluation-harness, beside what one would use instead."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lm_eval
import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from hybrid.baselines import check_zero_shot
from hybrid.batches import embed_examples
from hybrid.config import BackboneConfig, FeatureConfig, TextConfig
from hybrid.documents import TASKS, Documents, has_splits, read_splits
from hybrid.evaluation import accuracy_row, run_steps
from hybrid.harness import FrozenLM, HybridLM, quiet_lm_eval
from hybrid.lora import check_lora_folder, load_lora

SPLITS = {"train": "training_split", "valid": "validation_split", "test": "test_split"}  # as lm-eval's tasks name them
KEPT = (
    "results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config",
    "lm_eval_version", "transformers_version",
)  # fmt: skip

ALSO_KEPT = ("results", "groups", "config")  # of the systems beside the head: the rest is the same


# -- tasks ---------------------------------------------------------------------------------------------------------


def load_tasks(
    names: Sequence[str],
    data: Mapping[str, str] | None = None,
    split: str | None = None,
    include_path: Sequence[str | Path] = (),
    num_fewshot: int | None = None,
) -> tuple[TaskManager, list[Task | Group]]:
    """Load tasks by name, or by a pattern such as `bbh_*`.

    Args:
        names: Names of shipped tasks, of lm-eval's own, or of those in `include_path`.
        data: Task to a local copy of its data (`hybrid.documents`).
        split: `valid`, `test` or `train`; by default what the task says, for shipped ones `valid`.
        include_path: Folders with more tasks.
        num_fewshot: Examples before each question; those of shipped tasks come from the training split.

    Raises:
        ValueError: A task, or the split of one, does not exist, data are given for a group of tasks, or examples come
            from a file without splits.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split={split!r}: expected 'valid', 'test' or 'train'")
    folders: list[str | Path] = [TASKS, *include_path]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):  # lm-eval's 14,000 take some seconds to list
        manager = TaskManager(include_path=folders)
    found = {name: manager.match_tasks([name]) for name in names}
    for name in (name for name, matches in found.items() if not matches):
        shipped = sorted(path.stem for path in TASKS.glob("*.yaml"))
        close = difflib.get_close_matches(name, manager.all_tasks) or shipped
        raise ValueError(f"no task {name!r}; close ones: {', '.join(close)}")
    matches = list(dict.fromkeys(itertools.chain.from_iterable(found.values())))
    data = data or {}
    if unknown := sorted(set(data) - set(matches)):
        raise ValueError(f"data for {unknown[0]!r}: the tasks are {', '.join(matches)}")
    tasks: list[Task | Group] = []
    for name in matches:
        changes = _changes(manager.task_index[name], data.get(name), split, num_fewshot)
        try:
            with quiet_lm_eval():
                tasks += _load(manager, name, changes)
        except RuntimeError as error:  # the Hub is out of reach
            raise RuntimeError(f"task {name}: {error} (--data {name}=FILE)") from error
    return manager, tasks


def flat(tasks: Sequence[Task | Group]) -> list[ConfigurableTask]:
    """Tasks, and those of groups."""
    found = [each for task in tasks for each in (task.get_all_tasks() if isinstance(task, Group) else [task])]
    return cast(list[ConfigurableTask], found)


def _load(manager: TaskManager, name: str, changes: Mapping[str, Any]) -> list[Task | Group]:
    if changes:
        loaded = manager.load([{"group": "changed", "task": [{"task": name, **changes}]}])
        return list(loaded["tasks"].values())
    loaded = manager.load([name])
    return [loaded["groups"][name]] if name in loaded.get("groups", {}) else list(loaded["tasks"].values())


def _changes(entry: Any, data_files: str | None, split: str | None, num_fewshot: int | None) -> dict[str, Any]:
    """What to change in the configuration of a task."""
    config, changes = entry.cfg or {}, {}
    is_shipped = entry.yaml_path is not None and entry.yaml_path.parent == TASKS
    if (data_files or split) and "output_type" not in config:
        raise ValueError(f"task {entry.name!r} is a group or a tag: name its tasks, to choose data or a split")
    if is_shipped and num_fewshot:
        changes |= {"test_split": split or "valid", "fewshot_split": "train"}
    elif is_shipped and split:
        changes["validation_split"] = split
    elif split and config.get(SPLITS[split]) is None:
        present = [key for key in SPLITS.values() if config.get(key)]
        raise ValueError(f"task {entry.name!r} has no {SPLITS[split]}; it has {', '.join(present)}")
    elif split:
        changes["test_split"] = config[SPLITS[split]]
        if split == "train":  # lm-eval leaves out the question asked where it knows that the two are one
            changes["fewshot_split"] = config.get("fewshot_split") or config[SPLITS[split]]
    if data_files and num_fewshot and not is_shipped and not has_splits(data_files):
        raise ValueError(
            f"{data_files} has no column `split`: with num_fewshot={num_fewshot} the examples would be among the"
            " questions; add the column"
        )
    if data_files and is_shipped:
        changes |= {
            "dataset_path": data_files,
            "dataset_kwargs": {**config["dataset_kwargs"], "data_files": data_files},
        }
    elif data_files:
        splits = {config.get(key) for key in (*SPLITS.values(), "fewshot_split")} - {None}
        kwargs = {"data_files": data_files, "splits": sorted(map(str, splits))}
        changes |= {"dataset_path": data_files, "dataset_name": None, "dataset_kwargs": kwargs}
        changes["custom_dataset"] = read_splits
    return changes


# -- a head and others ---------------------------------------------------------------------------------------------


def run_harness(
    head: HybridLM,
    manager: TaskManager,
    tasks: Sequence[Task | Group],
    compare: Sequence[str] = (),
    *,
    use_cache: str | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], dict[str, dict[str, list[Any]]]] | None:
    """Evaluate a head, then others on the same documents with the same choices.

    Args:
        head: The head.
        manager: From `load_tasks`.
        tasks: Likewise.
        compare: `backbone` (the frozen model as `--model hf`), `lora=FOLDER` (likewise, with an adapter), `eval` (the
            head by `hybrid eval`: whole answers, on shipped tasks).
        use_cache: Path of lm-eval's response cache; each system has a file of its own, which knows its weights.
        **settings: `limit`, `num_fewshot`, `apply_chat_template`, `log_samples`, … of `lm_eval.simple_evaluate`.

    Returns:
        Results in lm-eval's fields with `compared` beside them, and samples by system and task if they are logged;
        `None` in all processes but the first.

    Raises:
        ValueError: A task asks for what the head cannot do, or there is nothing of that name to compare with.
    """
    others = dict(_other(head, item) for item in compare if item != "eval")
    own = head.refinement
    if "eval" in compare and (own["rollouts"] > 1 or own["halting"] not in (None, head.model.config.reasoner.halting)):
        raise ValueError("compare eval: it runs one copy that halts as the head does; leave out rollouts and halting")
    for task in flat(tasks):
        _check_servable(head, task)
    rows, samples = [], {}
    for name, make in {"hybrid": lambda: head, **others}.items():
        start, model = time.perf_counter(), make()
        info = json.dumps(model.get_model_info(), sort_keys=True)
        cache = f"{use_cache}-{hashlib.blake2b(info.encode(), digest_size=6).hexdigest()}" if use_cache else None
        found: Any = lm_eval.simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, use_cache=cache, bootstrap_iters=1000, **settings
        )
        if found is not None:
            samples[name] = found.pop("samples", {})
            kept = {key: found[key] for key in (ALSO_KEPT if rows else KEPT) if key in found}
            kept = json.loads(json.dumps(kept, default=handle_non_serializable))
            for config in kept.get("configs", {}).values():
                if source := config.get("metadata", {}).get("config_source"):
                    config["metadata"]["config_source"] = _source(source)
            rows.append({"name": name, "seconds": round(time.perf_counter() - start, 1), **kept})
    if not rows:
        return None
    results = {**rows[0], "split": {task.task_name: _split(task) for task in flat(tasks)}, "compared": rows[1:]}
    if "eval" in compare:
        results["compared"].append(_own_accuracy(head, flat(tasks), results))
    return results, samples


def _source(path: str) -> str:
    """Where a task comes from, without the folder that this package or lm-eval happens to be installed in."""
    packages = (Path(module).parent for module in (__file__, lm_eval.__file__))
    inside = (package for package in packages if Path(path).is_relative_to(package))
    return next((str(Path(path).relative_to(package.parent)) for package in inside), path)


def _other(head: HybridLM, item: str) -> tuple[str, Callable[[], FrozenLM]]:
    """Name of a system, and what makes it when it is its turn."""
    kind, _, folder = item.partition("=")
    if item == "backbone":
        check_zero_shot(head.model.backbone)
        return "frozen LLM", lambda: FrozenLM(head.model.backbone, head.batch_size or 1)
    if kind == "lora" and folder:
        config = _backbone_of_lora(Path(folder), head.model.config.backbone)
        return "LoRA", lambda: FrozenLM(load_lora(Path(folder), config, head.device)[0], head.batch_size or 1)
    raise ValueError(f"compare {item!r}: expected backbone, lora=FOLDER or eval")


def _backbone_of_lora(folder: Path, config: BackboneConfig) -> BackboneConfig:
    """The backbone of a head, if an adapter was trained on it, with the prompts that language models get here."""
    check_lora_folder(folder)
    if not (folder / "run.yaml").exists():
        return config
    run = yaml.safe_load((folder / "run.yaml").read_text())
    for name in ("name_or_path", "revision", "gguf_file"):
        if run["backbone"].get(name) != getattr(config, name):
            raise ValueError(
                f"compare lora={folder}: trained with backbone.{name}={run['backbone'].get(name)!r}, the head has"
                f" {getattr(config, name)!r}"
            )
    plain = TextConfig()
    if run["text"]["enabled"] and (run["text"]["chat"], run["text"]["suffix"]) != (plain.chat, plain.suffix):
        raise ValueError(f"compare lora={folder}: it was trained on other prompts (text.chat, text.suffix)")
    return config


def _check_servable(head: HybridLM, task: ConfigurableTask) -> None:
    """Refuse what a head cannot do before anything is computed."""
    if task.OUTPUT_TYPE == "generate_until":
        head.check_text_decoder(f"task {task.task_name}, which asks for generated text,")
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        check_zero_shot(head.model.backbone)
    if getattr(task, "multiple_input", 0):
        head.check_text_decoder(f"task {task.task_name}, which has its choices within the text,")


def _split(task: ConfigurableTask) -> str:
    """The split that a task evaluates."""
    return str(task.config.test_split or task.config.validation_split)


def _own_accuracy(head: HybridLM, tasks: Sequence[ConfigurableTask], results: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy over whole answers by the code of `hybrid eval`, on the questions whose documents were evaluated."""
    start, found = time.perf_counter(), {}
    max_steps = head.refinement["max_steps"] or head.model.config.reasoner.max_steps
    for task in tasks:
        if not isinstance(task.dataset, Documents):
            continue
        examples, num_documents = [], results["n-samples"][task.task_name]["effective"]
        for example in task.dataset.examples(_split(task)):
            if num_documents <= 0:
                break
            examples.append(example)
            num_documents -= len(example.answered)
        embedded = embed_examples(FeatureConfig(), head.model.backbone, {"asked": examples})["asked"]
        record = run_steps(head.model, embedded, max_steps)
        row = accuracy_row(record.when_halted(record.right, max_steps))
        metric = "acc" if all(len(example.answered) == 1 for example in examples) else "whole answer"
        found[task.task_name] = {
            f"{metric},none": row["accuracy"], f"{metric}_stderr,none": row["stderr"], "sample_len": row["n"]
        }  # fmt: skip
    return {"name": "hybrid eval", "seconds": round(time.perf_counter() - start, 1), "results": found}


def write_samples(output: Path, samples: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
    """Write what each system answered, a file for each system and task beside the result file."""
    for system, tasks in samples.items():
        for task, rows in tasks.items():
            lines = [json.dumps(row, default=handle_non_serializable) + "\n" for row in rows]
            output.with_name(f"{output.stem}_{system.replace(' ', '_')}_{task}.jsonl").write_text("".join(lines))
