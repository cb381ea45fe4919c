"""`hybrid harness` from the command line: shipped tasks and lm-eval's own, from local copies, beside other systems."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from conftest import CHOICES, tiny_llama, tiny_reasoner, word_tokenizer
from test_cli import error_of
from test_training import write_data

pytest.importorskip("lm_eval", reason="needs the extra [eval]: pip install 'hybrid-reasoner[eval]'")

import lm_eval.evaluator
from lm_eval.tasks import TaskManager

from hybrid import comparison
from hybrid.backbone import load_backbone
from hybrid.cli import main
from hybrid.comparison import flat, load_tasks, run_harness
from hybrid.config import BackboneConfig
from hybrid.evaluation import harness_lines
from hybrid.harness import HybridLM
from hybrid.model import HybridModel

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft uses it
BUILT_IN = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(autouse=True)
def no_machine_report(monkeypatch):
    """lm-eval asks the machine for its versions at every evaluation, which takes longer than these."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    """An untrained head on a language model, both in folders."""
    folder = tmp_path_factory.mktemp("language_model")
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tiny_llama(max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = BackboneConfig(name_or_path=str(folder), layers=[0, 1, 2], dtype="float32")
    torch.manual_seed(0)
    model = HybridModel.from_backbone(
        load_backbone(config), backbone_config=config, reasoner=tiny_reasoner(), known_options=CHOICES
    )
    model.save_pretrained(folder / "head")
    return folder / "head"


@pytest.fixture
def task_folder(tmp_path) -> Path:
    """A task with its choices in the text, and one for generated text."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "A is", "answer": "left", "number": 0, "choices": ["left", "right"], "split": "test"}\n')
    base = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    tasks = {
        "in_text": {"doc_to_text": "number", "doc_to_target": "text", "doc_to_choice": "choices"}
        | {"output_type": "multiple_choice"},
        "writing": {"doc_to_text": "text", "doc_to_target": "answer", "output_type": "generate_until"},
    }
    for name, config in tasks.items():
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **base, **config}))
    return tmp_path / "tasks"


def test_one_table_from_one_command(head, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    write_chains(tmp_path / "chains.jsonl")
    puzzles = [
        {"question": f"{a} says {b} is a knave .", "fields": [a, b], "answer": ["knight", "knave"], "depth": 2}
        for a, b in ("AB", "BC", "CD")
    ]
    (tmp_path / "puzzles.jsonl").write_text("".join(json.dumps(row | {"split": "test"}) + "\n" for row in puzzles))
    adapters = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_llama(), adapters).save_pretrained(str(tmp_path / "lora"))
    output, cache = tmp_path / "new" / "table.json", tmp_path / "responses"
    arguments = [
        "harness", "--model_args", f"pretrained={head},device=cpu", "--tasks", "stepgame,knights_knaves",
        "--data", f"stepgame={tmp_path / 'chains.jsonl'},knights_knaves={tmp_path / 'puzzles.jsonl'}",
        "--split", "test", "--limit", "5", "--compare", f"backbone,lora={tmp_path / 'lora'},eval",
        "--use_cache", str(cache), "--log_samples", "--output", str(output),
    ]  # fmt: skip
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| task | split | n | metric | hybrid | frozen LLM | LoRA | hybrid eval |"
    rows = {tuple(cell.strip() for cell in line.split("|")[1:5]): line.split("|")[5:-1] for line in lines[2:-2]}
    step = rows["stepgame", "test", "5", "acc"]
    assert step[0] == step[3] and " ± " in step[0]  # the same questions, the same answers
    assert step[1] == step[2]  # an adapter that was not trained changes nothing
    assert rows["stepgame", "test", "5", "acc_norm"][0].strip() == "–"
    assert rows["knights_knaves", "test", "5", "acc"][3].strip() == "–"  # by person; `hybrid eval` tells whole puzzles
    assert rows["knights_knaves", "test", "3", "whole answer"][3].strip() != "–"
    assert "normalised over these choices: no likelihoods of a language model" in lines[-2]
    results = json.loads(output.read_text())
    assert harness_lines(results).splitlines() == lines[:-2]
    assert results["command"].startswith("hybrid harness") and results["package_versions"] and results["git_hash"]
    assert results["configs"]["stepgame"]["metadata"]["config_source"] == "hybrid/tasks/stepgame.yaml"
    assert results["n-samples"]["stepgame"] == {"original": 16, "effective": 5}
    assert results["compared"][0]["config"]["model"] == "hf" and results["config"]["model"] == "hybrid"
    samples = {name: output.with_name(f"table_{name}_stepgame.jsonl") for name in ("hybrid", "frozen_LLM", "LoRA")}
    loaded = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in samples.items()}
    for one, other in zip(loaded["hybrid"], loaded["frozen_LLM"], strict=True):
        assert (one["doc"], one["arguments"], one["target"]) == (other["doc"], other["arguments"], other["target"])
    assert len(list(tmp_path.glob("responses-*"))) == 3  # no system reads what another answered
    monkeypatch.setattr(HybridLM, "_log_probabilities", None)
    main(arguments)
    assert capsys.readouterr().out.splitlines()[:-3] == lines[:-3]  # all but the seconds


