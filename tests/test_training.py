"""Training invariants: frozen weights, exact resume, accumulation, processes, early errors."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import CHOICES, chain_examples, chatty_llama, open_gate, tiny_reasoner, tiny_run, word_tokenizer
from safetensors.torch import load_file

from hybrid.backbone import Backbone
from hybrid.batches import (
    EmbeddedExamples,
    common_fields,
    common_options,
    common_places,
    embed_examples,
    known_options,
)
from hybrid.config import (
    FeatureConfig,
    HybridConfig,
    RecursionStage,
    RunConfig,
    TextConfig,
    TrainingConfig,
    stage_at,
    to_plain,
)
from hybrid.data import Example, load_examples
from hybrid.decoder import Field
from hybrid.evaluation import StepRecord, train_seconds
from hybrid.generation import keep_loss, own_texts
from hybrid.inference import answer_batch
from hybrid.losses import IGNORED
from hybrid.model import HybridModel
from hybrid.preparation import prepare
from hybrid.refinement import refine
from hybrid.stream import Curriculum, RowStream
from hybrid.training import CHECKPOINT, Trainer, train
from hybrid.weights import learning_rate


def write_data(folder: Path, number: int = 64) -> None:
    with (folder / "data.jsonl").open("w") as file:
        for split, seed, size in (("train", 0, number), ("valid", 1, 16), ("test", 2, 16)):
            for example in chain_examples(size, seed=seed):
                row = {"id": example.id, "split": split, "depth": example.depth, "context": example.context}
                file.write(json.dumps(row | {"question": example.question, "answer": example.answers[0]}) + "\n")


@pytest.fixture
def folder(tmp_path) -> Path:
    write_data(tmp_path)
    return tmp_path


def curve(run_folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(head: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(head / "model.safetensors")


def test_training_learns_and_leaves_the_backbone_as_it_was(folder, backbone):
    before = backbone.full_hash()
    config = tiny_run(folder, num_updates=150, batch_size=16, learning_rate=3e-3, eval_every=150, save_every=150)
    best = train(config, backbone=backbone)
    assert backbone.full_hash() == before
    lines = curve(folder / "run")
    assert lines[0]["answer_loss"] > 1.0 > lines[-2]["answer_loss"]
    assert lines[-1]["valid_accuracy"] > 0.6  # four directions: chance is a quarter
    model = HybridModel.from_pretrained(best, backbone, dtype="float32")
    example = chain_examples(1, seed=2)[0]
    assert model.answer(example.question, context=example.context).value in example.fields[0].options
    assert yaml.safe_load((best / "run.yaml").read_text()) == to_plain(config)
    assert "Trained on `data.jsonl`" in (best / "README.md").read_text()


@pytest.fixture
def two_threads(monkeypatch):
    """Parts of a batch in two threads, whatever their size."""
    monkeypatch.setattr("hybrid.training.MIN_PART", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "settings", [{"feature_noise": 0.1, "precision": "bf16"}, {"optimizer": "muon", "curriculum": 0.1}]
)
def test_resumed_run_equals_one_that_never_stopped(folder, backbone, two_threads, settings):
    whole = tiny_run(folder, output_folder=str(folder / "whole"), **settings)
    stopped = tiny_run(folder, output_folder=str(folder / "stopped"), **settings)
    whole.reasoner = stopped.reasoner = tiny_reasoner(refine_memory="curriculum" in settings)
    train(whole, backbone=backbone)
    trainer = Trainer(stopped, *prepare(stopped, Accelerator(cpu=True), backbone), Accelerator(cpu=True))
    (folder / "stopped").mkdir()
    for _ in range(5):
        trainer.update()
        if trainer.num_updates % 2 == 0:
            trainer.log()
    trainer.save_checkpoint()  # after update 5: in the middle of a log window
    trainer.update()
    trainer.log()  # this update and its log line are lost with the process
    train(stopped, resume=True, backbone=backbone)
    assert curve(folder / "stopped") == curve(folder / "whole")
    for name, weight in weights(folder / "whole" / "last").items():
        torch.testing.assert_close(weight, weights(folder / "stopped" / "last")[name], rtol=0, atol=0)


def test_parts_hold_rows_of_similar_length_and_each_row_once(folder, backbone, two_threads):
    trainer = Trainer(
        tiny_run(folder), *prepare(tiny_run(folder), Accelerator(cpu=True), backbone), Accelerator(cpu=True)
    )
    lengths = torch.randint(20, 160, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    parts = trainer._parts(lengths)
    assert len(parts) == 4 and sorted(torch.cat(parts).tolist()) == list(range(64))
    padded = sum(max(lengths[row] for row in part.tolist()) * len(part) for part in parts)
    assert 1 - sum(lengths) / padded < 0.2 < 1 - sum(lengths) / (64 * max(lengths))  # against one part


def test_threads_change_the_training_by_rounding_only(folder, backbone, two_threads):
    train(tiny_run(folder, output_folder=str(folder / "two")), backbone=backbone)
    torch.set_num_threads(1)
    train(tiny_run(folder, output_folder=str(folder / "one")), backbone=backbone)
    for name, weight in weights(folder / "one" / "last").items():
        torch.testing.assert_close(weight, weights(folder / "two" / "last")[name], rtol=1e-4, atol=1e-5)


def test_muon_takes_the_linear_layers_and_adamw_the_rest(folder, backbone):
    config = tiny_run(folder, optimizer="muon")
    trainer = Trainer(config, *prepare(config, Accelerator(cpu=True), backbone), Accelerator(cpu=True))
    adamw, muon = ([p for group in o.param_groups for p in group["params"]] for o in trainer.weights.optimizers)
    assert len(adamw) + len(muon) == len(trainer.weights.masters)
    names = {
        name
        for name, master in zip(trainer.weights.names, trainer.weights.masters, strict=False)
        if any(master is p for p in muon)
    }
    assert "adapter.projection.weight" in names and "reasoner.networks.0.layers.1.mlp.down.weight" in names
    assert not any("halt_head" in name or "tape" in name or "residual" in name for name in names)
    first = trainer.weights.masters[0].clone()
    trainer.update()
    assert not torch.equal(first, trainer.weights.masters[0])


def test_accumulation_equals_one_large_batch(folder, backbone):
    for name, parts in (("one", 1), ("two", 2)):
        config = tiny_run(folder, output_folder=str(folder / name), gradient_accumulation_steps=parts)
        train(config, backbone=backbone)
    for name, weight in weights(folder / "one" / "last").items():
        torch.testing.assert_close(weight, weights(folder / "two" / "last")[name], rtol=1e-4, atol=1e-5)


def run_cli(folder: Path, config: RunConfig, backbone_folder: Path, *flags: str, launch: tuple[str, ...] = ()):
    data = to_plain(config)
    data["backbone"] |= {"name_or_path": str(backbone_folder), "layers": [0, 1, 2], "dtype": "float32"}
    (folder / "run.yaml").write_text(yaml.safe_dump(data))
    command = [sys.executable, *launch, "-m", "hybrid", "train", str(folder / "run.yaml"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_equal_one(folder, backbone_folder):
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2")  # accelerate's own launcher starts one on a CPU
    for name, prefix in (("one", ()), ("two", launch)):
        config = tiny_run(folder, output_folder=str(folder / name))
        process = run_cli(folder, config, backbone_folder, launch=prefix)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    one, two = curve(folder / "one"), curve(folder / "two")
    assert [line["update"] for line in one] == [line["update"] for line in two]
    for line, other in zip(one, two, strict=True):
        for key in {"loss", "gradient_norm", "rows_finished", "mean_steps", "valid_accuracy"} & line.keys():
            expected = other[key]
            assert line[key] == (None if expected is None else pytest.approx(expected, rel=1e-3))
    for name, weight in weights(folder / "one" / "last").items():
        torch.testing.assert_close(weight, weights(folder / "two" / "last")[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_killed_and_interrupted_runs_resume(folder, backbone, backbone_folder, how):
    config = tiny_run(folder, num_updates=160, eval_every=160, save_every=4)
    process = run_cli(folder, config, backbone_folder)
    checkpoint = folder / "run" / CHECKPOINT
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    output, errors = process.communicate(timeout=60)
    assert checkpoint.exists(), errors
    if how == signal.SIGINT:
        assert process.returncode == 130, errors
        assert "saved; go on with --resume" in output
    reached = torch.load(checkpoint, weights_only=True)["num_updates"]
    assert 0 < reached < 160
    config.training.num_updates = 160
    process = run_cli(folder, config, backbone_folder, "--resume")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"resumed after update {reached}" in output
    losses = {line["update"]: line["loss"] for line in curve(folder / "run") if "loss" in line}
    whole = tiny_run(folder, num_updates=160, eval_every=160, output_folder=str(folder / "whole"))
    train(whole, backbone=backbone)
    expected = {line["update"]: line["loss"] for line in curve(folder / "whole") if "loss" in line}
    assert losses == pytest.approx(expected, rel=1e-4)


def test_existing_run_is_not_overwritten_and_changes_are_named(folder, backbone):
    config = tiny_run(folder, num_updates=4)
    train(config, backbone=backbone)
    with pytest.raises(ValueError, match="holds a run already"):
        train(config, backbone=backbone)
    changed = tiny_run(folder, num_updates=4, weight_decay=0.5)
    with pytest.raises(ValueError, match=r"\['training.weight_decay'\] differ"):
        train(changed, resume=True, backbone=backbone)
    write_data(folder, number=60)
    with pytest.raises(ValueError, match="training data have changed"):
        train(config, resume=True, backbone=backbone)
    shutil.rmtree(folder / "run")
    with pytest.raises(ValueError, match="--resume: no "):
        train(config, resume=True, backbone=backbone)


def test_a_new_run_counts_no_seconds_of_a_dead_one(folder, backbone):
    config = tiny_run(folder, num_updates=4)
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_text('{"update": 200, "seconds": 1e6}\n')  # it came to no checkpoint
    assert train_seconds(train(config, backbone=backbone)) < 1e6
    assert all(line["update"] <= 4 for line in curve(folder / "run"))


def test_a_loaded_backbone_is_read_as_the_run_says(folder, backbone):
    config = tiny_run(folder, num_updates=2)
    config.backbone.layers, config.backbone.template = [1], "plain"
    assert (backbone.layers, backbone.template) != ([1], "plain")
    head = HybridModel.from_pretrained(train(config, backbone=backbone), backbone)
    assert (head.config.backbone.layers, head.config.backbone.template) == ([1], "plain")


def test_a_stage_that_is_not_reached_is_told(folder, backbone):
    config = tiny_run(folder, num_updates=2)
    config.training.recursion_schedule = [RecursionStage(max_steps=1), RecursionStage(start=2, max_steps=2)]
    with pytest.warns(UserWarning, match="a stage from update 2 on, and the run ends after 2"):
        train(config, backbone=backbone)


def test_a_run_may_have_a_thread_of_its_own(folder, backbone):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train, tiny_run(folder, num_updates=2), backbone=backbone).result().exists()


def test_loss_that_is_not_finite_names_update_and_fix(folder, backbone):
    config = tiny_run(folder, learning_rate=1e-3)
    trainer = Trainer(config, *prepare(config, Accelerator(cpu=True), backbone), Accelerator(cpu=True))
    trainer.update()
    before = [master.clone() for master in trainer.weights.masters]
    trainer.weights.masters[0].grad = torch.full_like(trainer.weights.masters[0], float("inf"))
    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        trainer.weights.update(1e-3, 1)
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.weights.masters, strict=True))
    trainer.num_updates = 0
    with torch.no_grad():
        trainer.model.decoder.score_scale.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at update 0 .* lower training.learning_rate=0.001"):
        trainer.update()


def test_full_disk_is_explained_and_the_checkpoint_stays_whole(folder, backbone):
    config = tiny_run(folder)
    (folder / "run").mkdir()
    trainer = Trainer(config, *prepare(config, Accelerator(cpu=True), backbone), Accelerator(cpu=True))
    trainer.update()
    trainer.save_checkpoint()
    whole = (folder / "run" / CHECKPOINT).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # no file may grow beyond 20 kB: writing fails as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        with pytest.raises(OSError, match="the disk is full while writing .*checkpoint.pt"):
            trainer.save_checkpoint()
        with pytest.raises(OSError, match="the disk is full while writing .*best"):
            trainer.save_head("best")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert (folder / "run" / CHECKPOINT).read_bytes() == whole


def test_finished_rows_are_replaced_and_others_keep_their_state(folder, backbone):
    config = tiny_run(folder, halt_exploration=0.0)
    trainer = Trainer(config, *prepare(config, Accelerator(cpu=True), backbone), Accelerator(cpu=True))
    trainer.update()
    before, drawn = trainer.rows.y.clone(), trainer.rows.draws.clone()
    trainer.rows.halted[:] = False
    trainer.rows.halted[3] = True
    trainer.update()
    assert (trainer.rows.draws - drawn).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert trainer.rows.steps.tolist() == [2, 2, 2, 1, 2, 2, 2, 2]
    assert not torch.equal(before, trainer.rows.y)


def test_curriculum_draws_only_what_is_shallow_enough(folder, backbone):
    config = tiny_run(folder, curriculum=0.9)
    trainer = Trainer(config, *prepare(config, Accelerator(cpu=True), backbone), Accelerator(cpu=True))

    def drawn() -> set[int | None]:
        depths = set()
        for _ in range(6):
            trainer.rows.halted[:] = True
            trainer.update()
            depths |= {trainer.train.examples[row].depth for row in trainer.rows.examples()}
        return depths

    assert drawn() == {1} and trainer.curriculum.mastery < 0.9
    trainer.curriculum.mastery = 0.95
    trainer.update()
    assert trainer.curriculum.deepest == 2 and trainer.curriculum.mastery == 0
    assert drawn() == {1, 2}


def test_curriculum_follows_the_deepest_level_alone():
    curriculum = Curriculum([1, 2, None, 3], 0.5)
    assert [curriculum.accepts(row) for row in range(4)] == [True, False, True, False]
    for _ in range(800):
        curriculum.record([0, 1, 2], torch.tensor([True, False, False]))
    assert curriculum.mastery > 0.5 and curriculum.is_mastered()
    curriculum.deepen()
    curriculum.deepen()
    curriculum.mastery = 1.0
    assert curriculum.accepts(3) and not curriculum.is_mastered()  # there is nothing deeper
    assert Curriculum([1, 3], None).accepts(1) and Curriculum([None], None).accepts(0)


def test_patience_ends_a_run_that_gets_no_better(folder, backbone):
    config = tiny_run(folder, num_updates=40, eval_every=2, patience=2, learning_rate=1e-9)
    assert train(config, backbone=backbone) == folder / "run" / "best"
    evaluations = [line for line in curve(folder / "run") if "valid_accuracy" in line]
    assert [line["update"] for line in evaluations] == [2, 4, 6]  # the first is the best, then two that are not better
    assert train(config, resume=True, backbone=backbone) == folder / "run" / "best"  # over is over
    assert len([line for line in curve(folder / "run") if "valid_accuracy" in line]) == 3


@pytest.mark.parametrize("halting", ["learned", "never", "convergence"])
def test_rows_halt_as_configured(folder, backbone, halting):
    config = tiny_run(folder, halt_exploration=0.0)
    config.reasoner.halting, config.reasoner.convergence_tolerance = halting, 1e9  # everything has converged
    trainer = Trainer(config, *prepare(config, Accelerator(cpu=True), backbone), Accelerator(cpu=True))
    with torch.no_grad():
        trainer.model.decoder.halt_head.bias.fill_(5.0)  # every row believes to be right
    trainer.update()
    assert trainer.rows.halted.all() == (halting != "never")


def test_what_the_example_before_left_ends_no_example(folder, backbone):
    config = tiny_run(folder, halt_exploration=0.0, learning_rate=1e-9)
    config.reasoner.halting = "convergence"
    parts = prepare(config, Accelerator(cpu=True), backbone)
    first, second = (Trainer(config, *parts, Accelerator(cpu=True)) for _ in range(2))
    first.update()
    second.rows.y.copy_(first.rows.y)  # as if the examples before had ended where these come to in a step
    second.update()
    assert not first.rows.halted.any() and not second.rows.halted.any()


def test_a_curriculum_counts_what_was_asked(folder, backbone, monkeypatch):
    config, asked = tiny_run(folder, curriculum=0.9), []
    trainer = Trainer(config, *prepare(config, Accelerator(cpu=True), backbone), Accelerator(cpu=True))
    monkeypatch.setattr(trainer.curriculum, "record", lambda examples, right: asked.extend(examples))

    def nothing_due(rows, steps, labels):
        return labels.masked_fill(torch.arange(len(labels))[:, None] % 2 == 0, IGNORED)

    monkeypatch.setattr(trainer.train, "due_labels", nothing_due)
    trainer.update()
    assert 0 < len(asked) <= config.training.batch_size // 2


def test_a_curriculum_needs_depths():
    with pytest.warns(UserWarning, match="rows of several depths are needed"):
        Curriculum([1, None, 1], 0.5)


def test_while_no_whole_answer_is_right_the_head_with_most_right_fields_is_the_best(folder, backbone, monkeypatch):
    config = tiny_run(folder)
    trainer = Trainer(config, *prepare(config, Accelerator(cpu=True), backbone), Accelerator(cpu=True))
    twice = (Field("first", CHOICES), Field("second", CHOICES))
    trainer.valid.examples = [
        dataclasses.replace(example, fields=twice, answers=example.answers * 2) for example in trainer.valid.examples
    ]
    saved: list[str] = []
    shape = (config.reasoner.max_steps, len(trainer.valid))
    no, shares = torch.zeros(shape, dtype=torch.bool), iter((0.25, 0.75, 0.5))

    def record(*args) -> StepRecord:
        zeros = torch.zeros(shape)
        return StepRecord(no, zeros + next(shares), zeros, no, zeros, 0.0)

    monkeypatch.setattr("hybrid.training.run_steps", record)
    monkeypatch.setattr(trainer, "save_head", lambda name: saved.append(name))
    trainer.folder.mkdir()
    for _ in range(3):
        trainer.evaluate()
    assert saved == ["best", "last", "best", "last", "last"]
    assert [line["valid_fields"] for line in curve(folder / "run")] == [0.25, 0.75, 0.5]


def test_new_weights_do_not_keep_the_figures_of_old_ones(folder, backbone):
    config = tiny_run(folder, num_updates=2)
    best = train(config, backbone=backbone)
    (best / "results.json").write_text("{}")
    trainer = Trainer(config, *prepare(config, Accelerator(cpu=True), backbone), Accelerator(cpu=True))
    trainer.save_head("best")
    assert not (best / "results.json").exists()


def test_row_stream_covers_each_epoch_once_whatever_the_batch():
    stream = RowStream(num_examples=50, batch_size=8, seed=3)
    drawn = [stream.example(row, draw) for draw in range(25) for row in range(8)]  # 200 = 4 epochs
    for epoch in range(4):
        assert sorted(drawn[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert drawn[:50] != drawn[50:100]
    half = [stream.min_steps(row, 0, exploration=0.5, max_steps=8) for row in range(400)]
    assert 120 < sum(steps > 1 for steps in half) < 280 and max(half) == 8


def test_recursion_schedule_and_learning_rate(folder, backbone):
    stages = [RecursionStage(num_latent_passes=1, num_cycles=1, max_steps=1), RecursionStage(start=4, num_cycles=3)]
    config = tiny_run(folder, recursion_schedule=stages)
    trainer = Trainer(config, *prepare(config, Accelerator(cpu=True), backbone), Accelerator(cpu=True))
    numbers = [(stage.num_latent_passes, stage.num_cycles, stage.max_steps) for stage in [trainer.stage()]]
    trainer.num_updates = 4
    numbers.append((trainer.stage().num_latent_passes, trainer.stage().num_cycles, trainer.stage().max_steps))
    configured = config.reasoner
    assert numbers == [(1, 1, 1), (configured.num_latent_passes, 3, configured.max_steps)]
    settings = dataclasses.replace(config.training, learning_rate=1.0, warmup_updates=10, num_updates=110)
    rates = [learning_rate(settings, update) for update in range(111)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[110] == pytest.approx(0.1)


def test_a_run_may_recur_more_often_than_the_head_it_starts_from(folder, backbone):
    first = train(tiny_run(folder, num_updates=2), backbone=backbone)
    config = tiny_run(folder, num_updates=1, output_folder=str(folder / "more"), start_from=str(first))
    config.reasoner = tiny_reasoner(num_cycles=3, num_gradient_cycles=3)
    model = prepare(config, Accelerator(cpu=True), backbone)[0]
    weights = load_file(first / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    config.training.parts = ["adapter", "decoder"]  # and the reasoner would be used otherwise than it was trained
    with pytest.raises(ValueError, match=r"has reasoner\.num_cycles=2, and this run 3: use the same"):
        prepare(config, Accelerator(cpu=True), backbone)
    config.training.parts, places = None, HybridConfig.from_pretrained(first)
    places.places = {}
    places.save_pretrained(first)
    with pytest.raises(ValueError, match="stood in the text .* set data.places"):
        prepare(config, Accelerator(cpu=True), backbone)


def test_a_stage_of_fewer_cycles_has_no_more_of_them_with_gradient(folder):
    config = tiny_run(folder, recursion_schedule=[RecursionStage(num_cycles=1), RecursionStage(start=4)])
    config.reasoner = tiny_reasoner(num_cycles=3, num_gradient_cycles=3)
    numbers = [(stage.num_cycles, stage.num_gradient_cycles) for stage in (stage_at(config, n) for n in (0, 3, 4))]
    assert numbers == [(1, 1), (1, 1), (3, 3)]


def test_validation_also_tells_the_accuracy_after_the_steps_of_the_stage(folder, backbone):
    stages = [RecursionStage(max_steps=1), RecursionStage(start=6)]  # from the update after the first validation on
    config = tiny_run(folder, recursion_schedule=stages)
    config.reasoner.halting = "never"
    train(config, backbone=backbone)
    early, late = [line for line in curve(folder / "run") if "valid_accuracy" in line]
    assert early["update"] == 6 and 0 <= early["valid_accuracy_of_stage"] <= 1
    assert "valid_accuracy_of_stage" not in late
    config.training.output_folder = str(folder / "one_step")
    config.reasoner.max_steps, config.training.recursion_schedule = 1, []
    train(config, backbone=backbone)
    same = [line for line in curve(folder / "one_step") if "valid_accuracy" in line][0]
    assert same["valid_accuracy"] == early["valid_accuracy_of_stage"]


def test_cached_features_equal_live_features(model, embedded):
    assert isinstance(embedded, EmbeddedExamples)
    texts = [(embedded.examples[row].context, embedded.examples[row].question) for row in range(6)]
    live, live_mask = model.embed(texts)
    cached, cached_mask, _, _ = embedded.batch(model, range(6))
    assert torch.equal(live_mask, cached_mask)
    torch.testing.assert_close(cached, live, rtol=1e-2, atol=1e-2)  # the store keeps bfloat16
    torch.testing.assert_close(cached[..., 1:, :], live.bfloat16().float()[..., 1:, :], rtol=1e-2, atol=1e-3)


def test_text_decoder_learns_on_a_head_that_stays_as_it_was(folder):
    backbone = Backbone(chatty_llama(), word_tokenizer(), name="tiny-llama", layers=[0, 1, 2], template="echo")
    first = train(tiny_run(folder, num_updates=4), backbone=backbone)
    config = tiny_run(folder, num_updates=90, batch_size=16, learning_rate=1e-2, output_folder=str(folder / "text"))
    config.text = TextConfig(enabled=True, suffix=" is")
    config.training.start_from, config.training.parts = str(first), ["text_decoder"]
    before = backbone.full_hash()
    best = train(config, backbone=backbone)
    assert backbone.full_hash() == before
    lines = [line for line in curve(folder / "text") if "text_loss" in line]
    losses = [line["text_loss"] for line in lines]
    assert sum(losses[-9:]) < 0.9 * sum(losses[:9])  # three rounds of three steps: text is written at the last
    start, now = weights(first), weights(best)
    assert {name.split(".")[0] for name in set(now) - set(start)} == {"text_decoder"}
    assert all(torch.equal(start[name], now[name]) for name in start)


def test_text_run_resumes_without_the_head_that_it_started_from(folder, backbone):
    first = train(tiny_run(folder, num_updates=4), backbone=backbone)

    def run(name: str) -> RunConfig:
        settings = {"start_from": str(first), "keep_loss_weight": 0.5, "parts": ["text_decoder"]}
        return tiny_run(folder, TextConfig(enabled=True), output_folder=str(folder / name), **settings)

    train(run("whole"), backbone=backbone)
    update, count = Trainer.update, 0

    def stops_after_six(trainer):
        nonlocal count
        count += 1
        update(trainer)
        trainer.stop_requested |= count == 6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", stops_after_six)
        assert train(run("stopped"), backbone=backbone) is None
    shutil.rmtree(first)
    train(run("stopped"), resume=True, backbone=backbone)
    assert curve(folder / "stopped") == curve(folder / "whole")
    whole, stopped = weights(folder / "whole" / "last"), weights(folder / "stopped" / "last")
    assert all(torch.equal(stopped[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize(
    ("settings", "enabled", "words"),
    [
        ({"parts": []}, True, "some of adapter, reasoner, decoder, text_decoder"),
        ({"parts": ["reasonr"]}, True, "some of adapter, reasoner, decoder, text_decoder"),
        ({"parts": ["text_decoder"]}, True, "training.start_from=None"),
        ({"parts": ["text_decoder"], "start_from": "x"}, False, "text.enabled=False"),
        ({"parts": ["reasoner"], "start_from": "x", "keep_loss_weight": 1.0}, True, "keep_loss_weight=1.0"),
        ({"keep_loss_weight": 1.0}, False, "keep_loss_weight=1.0"),
    ],
)
def test_parts_that_cannot_be_trained_are_refused(settings, enabled, words):
    with pytest.raises(ValueError, match=words):
        RunConfig(training=TrainingConfig(**settings), text=TextConfig(enabled=enabled))


def test_checkpoint_of_an_older_version_goes_on(folder, backbone):
    train(tiny_run(folder, num_updates=4), backbone=backbone)
    path = folder / "run" / CHECKPOINT
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["config"]["text"], checkpoint["config"]["training"]["keep_loss_weight"]
    torch.save(checkpoint, path)
    config = tiny_run(folder, num_updates=4)
    assert train(config, resume=True, backbone=backbone)
    with pytest.raises(ValueError, match=r"'text\.enabled'"):
        train(dataclasses.replace(config, text=TextConfig(enabled=True)), resume=True, backbone=backbone)


def test_text_and_fields_are_learned_together(folder, backbone):
    config = tiny_run(folder, TextConfig(enabled=True), num_updates=6)
    train(config, backbone=backbone)
    lines = curve(folder / "run")
    assert {"answer_loss", "text_loss", "written_right"} <= set(lines[0])
    assert any("valid_written" in line for line in lines)


def test_own_texts_are_kept_as_they_are(folder):
    backbone = Backbone(chatty_llama(), word_tokenizer(), name="tiny-llama", layers=[0, 1, 2], template="echo")
    texts = own_texts(backbone, 5, 9, seed=1)
    assert own_texts(backbone, 5, 9, seed=1) == texts != own_texts(backbone, 5, 9, seed=2)
    assert {len(text) for text in texts} == {10}
    config = tiny_run(folder, TextConfig(enabled=True), num_updates=4, keep_loss_weight=1.0)
    best = train(config, backbone=backbone)
    assert all(line["keep_loss"] > 0 for line in curve(folder / "run") if "text_loss" in line)
    model = HybridModel.from_pretrained(best, backbone, dtype="float32").train()
    open_gate(model)
    fields = load_examples(config.data, "train")[0].fields
    before, after = [], []
    for values in (before, after):  # a step down the gradient shuts the gate
        loss = keep_loss(model, texts, fields)
        values.append(float(loss))
        (gradient,) = torch.autograd.grad(loss, [model.text_decoder.gate.bias])
        model.text_decoder.gate.bias.data.sub_(5.0 * gradient.sign())
    assert after < before and model.text_decoder.gate.bias < 1.0


def test_names_of_several_fields_are_known_as_options_are():
    def example(*fields: Field) -> Example:
        return Example(None, "?", fields, tuple("1" for _ in fields), None, "x")

    assert known_options([example(Field("r1c2", "12"), Field("r2c1", "12"))]) == ["1", "2", "r1c2", "r2c1"]
    assert known_options([example(Field("answer", "12"))]) == ["1", "2"]
    many = [example(Field(f"a{n}", "12"), Field(f"b{n}", "12")) for n in range(600)]
    assert known_options(many) == ["1", "2"]


def test_fields_that_all_questions_ask_are_the_default(folder, backbone):
    def example(*fields: Field) -> Example:
        return Example(None, "?", fields, tuple("1" for _ in fields), None, "x")

    assert common_fields([example(Field("a", "12"), Field("b", "12"))] * 2) == {"a": ["1", "2"], "b": ["1", "2"]}
    assert common_fields([example(Field("a", "12")), example(Field("b", "12"))]) is None
    assert common_options([example(Field("a", "12")), example(Field("b", "12"))]) == ["1", "2"]
    assert common_options([example(Field("a", "12")), example(Field("b", "13"))]) is None
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rows = [row | {"answer": {"first": row["answer"], "second": row["answer"]}} for row in rows]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = HybridModel.from_pretrained(train(tiny_run(folder, num_updates=2), backbone=backbone), backbone)
    assert model.config.choices is None and list(model.config.fields) == ["first", "second"]
    assert list(model.answer(rows[0]["question"]).value) == ["first", "second"]


def test_fields_start_where_they_stand_in_training_and_after(folder, backbone):
    """A single field keeps its place, and what is asked later is what was trained."""
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    field = {"name": "answer", "options": list(CHOICES), "at": 5}  # the word `left` or its like
    rows = [row | {"fields": [field], "answer": {"answer": row["answer"]}} for row in rows]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = tiny_run(folder, num_updates=2)
    model = HybridModel.from_pretrained(train(config, backbone=backbone), backbone, dtype="float32")
    assert model.config.choices == list(CHOICES) and model.config.places == {"answer": 5}
    examples = load_examples(config.data, "valid")
    embedded = embed_examples(config.features, backbone, {"valid": examples}, progress=False)["valid"]
    *inputs, fields, _ = embedded.batch(model, range(4), num_fields=2)
    assert fields.starts.tolist() == [[2, -1]] * 4
    trained, nowhere = (
        refine(model, *inputs, each).scores[:, 0].softmax(-1)
        for each in (fields, dataclasses.replace(fields, starts=None))
    )
    answers = [model.answer(example.question, context=example.context) for example in examples[:4]]
    asked = torch.tensor([list(answer.trace[-1]["answer"].values()) for answer in answers])
    torch.testing.assert_close(asked, trained, atol=0.01, rtol=0)  # the cache holds bfloat16
    assert (asked - nowhere).abs().max() > 0.02


def test_a_step_is_asked_for_what_is_due(model, backbone, tmp_path):
    fields = (Field("near", ["left", "right"]), Field("far", ["left", "right", "unknown"]))
    example = Example(None, "A is left of B .", fields, ("left", "right"), None, "x", due=(2, 3))
    rows = [example, dataclasses.replace(example, due=None)]
    embedded = embed_examples(FeatureConfig(folder=str(tmp_path)), backbone, {"x": rows}, progress=False)["x"]
    *_, labels = embedded.batch(model, [0, 1, 0, 0])
    assert labels.tolist() == [[0, 1]] * 4
    asked = embedded.due_labels([0, 1, 0, 0], [1, 1, 2, 3], labels)
    assert asked.tolist() == [[IGNORED, 2], [0, 1], [0, 2], [0, 1]]
    assert labels.tolist() == [[0, 1]] * 4


def test_answers_that_no_step_would_be_asked_for_are_refused(folder, backbone):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rows = [row | {"answer": {"answer": row["answer"]}, "due": {"answer": 3}} for row in rows]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    short = [RecursionStage(max_steps=3), RecursionStage(start=1, max_steps=2)]
    with pytest.raises(
        ValueError, match=r"due from step 3 on, and training ends with 2 steps at most: raise reasoner"
    ):
        train(tiny_run(folder, num_updates=2, recursion_schedule=short), backbone=backbone)
    config = tiny_run(folder, num_updates=3)  # three steps
    assert train(config, backbone=backbone)
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert "valid_fields" not in lines[-1]


def test_feature_noise_is_relative_to_each_dimension(folder, backbone, monkeypatch):
    """A few dimensions of a language model are huge: noise in proportion to them would drown all others."""
    config = tiny_run(folder, feature_noise=0.1, num_updates=2)
    trainer = Trainer(config, *prepare(config, Accelerator(cpu=True), backbone), Accelerator(cpu=True))
    scale = trainer.model.adapter.inverse_scale
    seen, forward = [], trainer.model.adapter.forward
    monkeypatch.setattr(
        trainer.model.adapter, "forward", lambda states, mask: seen.append((states, mask)) or forward(states, mask)
    )
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    batch = trainer.train.batch

    def without(*arguments):
        states, *rest = batch(*arguments)
        return torch.zeros_like(states), *rest

    monkeypatch.setattr(trainer.train, "batch", without)
    trainer.update()
    assert seen
    for states, mask in seen:
        noise = (states.float() * scale)[mask]
        torch.testing.assert_close(noise, torch.full_like(noise, 0.1), rtol=0.01, atol=0)


@pytest.mark.parametrize("template", ["echo", "apart"])
def test_memory_of_whitened_sentences_travels_with_the_head(folder, backbone, template):
    config = tiny_run(folder, num_updates=2, feature_noise=0.1)
    config.backbone.memory, config.adapter.whiten, config.data.answer_at = "sentences", True, -1
    config.backbone.template, sentences = template, backbone.with_settings(backbone.layers, template, "sentences")
    model = HybridModel.from_pretrained(train(config, backbone=sentences), backbone, dtype="float32")
    assert model.backbone.memory == "sentences" and model.config.places == {"answer": -1}
    whitening = model.adapter.whitening
    assert not torch.equal(whitening, torch.eye(whitening.shape[-1]).expand_as(whitening))
    examples = load_examples(config.data, "valid")
    embedded = embed_examples(config.features, model.backbone, {"valid": examples}, progress=False)["valid"]
    hidden_states, mask, fields, _ = embedded.batch(model, range(4))
    live, live_mask = model.embed([(example.context, example.question) for example in examples[:4]])
    assert mask.equal(live_mask)
    torch.testing.assert_close(hidden_states[mask].float(), live[mask].float(), rtol=0.01, atol=1e-3)  # stored in bf16
    assert mask.sum() < 4 * 6 and fields.starts.squeeze(1).tolist() == (mask.sum(1) - 1).tolist()
    together = [answer.probability for answer in answer_batch(model, [example.question for example in examples[:4]])]
    alone = [model.answer(example.question).probability for example in examples[:4]]
    assert together == pytest.approx(alone, rel=1e-4)


def test_places_that_hold_for_other_texts():
    def example(*fields: Field) -> Example:
        return Example(None, "? ? ?", fields, tuple("1" for _ in fields), None, "x")

    assert common_places([example(Field("a", "12"), Field("b", "12"))]) is None
    rows = [example(Field("a", "12", at=0), Field("b", "12")), example(Field("a", "12", at=0), Field("c", "12", at=2))]
    assert common_places(rows) == {"a": 0}  # c stands somewhere in one example: no rule
    assert common_places([*rows, example(Field("a", "12", at=4))]) == {}
    assert common_places([*rows, example(Field("answer", "12", at=-1))]) == {"answer": -1}
    assert common_fields([example(Field("a", "12", at=0)), example(Field("a", "12", at=2))]) == {"a": ["1", "2"]}


def test_start_from_another_head_is_checked(folder, backbone):
    first = train(tiny_run(folder, TextConfig(enabled=True), num_updates=2), backbone=backbone)
    config = tiny_run(folder, num_updates=2, output_folder=str(folder / "other"), start_from=str(first))
    config.reasoner = tiny_reasoner(intermediate_size=32)
    with pytest.raises(ValueError, match=r"has reasoner.intermediate_size=48, and this run 32: use the same"):
        train(config, backbone=backbone)
    config.reasoner = tiny_reasoner(rotary=True)  # no weight has another shape
    with pytest.raises(ValueError, match=r"has reasoner.rotary=False, and this run True"):
        train(config, backbone=backbone)
    config.reasoner = tiny_reasoner()
    with pytest.raises(ValueError, match=r"text\.enabled=false, but .* has a text decoder: set text\.enabled=true"):
        train(config, backbone=backbone)
    config.training.start_from = str(folder)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        train(config, backbone=backbone)
