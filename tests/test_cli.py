"""The commands end to end on a tiny backbone, and one-line errors before any long work."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import yaml
from conftest import CHOICES, tiny_model, tiny_run
from test_training import write_data

from hybrid.asking import fields_asked
from hybrid.backbone import Backbone
from hybrid.batches import embed_examples
from hybrid.cli import main, run_config
from hybrid.config import to_plain
from hybrid.decoder import Field
from hybrid.inference import Answer
from hybrid.model import HybridModel

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def config_file(tmp_path, backbone_folder) -> Path:
    """A run on the tiny backbone, as a YAML file beside its data."""
    write_data(tmp_path)
    data = to_plain(tiny_run(tmp_path))
    data["backbone"] |= {"name_or_path": str(backbone_folder), "layers": [0, 1, 2], "dtype": "float32"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def head(backbone, backbone_folder, tmp_path) -> str:
    """An untrained head on the tiny backbone."""
    model = tiny_model(backbone)
    model.config.backbone.name_or_path = str(backbone_folder)
    model.save_pretrained(tmp_path / "head")
    return str(tmp_path / "head")


def error_of(capsys, *arguments: str) -> str:
    """Run a command that must fail with one line on stderr."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in errors if line.startswith("hybrid ")]
    assert len(lines) == 1 and lines[0] == errors[-1], errors
    return lines[0]


def test_train_eval_ask(config_file, tmp_path, capsys):
    main(["train", str(config_file), "--training.num_updates", "6"])
    head = tmp_path / "run" / "best"
    output = capsys.readouterr().out
    assert f"best head: {head}" in output
    assert "training on 64 questions, 64 of them with a context; 16 for validation; depths 1 to 2; options: " in output

    main(["eval", str(head), "--steps", "1,2,4", "--baselines", "zero_shot,linear_probe"])
    assert "| depth | n | head | frozen LLM, zero-shot | linear probe, pooled states |" in capsys.readouterr().out
    results = json.loads((head / "results.json").read_text())
    assert results["split"] == "test" and [point["steps"] for point in results["accuracy_by_steps"]] == [1, 2, 4]
    assert results["command"].endswith("--baselines zero_shot,linear_probe")
    assert (head / "results.png").exists() and results["train_seconds"] > 0
    assert f"{results['accuracy_by_depth'][0]['accuracy']:.3f}" in (head / "README.md").read_text()

    other = tmp_path / "new" / "r.json"
    main(["eval", str(head), "--split", "valid", "--max_examples", "6", "--rollouts", "1,2", "--output", str(other)])
    results = json.loads(other.read_text())
    assert results["accuracy_by_depth"][-1]["n"] == 6
    assert [row["rollouts"] for row in results["accuracy_by_rollouts_vote"]] == [1, 2]
    main(["eval", str(head), "--baselines", "mlp_probe", "--max_train", "9", "--output", str(other)])
    assert json.loads(other.read_text())["baselines"][0]["train_rows"] == 9
    assert "only probes are trained" in error_of(
        capsys, "eval", str(head), "--baselines", "zero_shot", "--max_train", "9"
    )
    assert "--max_examples -5" in error_of(capsys, "eval", str(head), "--max_examples", "-5")
    assert "--steps 'a'" in error_of(capsys, "eval", str(head), "--steps", "a")

    main(["ask", str(head), "A is left of B . Where is A relative to B ?", "--steps", "2", "--verbose"])
    output = capsys.readouterr().out
    assert "step  1  answer: " in output and "(probability 0." in output and "load " in output
    main(["ask", str(head), "Where is A relative to B ?", "--context", "A is left of B .", "--choices", "left, knave"])
    assert capsys.readouterr().out.splitlines()[-1].split()[0] in ("left", "knave")


def test_ask_for_several_fields(head, tmp_path, capsys):
    def value(*flags: str):
        main(["ask", head, "A says B is a knave .", *flags])
        return json.loads(capsys.readouterr().out.splitlines()[-1].rpartition("   (probability")[0])

    answer = value("--fields", '{"A": ["knight", "knave"], "B": "yn"}')
    assert answer["A"] in ("knight", "knave") and answer["B"] in "yn"
    assert set(value("--fields", '["A", "B"]').values()) <= {"left", "right", "above", "below"}  # those of the head
    assert set(value("--fields", '["A", "B"]', "--choices", "knight, knave").values()) <= {"knight", "knave"}
    grid = value("--grid", "2x3")
    assert list(grid) == ["r1c1", "r1c2", "r1c3", "r2c1", "r2c2", "r2c3"] and set(grid.values()) <= {"1", "2"}
    assert set(value("--grid", "2x2", "--choices", "left,right").values()) <= {"left", "right"}
    (tmp_path / "schema.json").write_text(
        '{"properties": {"left": {"type": "boolean"}, "says": {"enum": ["A", "B"]}}}'
    )
    answer = value("--schema", str(tmp_path / "schema.json"))
    assert answer["left"] in (True, False) and answer["says"] in ("A", "B")


