"""HybridModel: parameters, save and load, what is refused."""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import CHOICES, tiny_reasoner

from hybrid.backbone import Backbone
from hybrid.config import AdapterConfig, BackboneConfig, HybridConfig, ReasonerConfig, TextConfig
from hybrid.decoder import Field
from hybrid.hub import upload_folder
from hybrid.layers import rotation
from hybrid.model import HybridModel

QUESTION = "A is left of B . B is left of C . Where is A relative to C ?"


def test_default_head_has_about_seven_million_parameters(capsys):
    config = HybridConfig(
        backbone=BackboneConfig(layers=[0, 12, 20]), backbone_dim=576, known_options=[f"o{n}" for n in range(9)]
    )
    with torch.device("meta"):
        model = HybridModel(config)
    groups = model.parameter_groups()
    assert 6_500_000 <= sum(groups.values()) <= 7_500_000
    assert set(groups) == {"adapter", "reasoner", "decoder"}


def test_parameters_are_printed_in_peft_format(model, capsys):
    model.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    trainable = sum(p.numel() for p in model.parameters())
    assert first.startswith(f"trainable params: {trainable:,} || all params: ")
    assert "|| trainable%: " in first and second.startswith("adapter: ")


def test_save_load_same_answers(model, backbone, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = HybridModel.from_pretrained(tmp_path, backbone, dtype="float32")
    assert loaded.answer(QUESTION) == model.answer(QUESTION)
    assert loaded.config.to_dict()["reasoner"] == model.config.to_dict()["reasoner"]
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert not any("backbone" in name for name in loaded.state_dict())


def test_recorded_backbone_is_attached(model, backbone_folder, tmp_path):
    model.config.backbone.name_or_path = str(backbone_folder)
    model.config.backbone.dtype = "float32"
    model.save_pretrained(tmp_path)
    loaded = HybridModel.from_pretrained(tmp_path, dtype="float32")
    assert loaded.answer(QUESTION).probability == pytest.approx(model.answer(QUESTION).probability, abs=1e-6)
    for dtype in (torch.float32, torch.bfloat16):
        assert HybridModel.from_pretrained(tmp_path, torch_dtype=dtype).dtype == dtype


def test_two_heads_share_one_backbone_with_their_own_layers(model, backbone):
    other = HybridModel.from_backbone(
        backbone.with_settings([1], "plain"),
        backbone_config=BackboneConfig(name_or_path="tiny-llama"),
        reasoner=tiny_reasoner(),
    )
    assert other.backbone.model is model.backbone.model
    assert other.backbone.layers == [1] and model.backbone.layers == [0, 1, 2]
    assert other.embed([(None, QUESTION)])[0].shape[2] == 1


@pytest.mark.parametrize("kind", ["linear", "mlp", "resampler"])
@pytest.mark.parametrize("tie_levels", [True, False])
def test_variants_run_backward_through_every_parameter(backbone, kind, tie_levels):
    model = HybridModel.from_backbone(
        backbone,
        backbone_config=BackboneConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(kind=kind, num_vectors=3),
        reasoner=tiny_reasoner(tie_levels=tie_levels),
        known_options=CHOICES,
    )
    fields = model.field_batch([[Field("answer", CHOICES)]])
    model(*model.embed([(None, QUESTION)]), fields, labels=torch.tensor([[1]])).loss.backward()
    # The halting head starts at zero: its weights learn, and nothing flows back through it yet.
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    silent = [name for name, p in model.named_parameters() if p.grad.abs().sum() == 0]
    assert silent == []


def head_with_places(backbone, places, **changes) -> HybridModel:
    torch.manual_seed(0)
    return HybridModel.from_backbone(
        backbone,
        backbone_config=BackboneConfig(name_or_path="tiny-llama"),
        reasoner=tiny_reasoner(**changes),
        fields={name: CHOICES for name in "abc"},
        places=places,
    ).eval()


@pytest.mark.parametrize("refine_memory", [True, False])
def test_field_with_a_place_starts_from_the_token_there(backbone, refine_memory):
    model = head_with_places(backbone, {}, refine_memory=refine_memory, rotary=True)
    hidden_states, mask = model.embed([(None, QUESTION), (None, "A is left of B ?")])
    rows = [(Field("a", CHOICES), Field("b", CHOICES, at=QUESTION.index("C"))), (Field("a", CHOICES, at=0),)]
    starts = [model.field_starts(*row) for row in zip(rows, [QUESTION, "A is left of B ?"], strict=True)]
    assert starts == [[-1, 10], [0]]
    fields = model.field_batch(rows, num_fields=3, starts=starts)
    assert fields.starts.tolist() == [[-1, 10, -1], [0, -1, -1]]
    assert fields.select(torch.tensor([1])).starts.tolist() == [[0, -1, -1]]
    memory, _ = model.adapter(hidden_states, mask)
    nowhere = replace(fields, starts=None)
    moved = model.encode(hidden_states, mask, fields).slots - model.encode(hidden_states, mask, nowhere).slots
    torch.testing.assert_close(moved[0, 1], memory[0, 10])
    torch.testing.assert_close(moved[1, 0], memory[1, 0])
    assert moved.abs().sum(2).gt(0).sum() == 2
    [projected] = model.encode(hidden_states, mask, fields).memory  # attention knows the token's position
    for turn, expected in zip(projected.turn, rotation(torch.tensor([[10]]), model.reasoner.head_dim), strict=True):
        assert turn[0, ..., 1, :].equal(expected[0, ..., 0, :])


def test_places_of_fields_stay_with_the_head(backbone, tmp_path):
    head_with_places(backbone, {"a": 0, "b": 5}).save_pretrained(tmp_path)
    model = HybridModel.from_pretrained(tmp_path, backbone, dtype="float32")
    assert model.config.places == {"a": 0, "b": 5}
    fields = [Field("a", CHOICES, at=0), Field("b", CHOICES, at=5), Field("c", CHOICES, at=10)]
    trace = model.answer(QUESTION, fields=fields).trace
    fields[:2] = Field("a", CHOICES), Field("b", CHOICES)
    assert model.answer(QUESTION, fields=fields).trace == trace
    assert model.answer(QUESTION, fields=[replace(fields[0], at=2), *fields[1:]]).trace != trace
    with pytest.warns(UserWarning, match=r"fields \['c'\] do not say where they stand"):
        assert model.answer(QUESTION).trace != trace
    with pytest.warns(UserWarning, match=r"fields \['d', 'e', 'f'\] and 1 more do not say where they stand"):
        model.answer(QUESTION, fields={name: CHOICES for name in "abdefg"})
    with pytest.raises(ValueError, match="stands at character 5, and the text .* has 3: ask with the context"):
        model.answer("A ?", fields=fields)


def test_fields_can_stand_where_the_question_names_them(backbone):
    model, placed = (head_with_places(backbone, {}, rotary=True) for _ in range(2))
    model.config.find_names = True
    fields = {name: CHOICES for name in "BC"}
    at = [Field(name, CHOICES, at=QUESTION.index(name)) for name in "BC"]
    assert model.answer(QUESTION, fields=fields) == placed.answer(QUESTION, fields=at)
    with pytest.warns(UserWarning, match=r"fields \['D'\] do not say where they stand \(at\), nor does the text have"):
        model.answer(QUESTION, fields={"B": CHOICES, "D": CHOICES})


def test_heads_without_places_ignore_them(model):
    with pytest.warns(UserWarning, match=r"fields \['answer'\] say where they stand, which this head ignores"):
        answer = model.answer(QUESTION, fields=[Field("answer", CHOICES, at=0)])
    assert answer == model.answer(QUESTION)


@pytest.mark.parametrize("template", ["question_first", "apart"])
def test_heads_whose_text_is_no_prefix_of_a_prompt_do_not_write(backbone, template):
    config = BackboneConfig(name_or_path="tiny-llama", template=template)
    first = backbone.with_settings(backbone.layers, template)
    model = HybridModel.from_backbone(first, backbone_config=config, reasoner=tiny_reasoner(), choices=CHOICES)
    together, apart = model.answer(QUESTION), model.answer("Where is C ?", context="A is left of B .")
    assert model.config.backbone.template == template and {together.value, apart.value} <= set(CHOICES)
    with pytest.raises(ValueError, match=f"template='{template}' with text.enabled: the model writes after a prompt"):
        HybridModel.from_backbone(first, backbone_config=config, text=TextConfig(enabled=True), choices=CHOICES)


def test_heads_with_places_need_tokens_and_do_not_write(backbone):
    arguments = {"backbone_config": BackboneConfig(name_or_path="tiny-llama"), "places": {}}
    with pytest.raises(ValueError, match="'resampler' keeps no tokens for fields to start from"):
        HybridModel.from_backbone(backbone, adapter=AdapterConfig(kind="resampler"), **arguments)
    with pytest.raises(ValueError, match=r"text.enabled with fields that stand at a place \(at\)"):
        HybridModel.from_backbone(backbone, text=TextConfig(enabled=True), **arguments)


def test_wrong_hidden_size_is_refused(model, tmp_path):
    from conftest import tiny_llama, word_tokenizer

    model.save_pretrained(tmp_path)
    wider = Backbone(tiny_llama(hidden_size=64), word_tokenizer(), name="wider", layers=[0, 1])
    with pytest.raises(ValueError, match="trained on hidden size 32 .* wider has 64"):
        HybridModel.from_pretrained(tmp_path, wider)


def test_another_backbone_of_the_same_size_is_doubtful(model, backbone):
    from conftest import tiny_llama, word_tokenizer

    with pytest.warns(UserWarning, match="trained on tiny-llama, and gets other"):
        model.attach_backbone(Backbone(tiny_llama(seed=1), word_tokenizer(), name="other", layers=[0, 1, 2]))


def test_another_revision_of_the_backbone_is_doubtful(model, backbone):
    from conftest import tiny_llama, word_tokenizer

    other = Backbone(tiny_llama(), word_tokenizer(), name="tiny-llama-x", layers=[0, 1, 2])
    with pytest.warns(UserWarning, match="trained on tiny-llama, and gets tiny-llama-x"):
        model.attach_backbone(other)
    model.config.backbone.revision = "abc"
    with pytest.warns(UserWarning, match="trained on tiny-llama at revision 'abc', and gets None"):
        model.attach_backbone(backbone)


def test_folder_that_is_no_head(model, backbone, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="holds a LoRA adapter, not a head"):
        HybridModel.from_pretrained(tmp_path / "lora", backbone)
    with pytest.raises(ValueError, match="no config.json"):
        HybridModel.from_pretrained(tmp_path, backbone)
    model.save_pretrained(tmp_path / "run" / "best")
    (tmp_path / "run" / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match="its head is .*best"):
        HybridModel.from_pretrained(tmp_path / "run", backbone)
    model.save_pretrained(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="holds weights.pt: pickled weights are refused"):
        HybridModel.from_pretrained(tmp_path, backbone)
    with pytest.raises(ValueError, match="pickled weights are refused"):
        upload_folder(str(tmp_path), "someone/head")
    with pytest.raises(ValueError, match="no head at 'no/such-head'"):
        HybridModel.from_pretrained("no/such-head", backbone)


def test_weights_that_do_not_fit_their_config(model, backbone, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["reasoner"]["num_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights do not fit its config.json, first at 'reasoner.networks.0.layers.2"):
        HybridModel.from_pretrained(tmp_path, backbone)


def test_missing_backbone_is_named(model, tmp_path):
    model.config.backbone.name_or_path = "no/such-model"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backbone.name_or_path='no/such-model' could not be loaded"):
        HybridModel.from_pretrained(tmp_path)


def test_unknown_config_keys_are_named():
    with pytest.warns(UserWarning, match=r"unknown keys \['horizon'\]"):
        HybridConfig(horizon=3)
    with pytest.warns(UserWarning, match=r"section 'reasoner' has unknown keys \['depth'\]"):
        HybridConfig(reasoner={"dim": 64, "num_heads": 4, "depth": 3})


def test_texts_that_are_one_vector_are_told_once(model, backbone):
    asked = [Field("A", ["left right", "right left", "above"]), Field("B", ["left above", "above left"])]
    with pytest.warns(UserWarning, match=r"options \['left right', 'right left'\] have the same tokens") as told:
        model.field_batch([asked])
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.field_batch([[Field("answer", ["left above", "above left"])]])
    for fields, expected in (
        ([Field("A B", CHOICES), Field("B A", CHOICES)], r"names \['A B', 'B A'\]"),
        ([Field("answer", ["A", "A A"])], r"options \['A', 'A A'\]"),
    ):
        model.attach_backbone(backbone)
        with pytest.warns(UserWarning, match=expected):
            model.field_batch([fields])


def test_options_that_inference_met_first_can_be_trained_on(model):
    with torch.inference_mode():
        model.field_batch([[Field("answer", CHOICES[:2])]])
    batch = model.field_batch([[Field("answer", CHOICES)]])  # more of them
    states = torch.randn(1, batch.name_index.shape[1], model.config.reasoner.dim, requires_grad=True)
    model.decoder(states, batch)[0].logsumexp(-1).sum().backward()
    assert states.grad.isfinite().all()


def test_options_that_rows_bring_are_kept_in_bounds(model, monkeypatch):
    monkeypatch.setattr("hybrid.model.MAX_TEXTS", 20)
    for first, second in itertools.permutations("above below left right A B C D".split(), 2):
        options = [f"{first} {second} {first}", f"{first} {second} A B"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are one vector
            batch = model.field_batch([[Field("answer", options)]])
        expected = model.backbone.text_vectors(["answer", *options]).to(batch.text_vectors.dtype)
        numbers = [*batch.name_index.flatten().tolist(), *batch.option_index.flatten().tolist()]
        torch.testing.assert_close(batch.text_vectors[numbers], expected)
        assert len(model._texts.names) <= 20 + 3 and len(model._texts._vectors) <= 2 * (20 + 3)
    for place in range(100):  # the same texts elsewhere
        model.field_batch([[Field("answer", CHOICES, at=place)]])
        assert len(model._texts._encoded) <= 20 + 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"halting": "sometimes"}, "reasoner.halting='sometimes': expected learned or convergence or never"),
        ({"dim": 10, "num_heads": 3}, "reasoner.num_heads=3: expected a divisor of dim=10"),
        ({"num_cycles": 2, "num_gradient_cycles": 3}, "reasoner.num_gradient_cycles=3"),
        ({"max_steps": 0}, "reasoner.max_steps=0"),
    ],
)
def test_numbers_are_validated(section, message):
    with pytest.raises(ValueError, match=message):
        ReasonerConfig(**section)


def test_card_names_the_backbone_and_takes_numbers_from_the_result_file(model, tmp_path):
    results = {"split": "valid", "accuracy_by_depth": [{"depth": 1, "accuracy": 0.5, "interval": [0.4, 0.6], "n": 9}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    in_words = [{"depth": "all", "accuracy": 0.75, "interval": [0.7, 0.8], "n": 8}]
    exact_match = [{"name": name, "accuracy_by_depth": in_words} for name in ("frozen LLM", "steered LLM")]
    (tmp_path / "written.json").write_text(json.dumps({"split": "test", "exact_match": exact_match}))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for own in (str(tmp_path), str(tmp_path / "elsewhere"), "../models/own"):  # a folder, here or not
        model.config.backbone.name_or_path = own
        model.write_card(tmp_path)
        assert "base_model" not in (tmp_path / "README.md").read_text()
    assert "base_model: tiny-llama" in card and "| valid | 1 | 0.500 | 0.400–0.600 | 9 |" in card
    assert card.count("| test, in words | all | 0.750 | 0.700–0.800 | 8 |") == 1