def write_chains(path: Path) -> Path:
    """Chains as a local copy of StepGame, with their own choices."""
    write_data(path.parent)
    rows = [json.loads(line) | {"choices": list(CHOICES)} for line in (path.parent / "data.jsonl").open()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_few_shot_examples_of_shipped_tasks(head, tmp_path):
    data = {"stepgame": str(write_chains(tmp_path / "chains.jsonl"))}
    for split, num_documents in (("valid", 16), ("train", 64)):
        manager, tasks = load_tasks(["stepgame"], data, split, num_fewshot=2)
        _, samples = run_harness(HybridLM(str(head)), manager, tasks, num_fewshot=2, log_samples=True)
        rows = samples["hybrid"]["stepgame"]
        assert len(rows) == num_documents
        for row in rows:
            shots = row["arguments"][0][0].split("\n\n")
            assert len(shots) == 3 and shots[2] == row["doc"]["prompt"]
            if split == "train" and [other["doc"]["prompt"] for other in rows].count(shots[2]) == 1:
                assert shots[2] not in [shot.rsplit(" ", 1)[0] for shot in shots[:2]]  # never the question itself


@pytest.mark.slow
def test_two_processes_give_what_one_gives(head, tmp_path):
    data = write_chains(tmp_path / "chains.jsonl")
    for name, launch in (
        ("one", ()),
        ("two", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")),
    ):
        command = [
            sys.executable,
            *launch,
            "-m",
            "hybrid",
            "harness",
            str(head),
            "--tasks",
            "stepgame",
            "--log_samples",
        ]
        command += [
            "--data",
            str(data),
            "--limit",
            "7",
            "--compare",
            "backbone",
            "--output",
            str(tmp_path / f"{name}.json"),
        ]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert run.returncode == 0 and run.stdout.count("written:") == 1, run.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["results"] == two["results"] and one["n-samples"] == two["n-samples"]
    assert one["compared"][0]["results"] == two["compared"][0]["results"]
    lines = [(tmp_path / f"{name}_hybrid_stepgame.jsonl").read_text().splitlines() for name in ("one", "two")]
    scores = [{row["doc_id"]: row["filtered_resps"] for row in map(json.loads, rows)} for rows in lines]
    for number, expected in scores[0].items():
        assert [s for s, _ in scores[1][number]] == pytest.approx([s for s, _ in expected], abs=1e-5)


def write_copies(folder: Path) -> dict[str, str]:
    """Local copies of lm-eval's own tasks, in their columns."""
    logic = {"question": "Where is A ?", "options": ["left", "right", "left", "below"], "split": "test"}
    rows = {
        "logiqa": logic | {"context": "A is left of B .", "label": "b"},
        "logiqa2": logic | {"text": "A is left of B .", "answer": 1},
        "babi": {"passage": "A is left of B .\n", "question": "Where is A ?", "answer": "left", "split": "test"},
        "bbh_zeroshot_logical_deduction_three_objects": {"input": "A is left of B .", "target": "(A)"},
        "bbh_zeroshot_boolean_expressions": {"input": "the the is", "target": "True"},
    }
    copies = {}
    for name, row in rows.items():
        path = folder / f"{name}.jsonl"
        splits = (
            ("train", "dev", "test") if "split" in row else ("",)
        )  # a file without the column is what is evaluated
        path.write_text("".join(json.dumps(row | ({"split": split} if split else {})) + "\n" for split in splits))
        copies[name] = str(path)
    return copies


def test_tasks_of_lm_eval_from_local_copies(head, tmp_path, monkeypatch):
    copies = write_copies(tmp_path)
    folders = [BUILT_IN / name for name in ("logiqa", "logiqa2", "babi", "bbh/zeroshot")]
    manager, tasks = load_tasks(list(copies), copies, include_path=folders)
    lm = HybridLM(str(head))
    with pytest.raises(ValueError, match="task babi, which asks for generated text, needs a text decoder"):
        run_harness(lm, manager, tasks)

    written = {True: " left", False: " True"}
    monkeypatch.setattr(
        HybridLM, "generate_until", lambda self, requests: [written["Where" in r.args[0]] for r in requests]
    )
    monkeypatch.setattr(HybridLM, "has_text_decoder", True)
    results, _ = run_harness(lm, manager, tasks, log_samples=False)
    scores = results["results"]
    assert {"logiqa", "logiqa2"} <= scores.keys() and 0 <= scores["logiqa"]["acc,none"] <= 1
    assert scores["babi"]["exact_match,none"] == 1
    assert scores["bbh_zeroshot_boolean_expressions"]["exact_match,flexible-extract"] == 1
    assert results["split"]["logiqa"] == "test"
    assert "| bbh_zeroshot_boolean_expressions | test | 1 | exact_match,flexible-extract | 1.000 |" in harness_lines(
        results
    )
    (task,) = flat(load_tasks(["logiqa"], {"logiqa": copies["logiqa"]}, "valid", folders[:1])[1])
    assert task.config.test_split == "validation" and len(task.eval_docs) == 1


def test_what_cannot_be_asked_is_one_line(head, task_folder, tmp_path, monkeypatch, capsys):
    few = functools.partial(TaskManager, include_defaults=False)  # lm-eval's own take seconds to list
    monkeypatch.setattr(comparison, "TaskManager", lambda include_path, **all_of_them: few(include_path=include_path))
    data = tmp_path / "data.jsonl"
    write_data(tmp_path)

    def error(*arguments: str) -> str:
        return error_of(capsys, "harness", str(head), *arguments)

    folder = ("--include_path", str(task_folder))
    assert "no task 'stepgam'; close ones: stepgame" in error("--tasks", "stepgam")
    assert "task in_text, which has its choices within the text, needs a text decoder" in error(
        "--tasks", "in_text", *folder
    )
    assert "task writing, which asks for generated text, needs" in error("--tasks", "writing", *folder)
    assert "task 'writing' has no validation_split; it has test_split" in error(
        "--tasks", "writing", "--split", "valid", *folder
    )
    local = ("--tasks", "stepgame", "--data", str(data))
    assert "mode=lm needs a text decoder" in error(*local, "--model_args", "mode=lm")
    assert "model_args have no ['step']" in error(*local, "--model_args", "step=2")
    assert "compare 'gpt': expected backbone, lora=FOLDER or eval" in error(*local, "--compare", "gpt")
    assert "holds no LoRA adapter" in error(*local, "--compare", f"lora={tmp_path}")
    (tmp_path / "adapter_config.json").write_text("{}")
    run = {"backbone": {"name_or_path": "another"}, "text": {"enabled": False}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert "trained with backbone.name_or_path='another'" in error(*local, "--compare", f"lora={tmp_path}")
    assert "compare eval: it runs one copy" in error(*local, "--compare", "eval", "--model_args", "rollouts=2")
    (tmp_path / "whole.jsonl").write_text('{"text": "A is", "answer": "left"}\n')
    whole = ("--tasks", "writing", *folder, "--data", str(tmp_path / "whole.jsonl"))
    assert "whole.jsonl has no column `split`: with num_fewshot=1" in error(*whole, "--num_fewshot", "1")
    assert f"--output {tmp_path}: expected the name of a file" in error(*local, "--output", str(tmp_path))
    assert "give one head: hybrid harness HEAD, or" in error(*local, "--model_args", f"pretrained={head}")
    assert "--limit 0: expected a number > 0" in error(*local, "--limit", "0")
    assert "does not exist" in error("--tasks", "stepgame", "--data", "none.jsonl")
    assert "can be given as data.path (--data stepgame=FILE)" in error("--tasks", "stepgame")
    assert "--data none.jsonl: expected TASK=FILE" in error("--tasks", "stepgame,clutrr", "--data", "none.jsonl")
    assert "data for 'clutrr': the tasks are stepgame" in error("--tasks", "stepgame", "--data", f"clutrr={data}")


def test_without_lm_eval_the_extra_is_named(head, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'hybrid-reasoner[eval]'" in error_of(capsys, "harness", str(head), "--tasks", "stepgame")


def test_newer_versions_find_the_model_by_entry_point():
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lm_eval.models"] == {"hybrid": f"{HybridLM.__module__}:{HybridLM.__name__}"}
