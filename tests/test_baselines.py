"""Baselines measure what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import CHOICES, chain_examples, tiny_run

from hybrid.backbone import Backbone
from hybrid.baselines import (
    deep,
    fit_logistic,
    fit_mlp,
    linear_probe,
    mlp_probe,
    one_pass,
    option_log_likelihoods,
    probe_layers,
    without_backbone,
    zero_shot,
)
from hybrid.batches import embed_examples
from hybrid.config import FeatureConfig, RecursionStage
from hybrid.decoder import Field
from hybrid.documents import documents_of
from hybrid.losses import IGNORED
from hybrid.model import HybridModel

PROMPT = "A is left of B . Where is A ?"


def test_log_likelihoods_are_those_of_the_whole_text(backbone):
    options = ["left", "right of", "above of the"]
    scores = option_log_likelihoods(backbone, PROMPT, options)
    for option, score in zip(options, scores.tolist(), strict=True):
        prompt_ids = backbone.tokenizer(PROMPT)["input_ids"]
        option_ids = backbone.tokenizer(f" {option}")["input_ids"]
        with torch.no_grad():
            logits = backbone.model(torch.tensor([[*prompt_ids, *option_ids]])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(prompt_ids) + n - 1, token]) for n, token in enumerate(option_ids))
        assert score == pytest.approx(expected, abs=1e-4)


def test_an_end_lets_an_option_that_begins_with_another_win(backbone):
    options, end = ["left", "left of"], "below"
    alone, ended = (option_log_likelihoods(backbone, PROMPT, options, each) for each in ("", f" {end}"))
    assert alone[1] < alone[0]  # whatever the model believes
    prompt_ids, end_id = backbone.tokenizer(PROMPT)["input_ids"], backbone.tokenizer.convert_tokens_to_ids(end)
    for option, score, without in zip(options, ended.tolist(), alone.tolist(), strict=True):
        with torch.no_grad():
            ids = [*prompt_ids, *backbone.tokenizer(f" {option}")["input_ids"]]
            logits = backbone.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert score == pytest.approx(without + float(logits[end_id]), abs=1e-4)


def test_zero_shot_picks_the_likeliest_option(backbone):
    examples = chain_examples(8)
    result = zero_shot(backbone, examples, progress=False)
    expected = []
    for example in examples:
        prompt = f"{example.context}\n{example.question}\nAnswer:"
        scores = option_log_likelihoods(backbone, prompt, example.fields[0].options)
        expected.append(example.fields[0].options[int(scores.argmax())] == example.answers[0])
    assert result["accuracy_by_depth"][-1]["accuracy"] == sum(expected) / 8


def test_zero_shot_needs_a_language_model(any_backbone):
    if any_backbone.name == "bert":
        with pytest.raises(ValueError, match="no language-model head"):
            zero_shot(any_backbone, chain_examples(2), progress=False)


def test_logistic_regression_separates_what_is_separable_and_not_noise():
    torch.manual_seed(0)
    features = torch.randn(400, 5) * torch.tensor([1.0, 100.0, 0.01, 1.0, 1.0]) + 7
    labels = (features[:, 2] > 7).long()
    probe, accuracy = fit_logistic(features, labels, 2, (1e-4, 1e-2))
    assert accuracy > 0.97
    assert (probe(features).argmax(1) == labels).float().mean() == pytest.approx(accuracy)
    test = torch.randn(400, 5)
    probe, _ = fit_logistic(torch.randn(400, 5), torch.randint(0, 2, (400,)), 2, (1e-4, 1e-2))
    assert abs(float((probe(test).argmax(1) == torch.randint(0, 2, (400,))).float().mean()) - 0.5) < 0.1


def test_linear_probe_reads_the_direction_and_scores_whole_answers(model, backbone, tmp_path):
    sets = {"train": chain_examples(200), "test": chain_examples(40, seed=9)}
    embedded = embed_examples(FeatureConfig(folder=str(tmp_path)), backbone, sets, progress=False)
    result = linear_probe(model, embedded["train"], embedded["test"])
    assert result["accuracy_by_depth"][-1]["n"] == 40
    assert result["accuracy_by_depth"][-1]["accuracy"] > 0.9  # the direction's own word is in the text
    assert result["train_rows"] == 200


def test_mlp_probe_fits_what_a_linear_one_cannot():
    torch.manual_seed(0)
    features = torch.randn(2000, 2) * torch.tensor([1.0, 50.0]) + 3
    labels = ((features[:, 0] > 3) ^ (features[:, 1] > 3)).long()
    assert fit_logistic(features, labels, 2, (1e-3,))[1] < 0.6
    network, accuracy = fit_mlp(features, labels, 2, hidden_size=64)
    assert accuracy > 0.95
    assert (network(features).argmax(1) == labels).float().mean() > 0.95


def test_mlp_probe_scores_whole_answers(model, backbone, tmp_path):
    sets = {"train": chain_examples(200), "test": chain_examples(40, seed=9)}
    embedded = embed_examples(FeatureConfig(folder=str(tmp_path)), backbone, sets, progress=False)
    result = mlp_probe(model, embedded["train"], embedded["test"])
    assert result["accuracy_by_depth"][-1]["n"] == 40 and result["accuracy_by_depth"][-1]["accuracy"] > 0.9


def test_probes_count_answers(model, backbone, tmp_path):
    rows = [replace(e, fields=e.fields * 2, answers=e.answers * 2) for e in chain_examples(68)]
    asked = {"train": rows[:60], "test": rows[60:]}
    embedded = embed_examples(FeatureConfig(folder=str(tmp_path)), backbone, asked, progress=False)
    assert linear_probe(model, embedded["train"], embedded["test"], max_train=41)["train_rows"] == 20


def test_probes_take_rows_with_more_fields_than_are_asked(model, backbone, tmp_path):
    rows = chain_examples(68)
    asked = {"train": [replace(e, fields=e.fields * 2, answers=e.answers * 2) for e in rows[:60]], "test": rows[60:]}
    embedded = embed_examples(FeatureConfig(folder=str(tmp_path)), backbone, asked, progress=False)
    assert linear_probe(model, embedded["train"], embedded["test"])["accuracy_by_depth"][-1]["n"] == 8


def test_what_has_no_answer_is_not_counted(model, backbone, tmp_path):
    def with_another(examples):
        return [
            replace(e, fields=(Field("other", CHOICES), Field("direction", CHOICES)), answers=(None, *e.answers))
            for e in examples
        ]

    asked = {"train": with_another(chain_examples(200)), "test": with_another(chain_examples(40, seed=9))}
    embedded = embed_examples(FeatureConfig(folder=str(tmp_path)), backbone, asked, progress=False)
    *_, labels = embedded["test"].batch(model, [0])
    assert labels[0].tolist() == [IGNORED, CHOICES.index(asked["test"][0].answers[1])]
    assert linear_probe(model, embedded["train"], embedded["test"])["accuracy_by_depth"][-1]["accuracy"] > 0.9
    assert linear_probe(model, embedded["train"], embedded["test"], max_train=60)["train_rows"] == 60
    alone = [replace(e, fields=(Field("direction", CHOICES),), answers=e.answers[1:]) for e in asked["test"][:8]]
    both, one = (zero_shot(backbone, examples, progress=False) for examples in (asked["test"][:8], alone))
    assert both["accuracy_by_depth"] == one["accuracy_by_depth"]
    assert [document["field"] for document in documents_of(asked["test"][0])] == ["direction"]


def head_of(config, backbone: Backbone) -> HybridModel:
    backbone = backbone.with_settings(config.backbone.layers or backbone.layers, config.backbone.template)
    return HybridModel.from_backbone(
        backbone,
        backbone_config=config.backbone,
        adapter=config.adapter,
        reasoner=config.reasoner,
        known_options=CHOICES,
    )


def test_heads_without_recursion_have_equal_parameters_or_equal_compute(tmp_path, backbone):
    config = tiny_run(tmp_path, recursion_schedule=[RecursionStage(max_steps=1)])
    heads = {name: head_of(change(config), backbone) for name, change in {"one_pass": one_pass, "deep": deep}.items()}
    recursive = head_of(config, backbone)
    layer = sum(p.numel() for p in recursive.reasoner.networks[0].layers[0].parameters())
    assert heads["one_pass"].parameter_groups() == recursive.parameter_groups()
    passes = 3 * 2 * (2 + 1)  # steps, cycles, passes in a cycle
    assert heads["deep"].parameter_groups()["reasoner"] == 2 * passes * layer

    def layers_run(head: HybridModel) -> int:
        calls = []
        for network in head.reasoner.networks:
            for part in network.layers:
                part.register_forward_hook(lambda *args: calls.append(1))
        head.eval().answer("Where is A relative to B ?", choices=["left", "right"], halting="never")
        return len(calls)

    assert layers_run(recursive) == layers_run(heads["deep"]) == 2 * passes
    assert layers_run(heads["one_pass"]) == 2
    assert one_pass(config).training.recursion_schedule == [] and config.training.recursion_schedule


def test_reasoner_without_a_language_model_runs_none_of_its_blocks(tmp_path, backbone, monkeypatch):
    config = tiny_run(tmp_path)
    config.backbone.memory = "sentences"  # whose full stops say nothing without a block
    assert without_backbone(config).backbone.memory == "tokens"
    head = head_of(without_backbone(config), backbone).eval()
    monkeypatch.setattr(Backbone, "_run_to", lambda *args: pytest.fail("a block ran"))
    one = head.answer("A is left of B . Where is A relative to B ?", choices=["left", "right"])
    other = head.answer("B is left of A . Where is A relative to B ?", choices=["left", "right"])
    assert one.probability != other.probability  # the same words: order is known


def test_every_layer_is_probed(backbone):
    rows = probe_layers(backbone, chain_examples(60), chain_examples(20, seed=9), progress=False)
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["accuracy_by_depth"][-1]["n"] == 20


def test_rows_that_are_sorted_are_shuffled_before_a_layer_is_probed(backbone, monkeypatch):
    seen, fit = [], fit_logistic
    monkeypatch.setattr("hybrid.baselines.fit_logistic", lambda *args: seen.append(args[1]) or fit(*args))
    train = sorted(chain_examples(60), key=lambda example: example.answers)
    probe_layers(backbone, train, chain_examples(20, seed=9), progress=False)
    assert len(seen[0][48:].unique()) > 1  # the last fifth chooses the weight decay