def test_of_several_fields_a_step_shows_those_that_it_changed(head, capsys, monkeypatch):
    steps = [
        {"A": {"knight": 0.9, "knave": 0.1}, "B": {"knight": 0.6, "knave": 0.4}},
        {"A": {"knight": 0.8, "knave": 0.2}, "B": {"knight": 0.3, "knave": 0.7}},
        {"A": {"knight": 0.7, "knave": 0.3}, "B": {"knight": 0.2, "knave": 0.8}},
    ]
    answer = Answer({"A": "knight", "B": "knave"}, probability=0.56, steps=3, trace=steps, halt_probability=0.5)
    monkeypatch.setattr("hybrid.model.HybridModel.answer", lambda *_, **__: answer)
    main(["ask", head, "A says B is a knave .", "--grid", "2x2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["step  1  A: knight 0.900  B: knight 0.600", "step  2  B: knave 0.700", "step  3  no change"]


def test_ask_draws_the_trace(head, tmp_path, capsys):
    main(["ask", head, "Where is A ?", "--steps", "2", "--halting", "never", "--trace"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["answer", "step", "1", "step", "2"]
    assert [line.split()[0] for line in lines[1:5]] == ["left", "right", "above", "below"] and len(lines) == 6
    main(["ask", head, "Where is A ?", "--grid", "2x2", "--trace_png", str(tmp_path / "new" / "trace.png")])
    output = capsys.readouterr().out
    assert "step  1  r1c1: " in output and f"written: {tmp_path / 'new' / 'trace.png'}" in output
    assert (tmp_path / "new" / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_ask_fields_that_stand_in_the_text(head, capsys, monkeypatch):
    asked = {}
    answer = HybridModel.answer
    monkeypatch.setattr(
        HybridModel, "answer", lambda self, q, **kwargs: asked.update(kwargs) or answer(self, q, **kwargs)
    )
    fields = '[{"name": "A", "options": ["left", "right"], "at": 9}, {"name": "B", "options": "12"}]'
    with pytest.warns(UserWarning, match=r"fields \['A'\] say where they stand, which this head ignores"):
        main(["ask", head, "Where is A ?", "--fields", fields])
    assert asked["fields"] == [Field("A", ["left", "right"], at=9), Field("B", "12")]
    assert "expected {" in error_of(
        capsys, "ask", head, "Where is A ?", "--fields", '[{"name": "A", "choices": "12"}]'
    )


def test_train_and_generate(config_file, tmp_path, capsys):
    main(["train", str(config_file), "--training.num_updates", "6", "--text.enabled", "true", "--text.suffix", " is"])
    head, question = str(tmp_path / "run" / "best"), "A is left of B . Where is A relative to B ?"
    capsys.readouterr()
    main(["generate", head, question, "--max_new_tokens", "5"])
    streamed = capsys.readouterr().out.strip()
    assert streamed == HybridModel.from_pretrained(head).generate_text(question, max_new_tokens=5, do_sample=False)
    main(["generate", head, question, "--max_new_tokens", "5", "--num_beams", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 1
    main(["generate", head, question, "--temperature", "0.7", "--choices", "left, right", "--steps", "1"])
    main(["generate", head, question, "--grid", "2x2", "--max_new_tokens", "2"])
    capsys.readouterr()
    sampled = []
    for seed in ("1", "1", "2"):
        main(["generate", head, question, "--max_new_tokens", "8", "--top_p", "0.99", "--seed", seed])
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.warns(UserWarning, match="--seed 3 changes nothing: nothing is drawn"):
        main(["generate", head, question, "--max_new_tokens", "2", "--seed", "3"])
    main(["ask", head, question, "--explain"])
    assert capsys.readouterr().out.splitlines()[-2].endswith("steps)")  # then what is written
    assert "--max_new_tokens 0" in error_of(capsys, "generate", head, question, "--max_new_tokens", "0")
    assert "--num_beams 0" in error_of(capsys, "generate", head, question, "--num_beams", "0")
    assert "--temperature 0.0" in error_of(capsys, "generate", head, question, "--temperature", "0")
    assert "--top_p 2.0: expected a number in (0, 1]" in error_of(capsys, "generate", head, question, "--top_p", "2")
    assert "no chat template" in error_of(capsys, "generate", head, question, "--chat")


def test_generate_asks_for_what_ask_asks_for(head, tmp_path, monkeypatch):
    def fields(*flags: str):
        asked.clear()
        main(["generate", head, "A says B is a knave .", *flags])
        found = fields_asked(HybridModel.from_pretrained(head), asked.pop("choices", None), asked.pop("fields"))
        return {field.name: field.options for field in found}

    asked: dict = {}
    monkeypatch.setattr("hybrid.generation.generate_text", lambda model, prompt, **kwargs: asked.update(kwargs))
    assert fields("--fields", '{"A": ["knight", "knave"], "B": "yn"}') == {"A": ("knight", "knave"), "B": ("y", "n")}
    assert fields("--fields", '["A"]') == {"A": CHOICES}  # those of the head
    assert fields("--grid", "1x2", "--choices", "a,b") == {"r1c1": ("a", "b"), "r1c2": ("a", "b")}
    (tmp_path / "schema.json").write_text('{"properties": {"left": {"type": "boolean"}}}')
    assert fields("--schema", str(tmp_path / "schema.json")) == {"left": ("true", "false")}
    main(["generate", head, "A ?", "--choices", "left, right"])
    assert asked["choices"] == ["left", "right"] and "fields" not in asked
    grid = HybridModel.from_pretrained(head)
    grid.config.fields = {"r1c1": ["1", "2"]}
    monkeypatch.setattr(HybridModel, "from_pretrained", lambda folder: grid)
    assert fields("--fields", '["r1c1", "A"]') == {"r1c1": ("1", "2"), "A": CHOICES}


def test_eval_of_a_released_head_on_a_file_of_ones_own(config_file, tmp_path, capsys, monkeypatch):
    mapping = '{"context": "story", "answer": "label"}'  # of the source that the head was trained on, say
    main(["train", str(config_file), "--training.num_updates", "2"])
    head = tmp_path / "run" / "best"
    run = yaml.safe_load((head / "run.yaml").read_text())
    run["data"] |= {"column_mapping": json.loads(mapping), "train_depths": [1, 2]}
    (head / "run.yaml").write_text(yaml.safe_dump(run))
    (head / "expected.json").write_text("[]")
    card = (head / "README.md").read_text()
    rows = [{"context": "A is left of B .", "question": "Where is A ?", "answer": "left"}] * 3
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps(row | {"question": f"{n} ?"}) + "\n" for n, row in enumerate(rows))
    )
    monkeypatch.chdir(tmp_path)
    main(["eval", str(head), "--data", "mine.jsonl", "--steps", "1,3"])
    assert "all depths by steps: 1: " in capsys.readouterr().out
    assert json.loads(Path("best_results.json").read_text())["accuracy_by_depth"][-1]["n"] == 3
    assert not (head / "results.json").exists() and (head / "README.md").read_text() == card
    config = json.loads((head / "config.json").read_text())
    config |= {"options": config["choices"], "choices": None}  # as of a head whose questions named their fields
    (head / "config.json").write_text(json.dumps(config))
    with pytest.warns(match="some questions name no fields, and this head always was asked for fields by their names"):
        main(["eval", str(head), "--data", "mine.jsonl", "--steps", "1"])


def test_head_without_text_decoder_says_so(head, capsys):
    assert "no text decoder" in error_of(capsys, "generate", head, "Where is A ?")
    assert "no text decoder" in error_of(capsys, "ask", head, "Where is A ?", "--explain")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid", "4"], "--grid '4': expected rows and columns, such as 4x4"),
        (["--grid", "2x2", "--fields", "[]"], "--fields and --grid both say what is asked"),
        (["--fields", "{A: knight}"], "--fields: no JSON"),
        (["--fields", '"A"'], "--fields: expected an object"),
        (["--fields", '{"A": 3}'], 'expected {"name": ["option", ...], ...}'),
        (["--fields", "[3]"], 'or ["name", ...]'),
        (["--fields", "[]"], "names must be there"),
        (["--fields", '{"A": []}'], "field 'A' has options []"),
        (["--fields", '{"A": "yn"}', "--choices", "a,b"], "both choices and fields"),
        (["--schema", "nowhere.json"], "--schema nowhere.json: there is no such file"),
        (["--trace_png", "trace.txt"], "expected a file that ends in .png"),
    ],
)
def test_bad_flags_of_ask(head, capsys, flags, message):
    assert message in error_of(capsys, "ask", head, "Where is A ?", *flags)


def test_release(config_file, tmp_path, capsys, monkeypatch):
    main(["train", str(config_file), "--training.num_updates", "2"])
    head, released = tmp_path / "run" / "best", tmp_path / "adapters" / "chains"
    assert "no such file" in error_of(capsys, "release", str(head), str(released), "--questions", "none.jsonl")
    release = ["release", str(head), str(released), "--questions"]
    assert "expected JSON Lines" in error_of(capsys, *release, str(config_file))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "A is left of B . Where is A relative to B ?"}\n')
    main(["release", str(head), str(released), "--questions", str(questions)])
    assert {"run.yaml", "log.jsonl", "expected.json"} <= {path.name for path in released.iterdir()}
    main(["ask", str(released), "A is left of B . Where is A relative to B ?"])
    expected = json.loads((released / "expected.json").read_text())
    assert expected[0]["value"] in capsys.readouterr().out
    card = (released / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    main(["eval", str(released), "--steps", "1"])
    assert (tmp_path / "chains_results.json").exists() and not (released / "results.json").exists()
    assert (released / "README.md").read_text() == card


def test_eval_of_generated_rows(config_file, tmp_path, capsys, monkeypatch):
    main(["train", str(config_file), "--training.num_updates", "2"])
    head = tmp_path / "run" / "best"
    run = yaml.safe_load((head / "run.yaml").read_text())
    generated = {"path": None, "reasoning_gym": "family_relationships", "column_mapping": {}, "choices": None}
    run["data"] |= {**generated, "max_train_examples": 30, "max_eval_examples": 12}
    (head / "run.yaml").write_text(yaml.safe_dump(run))
    assert "data.test_split='tset': generated rows" in error_of(capsys, "eval", str(head), "--split", "tset")
    monkeypatch.chdir(tmp_path)
    for name, flags in {"all": [], "few": ["--max_train", "9"]}.items():
        main(["eval", str(head), "--steps", "1", "--baselines", "linear_probe", "--output", f"{name}.json", *flags])
    every, few = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("all", "few"))
    assert every["data_fingerprint"] == few["data_fingerprint"]  # whatever the probe is fitted on
    assert (every["baselines"][0]["train_rows"], few["baselines"][0]["train_rows"]) == (30, 9)
    flags = ["--split", "train", "--steps", "1", "--baselines", "linear_probe", "--max_train", "9"]
    main(["eval", str(head), *flags, "--output", "train.json"])
    assert json.loads((tmp_path / "train.json").read_text())["accuracy_by_depth"][-1]["n"] == 30


def test_eval_of_a_file_is_whole_and_has_the_options_of_the_head(config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    without = [{key: row[key] for key in ("context", "question", "answer")} for row in rows]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in without))
    few = [row for row in without if row["answer"] in ("left", "right")][:8]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    source = ["--data.path", str(tmp_path / "all.jsonl"), "--data.choices", "null", "--data.valid_split", "train[-4:]"]
    main(["train", str(config_file), *source, "--training.num_updates", "2"])
    head, seen = tmp_path / "run" / "best", []
    monkeypatch.setattr(
        "hybrid.batches.embed_examples",
        lambda config, backbone, examples, **rest: seen.append(examples) or embed_examples(config, backbone, examples),
    )
    main(["eval", str(head), "--data", str(tmp_path / "few.jsonl"), "--steps", "1", "--output", "r.json"])
    assert len(seen[0]["test"]) == 8  # none is cut for validation
    assert {example.fields[0].options for example in seen[0]["test"]} == {tuple(sorted(CHOICES))}


def test_embed_then_train_computes_nothing_again(config_file, capsys, monkeypatch):
    main(["embed", str(config_file)])
    assert "train: 64 examples" in capsys.readouterr().out

    def refuse(*args, **kwargs):
        raise AssertionError("hidden states were computed again")

    monkeypatch.setattr(Backbone, "hidden_states", refuse)
    main(["train", str(config_file), "--training.num_updates", "2"])


def test_probe_prints_every_layer(config_file, capsys):
    main(["probe", str(config_file), "--max_train", "40", "--max_test", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["0", "1", "2", "3"]


def test_env_and_help(capsys):
    main(["env"])
    assert "torch 2." in capsys.readouterr().out
    main([])
    assert "usage: hybrid COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--training.lr", "1"], "--training.lr"),
        (["--training.learning_rat", "1"], "--training.learning_rat 1 (did you mean --training.learning_rate?)"),
        (["--max_steps", "1"], "(did you mean --reasoner.max_steps?)"),
        (["--reasoner.dim", "wide"], "reasoner.dim"),
        (["--reasoner.num_heads", "5"], "reasoner.num_heads=5: expected a divisor of dim=32"),
        (["--training.batch_size", "0"], "training.batch_size=0"),
        (["--training.recursion_schedule", "[{num_cycles: 0}]"], "recursion_schedule.num_cycles=0"),
        (["--resume"], "--resume: no "),
        (["--data.path", "missing.jsonl"], "missing.jsonl"),
        (["--data.column_mapping", '{"answer": "label"}', "--data.train_split", "nothing"], "nothing"),
        (["--backbone.layers", "[0,99]"], "layers 0 to 3"),
        (["--backbone.name_or_path", "no/such-model"], "could not be loaded"),
        (["--data.choices", '["left", "right"]'], "is not among the choices"),
        (["--data.train_depths", "[7]"], "train_depths=[7]"),
    ],
)
def test_bad_settings_are_one_line_before_long_work(config_file, tmp_path, capsys, flags, message):
    assert message in error_of(capsys, "train", str(config_file), *flags)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_unknown_key_in_the_yaml_is_refused_by_name(config_file, capsys):
    data = yaml.safe_load(config_file.read_text())
    data["reasoner"]["horizon"] = 3
    config_file.write_text(yaml.safe_dump(data))
    assert "horizon" in error_of(capsys, "train", str(config_file))


def test_text_longer_than_the_window(config_file, tmp_path, capsys):
    row = {"split": "train", "question": "A is left of B . " * 40, "answer": "left"}
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert "tiny" not in (error := error_of(capsys, "train", str(config_file)))
    assert "tokens with template 'echo'" in error and "shorten it" in error


def test_bad_heads_and_commands(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no command 'fly'"):
        main(["fly"])
    assert "no head at" in error_of(capsys, "ask", str(tmp_path / "nowhere"), "Where ?")
    (tmp_path / "head").mkdir()
    assert "no run.yaml" in error_of(capsys, "eval", str(tmp_path / "head"))
    assert "no ['magic']" in error_of(capsys, "eval", str(tmp_path / "head"), "--baselines", "magic")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_name_their_source_and_commands(path):
    text = path.read_text()
    assert f"hybrid train configs/{path.name}" in text
    if "reasoning_gym:" not in text:  # what is generated needs no copy
        assert f"hybrid train configs/{path.name} --data.path ../shared/data/" in " ".join(text.split())
    assert "Expected time" in text and "Expected score" in text


def test_readme_configuration_is_one(tmp_path):
    readme = (CONFIGS[0].parent.parent / "README.md").read_text()
    path = tmp_path / "my_run.yaml"
    path.write_text(readme.split("```yaml\n", 1)[1].split("```", 1)[0])
    config, _ = run_config([str(path)], "train")
    assert config.data.column_mapping == {"context": "passage", "answer": "label"}
    assert config.training.num_updates == 3000


def test_readme_configuration_trains_a_head_that_answers(tmp_path, backbone_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (CONFIGS[0].parent.parent / "README.md").read_text()
    run = yaml.safe_load(readme.split("```yaml\n", 1)[1].split("```", 1)[0])
    run["backbone"] |= {"name_or_path": str(backbone_folder), "layers": [0, 2], "dtype": "float32"}
    run["features"] = {"folder": str(tmp_path / "features")}
    (tmp_path / "my_run.yaml").write_text(yaml.safe_dump(run))
    rows = [
        {"passage": f"{one} is left of {two} .", "question": f"Is {asked} left of {two} ?", "label": label}
        for one, two, other in itertools.permutations("ABCD", 3)
        for asked, label in ((one, "yes"), (other, "unknown"))
    ]
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    main(["train", "my_run.yaml", "--training.num_updates", "3", "--training.batch_size", "4"])
    main(["eval", "runs/mine/best", "--steps", "1,2,4,8"])
    main(["ask", "runs/mine/best", "Is A left of B ?", "--context", "A is left of B .", "--trace"])
    assert "probability" in capsys.readouterr().out
