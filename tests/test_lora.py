"""LoRA on a tiny model: trained from the command line, resumed, evaluated as the frozen model is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cli import error_of
from test_training import write_data
from transformers import DataCollatorForSeq2Seq

from hybrid.backbone import load_backbone
from hybrid.baselines import zero_shot
from hybrid.cli import main
from hybrid.config import BackboneConfig, DataConfig, RunConfig, TextConfig, TrainingConfig, to_plain
from hybrid.data import load_examples
from hybrid.lora import _Log, _padding, _rows, _rows_at_once, evaluate_lora, train_lora
from hybrid.losses import IGNORED

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft uses it


@pytest.fixture
def config(tmp_path, backbone_folder) -> RunConfig:
    write_data(tmp_path)
    return RunConfig(
        backbone=BackboneConfig(name_or_path=str(backbone_folder), dtype="float32"),
        data=DataConfig(path=str(tmp_path / "data.jsonl"), choices=["left", "right", "above", "below"]),
        training=TrainingConfig(
            output_folder=str(tmp_path / "run"), num_updates=60, batch_size=16, learning_rate=2e-2, warmup_updates=5,
            log_every=20, save_every=40,
        ),
    )  # fmt: skip


def test_lora_learns_what_the_frozen_model_cannot(config):
    valid = load_examples(config.data, "valid")
    config.training.num_updates, config.training.learning_rate = 120, 1e-2
    frozen = zero_shot(load_backbone(config.backbone), valid, progress=False)
    result = evaluate_lora(train_lora(config), config, valid)
    accuracy = result["accuracy_by_depth"][-1]["accuracy"]
    assert accuracy > 0.8 > frozen["accuracy_by_depth"][-1]["accuracy"]  # the direction's word is in the text
    tensors = load_file(Path(config.training.output_folder) / "best" / "adapter_model.safetensors")
    assert result["num_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert result["train_seconds"] > 0


def test_lora_keeps_its_options_and_is_scored_with_the_end_it_learned(config, monkeypatch):
    ends = []
    monkeypatch.setattr("hybrid.lora.zero_shot", lambda *_, end: ends.append(end) or {"accuracy_by_depth": []})
    config.training.num_updates = 1
    config.data.choices = None
    folder = train_lora(config)
    assert yaml.safe_load((folder / "run.yaml").read_text())["data"]["choices"] == ["above", "below", "left", "right"]
    monkeypatch.setattr("hybrid.lora._end", lambda tokenizer: "</s>")
    evaluate_lora(folder, config, load_examples(config.data, "valid"))
    assert ends == ["</s>"]


@pytest.mark.parametrize(("decay", "last"), [("cosine", 0.1), ("constant", 1.0)])
def test_the_rate_of_lora_is_that_of_heads(config, decay, last):
    config.training.decay, config.training.log_every = decay, 1
    train_lora(config)
    lines = [json.loads(line) for line in (Path(config.training.output_folder) / "log.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] / config.training.learning_rate for line in lines if "learning_rate" in line]
    assert rates[0] < 0.5 and max(rates) == pytest.approx(1.0, abs=0.01)  # warm-up, then the peak
    assert rates[-1] == pytest.approx(last, abs=0.02)


def test_a_tokenizer_without_padding_pads_all_the_same(config):
    backbone = load_backbone(config.backbone)
    rows = _rows(backbone, load_examples(config.data, "train"), config.text)
    short, long = min(rows, key=lambda row: len(row["labels"])), max(rows, key=lambda row: len(row["labels"]))
    backbone.tokenizer.pad_token = None
    padded = DataCollatorForSeq2Seq(_padding(backbone.tokenizer), label_pad_token_id=IGNORED)([short, long])
    assert backbone.tokenizer.pad_token is None and padded["input_ids"].shape == (2, len(long["labels"]))
    assert padded["attention_mask"].sum(1).tolist() == [len(short["labels"]), len(long["labels"])]
    assert (padded["labels"] != IGNORED).sum(1).tolist() == [
        sum(label != IGNORED for label in row["labels"]) for row in (short, long)
    ]


def test_long_rows_come_in_smaller_parts():
    assert [_rows_at_once(16, longest) for longest in (40, 512, 700, 1400, 9000)] == [16, 16, 8, 4, 1]
    assert [_rows_at_once(batch_size, 600) for batch_size in (1, 24, 13)] == [1, 12, 13]


def test_lora_in_words_has_the_rows_of_a_text_decoder(config):
    examples, backbone = load_examples(config.data, "train"), load_backbone(config.backbone)
    fields, words = (
        _rows(backbone, examples, text) for text in (config.text, TextConfig(enabled=True, answer="It is {answer}."))
    )
    for example, row, plain in zip(examples, words, fields, strict=True):
        answer = [token for token in row["labels"] if token >= 0]
        prompt = row["input_ids"][: -len(answer)]
        assert answer == backbone.tokenizer(f" It is {example.answers[0]}.", add_special_tokens=False)["input_ids"]
        assert prompt == plain["input_ids"][: len(prompt)]  # one field: asked as without words
        assert len(row["attention_mask"]) == len(row["input_ids"]) == len(row["labels"])


def test_lora_in_words_is_judged_by_what_it_writes(config):
    config.training.num_updates, config.training.learning_rate = 120, 1e-2
    config.text = TextConfig(enabled=True)
    valid = load_examples(config.data, "valid")
    folder = train_lora(config)
    result = evaluate_lora(folder, config, valid)
    assert result["name"] == "LoRA, in words" and result["accuracy_by_depth"][-1]["accuracy"] > 0.8
    wrong = [replace(e, answers=("below" if e.answers[0] == "above" else "above",)) for e in valid]
    assert evaluate_lora(folder, config, wrong)["accuracy_by_depth"][-1]["accuracy"] < 0.2


def test_lora_trains_in_one_process(config, monkeypatch):
    monkeypatch.setattr("hybrid.lora.PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="2 processes: `--baseline lora` trains in one"):
        train_lora(config)


def test_lora_goes_on_from_its_checkpoint(config, tmp_path, monkeypatch):
    whole = load_file(train_lora(config) / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        train_lora(config)
    config.training.output_folder = str(tmp_path / "stopped")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        train_lora(config, resume=True)

    write_line = _Log.on_log

    def killed(self, args, state, control, **kwargs):
        write_line(self, args, state, control, **kwargs)
        if state.global_step == 60:  # after the checkpoint of update 40
            raise KeyboardInterrupt

    monkeypatch.setattr(_Log, "on_log", killed)
    with pytest.raises(KeyboardInterrupt):
        train_lora(config)
    monkeypatch.setattr(_Log, "on_log", write_line)
    resumed = load_file(train_lora(config, resume=True) / "adapter_model.safetensors")
    for name, weight in whole.items():
        torch.testing.assert_close(weight, resumed[name])
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [20, 40, 60, 60]  # and the totals
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_lora_from_the_command_line(config, tmp_path, capsys):
    config.training.num_updates, config.training.learning_rate = 120, 1e-2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    main(["train", str(tmp_path / "config.yaml"), "--baseline", "lora"])
    adapter = tmp_path / "run_lora" / "best"
    assert str(adapter) in capsys.readouterr().out
    main(["eval", str(adapter), "--split", "valid"])
    assert "| depth | n | LoRA |" in capsys.readouterr().out
    results = json.loads((adapter / "results.json").read_text())
    assert results["name"] == "LoRA" and results["accuracy_by_depth"][-1]["n"] == 16
    main(["eval", str(adapter), "--split", "valid", "--output", str(tmp_path / "new" / "lora.json")])
    assert (tmp_path / "new" / "lora.json").exists()
    assert "--rollouts: of a head alone" in error_of(capsys, "eval", str(adapter), "--rollouts", "4")
