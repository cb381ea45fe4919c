"""The embedded default model, for real. Slow: minutes, not seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hybrid.backbone import Backbone
from hybrid.baselines import option_log_likelihoods, zero_shot
from hybrid.batches import embed_examples
from hybrid.config import BackboneConfig, FeatureConfig, RecursionStage, TextConfig
from hybrid.data import load_examples
from hybrid.model import HybridModel
from hybrid.quickstart import quickstart_config
from hybrid.training import train

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def smollm2() -> Backbone:
    return Backbone.from_pretrained("smollm2")


def test_second_start_takes_seconds(smollm2):
    start = time.perf_counter()
    again = Backbone.from_pretrained("smollm2")
    assert time.perf_counter() - start < 5
    assert (again.dim, again.num_layers, again.layers) == (576, 30, [0, 12, 20])
    assert again.full_hash() == smollm2.full_hash()


def test_tokenizer_and_states_are_those_of_the_gguf(smollm2):
    ids = smollm2.tokenizer("X is to the left of K.")["input_ids"]
    assert smollm2.tokenizer.decode(ids) == "X is to the left of K."
    prompt = smollm2.prompt("X is to the left of K.", "Where is X?")
    states, memory = smollm2.hidden_states([prompt])[0], slice(prompt.memory_start, prompt.memory_stop)
    ids = torch.tensor([prompt.token_ids])
    with torch.no_grad():
        expected = smollm2._short_encoder(ids, output_hidden_states=True).hidden_states
        fused = smollm2.encoder(ids, output_hidden_states=True).hidden_states  # attention that rounds differently
    for index, layer in enumerate([12, 20]):
        assert torch.equal(states[:, index], expected[layer][0, memory])
        similarity = torch.cosine_similarity(states[:, index].float(), fused[layer][0, memory].float(), dim=-1)
        assert similarity.min() > 0.99  # two roundings of bfloat16, twenty blocks deep


def test_zero_shot_knows_what_every_child_knows(smollm2):
    options = ["Paris", "banana", "seventeen"]
    assert option_log_likelihoods(smollm2, "The capital of France is", options).argmax() == 0


def test_a_short_training_beats_chance_and_leaves_the_model_as_it_was(smollm2, tmp_path):
    config = quickstart_config(str(tmp_path / "run"))
    config.data.train_depths = [1]
    config.training.num_updates = config.training.eval_every = 250
    config.training.recursion_schedule = [RecursionStage(num_latent_passes=1, max_steps=1)]
    before = smollm2.full_hash()
    best = train(config, backbone=smollm2)
    assert smollm2.full_hash() == before
    model = HybridModel.from_pretrained(best, smollm2)
    one_hop = [example for example in load_examples(config.data, "test") if example.depth == 1]
    answers = [model.answer(example.question, context=example.context).value for example in one_hop]
    right = sum(answer == example.answers[0] for answer, example in zip(answers, one_hop, strict=True)) / len(one_hop)
    frozen = zero_shot(smollm2, one_hop, progress=False)["accuracy_by_depth"][-1]["accuracy"]
    assert right > 0.75 > 0.4 > frozen  # seen: 0.9 and above; chance is 1 in 9


def test_cached_states_equal_live_states(smollm2, tmp_path):
    examples = load_examples(quickstart_config("unused").data, "test")[:8]
    embedded = embed_examples(FeatureConfig(folder=str(tmp_path)), smollm2, {"test": examples}, progress=False)["test"]
    model = HybridModel.from_backbone(smollm2, backbone_config=BackboneConfig())
    for row, example in enumerate(examples):
        cached, _, _, _ = embedded.batch(model, [row])
        live, _ = model.embed([(example.context, example.question)])
        error = (cached - live).norm() / live.norm()
        assert error < 0.02, error  # bfloat16 passes of different batches differ in the last bits


@pytest.mark.parametrize("template", ["echo", "plain"])
def test_an_untrained_head_writes_what_the_model_writes_token_for_token(smollm2, template):
    config = BackboneConfig(template=template)
    backbone = smollm2.with_settings(smollm2.layers, template)
    asked = {"text": TextConfig(enabled=True), "choices": ["left", "right"]}
    model = HybridModel.from_backbone(backbone, backbone_config=config, **asked).eval()
    backbone.tokenizer.padding_side = "left"
    questions = ["What is the capital of France?\nAnswer:", "P is above Q. Q is above R. Where is P?\nAnswer:"]
    inputs = backbone.tokenizer(questions, return_tensors="pt", padding=True)
    for how in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "top_k": 50}):
        torch.manual_seed(0)
        alone = smollm2.model.generate(**inputs, **how, max_new_tokens=24)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, **how, max_new_tokens=24), alone)


def test_readme_example_runs_on_the_quickstart_head(tmp_path):
    head = ROOT / "runs" / "quickstart" / "best"
    if not head.exists():
        pytest.skip("runs/quickstart is not there: run `hybrid quickstart` first")
    readme = (ROOT / "README.md").read_text()
    blocks = [block.split("```", 1)[0] for block in readme.split("```python\n")[1:]]
    code = "\n".join(blocks)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    for path in (
        "mini_sudoku_smollm2/schema.txt", "stepgame_smollm2/schema.txt", "stepgame_text_smollm2/example.txt",
        "three_islanders_smollm2/example.txt", "chains_clutrr_smollm2/example.txt",
    ):  # fmt: skip
        assert (ROOT / "results" / path).read_text() in run.stdout
    value, _, steps = next(line for line in run.stdout.splitlines() if "." in line and line.count(" ") == 2).split()
    assert value in "above below left right upper-left upper-right lower-left lower-right overlap".split()
    assert int(steps) >= 1
    ask = [sys.executable, "-m", "hybrid", "ask", str(head), "A is left of B. What is the relation of A to B?"]
    assert "probability" in subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout
