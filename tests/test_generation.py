"""Text from the frozen model: unchanged by an untrained head, steered by a trained one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import CHOICES, chain_examples, chatty_llama, open_gate, tiny_reasoner, word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from hybrid.backbone import Backbone
from hybrid.config import BackboneConfig, TextConfig
from hybrid.decoder import Field
from hybrid.generation import (
    answer_text,
    answer_text_loss,
    generate_texts,
    read_texts,
    text_log_likelihoods,
    text_prompts,
)
from hybrid.model import HybridModel

QUESTIONS = ["A is left of B . B is left of C . Where is A relative to C ?", "C is above D . Where is C ?"]
GREEDY = {"do_sample": False, "max_new_tokens": 10}


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=128))


def writer(template: str = "echo", suffix: str = " is", language_model=None, **text) -> HybridModel:
    """An untrained head with a text decoder."""
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "left"
    backbone = Backbone(
        language_model or chatty_llama(), tokenizer, name="tiny-llama", layers=[0, 1, 2], template=template
    )
    torch.manual_seed(0)
    return HybridModel.from_backbone(
        backbone,
        backbone_config=BackboneConfig(name_or_path="tiny-llama"),
        reasoner=tiny_reasoner(refine_memory=True, rotary=True),
        text=TextConfig(enabled=True, suffix=suffix, **text),
        known_options=CHOICES,
        choices=CHOICES,
    ).eval()


def tokens(model: HybridModel, questions=QUESTIONS) -> dict[str, torch.Tensor]:
    texts = [f"{question}{model.config.text.suffix}" for question in questions]
    encoded = model.backbone.tokenizer(texts, return_tensors="pt", padding=True)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("template", ["echo", "plain"])
@pytest.mark.parametrize("suffix", ["", " is"])
@pytest.mark.parametrize(
    "how",
    [
        GREEDY,
        {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "do_sample": False},
        {"do_sample": False, "max_new_tokens": 8, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "sampling", "beams", "penalties"],
)
def test_untrained_head_writes_what_the_language_model_writes(template, suffix, how):
    model = writer(template, suffix)
    inputs = tokens(model)
    torch.manual_seed(1)
    alone = model.backbone.model.generate(**inputs, **how)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**inputs, **how), alone)
    torch.manual_seed(1)
    assert not torch.equal(open_gate(model).generate(**inputs, **how), alone)


def test_other_architectures_see_soft_tokens_too():
    model = writer(language_model=tiny_gpt2())
    inputs = tokens(model)
    alone = model.backbone.model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), alone)
    assert text_log_likelihoods(open_gate(model), [(None, QUESTIONS[0])], [" left"]) != text_log_likelihoods(
        writer(language_model=tiny_gpt2()), [(None, QUESTIONS[0])], [" left"]
    )


def test_no_token_of_the_prompt_is_computed_twice(monkeypatch):
    """Head, then the rest of the echo up to the highest layer read, then soft tokens and tail: nothing else runs."""
    model = open_gate(writer("echo", " is"))
    seen = {1: 0, 3: 0}  # tokens that reach each block
    for layer in seen:
        block = model.backbone._encoder.layers[layer - 1]
        block.register_forward_pre_hook(
            lambda module, args, layer=layer: seen.update({layer: seen[layer] + args[0].shape[1]})
        )
    model.generate(**tokens(model, QUESTIONS[:1]), do_sample=False, max_new_tokens=1)
    text, suffix, separator, soft = len(QUESTIONS[0].split()), 1, 1, 1 + 3
    assert seen == {1: 2 * text + separator + soft + suffix, 3: text + soft + suffix}


@pytest.mark.parametrize("template", ["echo", "plain"])
@pytest.mark.parametrize("suffix", ["", " is"])
def test_the_reasoner_reads_the_states_that_it_was_trained_on(template, suffix):
    model = writer(template, suffix)
    texts = [(None, question) for question in QUESTIONS]
    _, states, mask = read_texts(model, text_prompts(model, texts))
    live, live_mask = model.embed(texts)
    torch.testing.assert_close(states, live, atol=1e-6, rtol=1e-5)
    assert torch.equal(mask, live_mask)


@pytest.mark.parametrize("suffix", ["", " is"])
def test_batches_and_padding_change_nothing(suffix):
    model = open_gate(writer(suffix=suffix))
    together = generate_texts(model, QUESTIONS, **GREEDY)
    assert together == [model.generate_text(question, **GREEDY) for question in QUESTIONS]
    texts, continuations = [(None, question) for question in QUESTIONS], [" left of", " above"]
    one_by_one = [text_log_likelihoods(model, [t], [c])[0] for t, c in zip(texts, continuations, strict=True)]
    both = text_log_likelihoods(model, texts, continuations)
    assert [greedy for _, greedy in both] == [greedy for _, greedy in one_by_one]
    assert [value for value, _ in both] == pytest.approx([value for value, _ in one_by_one], abs=1e-4)


def test_likelihood_of_an_untrained_head_is_that_of_the_language_model():
    model = writer()
    ids = model.backbone.tokenizer(f"{QUESTIONS[0]} is above B", return_tensors="pt")["input_ids"]
    logits = model.backbone.model(ids).logits.log_softmax(-1)
    expected = sum(float(logits[0, place - 1, ids[0, place]]) for place in (-2, -1))
    assert text_log_likelihoods(model, [(None, QUESTIONS[0])], [" above B"])[0][0] == pytest.approx(expected, abs=1e-4)


def test_greedy_text_has_the_flag_of_greedy_text():
    model = open_gate(writer())
    written = model.generate_text(QUESTIONS[0], max_new_tokens=4, do_sample=False)
    assert text_log_likelihoods(model, [(None, QUESTIONS[0])], [f" {written}"])[0][1]


def test_gradient_reaches_gate_projection_and_reasoner_but_not_the_language_model():
    model, examples = writer().train(), chain_examples(5)
    fields = model.field_batch([example.fields for example in examples])
    output = model(*model.embed([(e.context, e.question) for e in examples]), fields)
    latent = output.y[:, : model.num_answer_slots(fields)]
    losses, _ = answer_text_loss(model, latent, fields, examples)
    losses.mean().backward()
    assert model.text_decoder.gate.bias.grad.abs() > 1e-4  # though the gate is shut
    model.zero_grad()
    output = model(*model.embed([(e.context, e.question) for e in examples]), fields)
    latent = output.y[:, : model.num_answer_slots(fields)]
    answer_text_loss(open_gate(model), latent, fields, examples)[0].mean().backward()
    assert model.text_decoder.projection.weight.grad.norm() > 0
    assert all(parameter.grad.norm() > 0 for parameter in model.reasoner.parameters())
    assert all(parameter.grad is None for parameter in model.backbone.model.parameters())


def test_streamer_and_stop_texts():
    model, said = open_gate(writer()), []

    class Streamer:
        def put(self, value):
            said.append(value)

        def end(self):
            said.append(None)

    inputs = tokens(model, QUESTIONS[:1])
    output = model.generate(**inputs, streamer=Streamer(), **GREEDY)
    assert said[-1] is None and torch.equal(torch.cat([part.flatten() for part in said[:-1]]), output[0])
    text = model.generate_text(QUESTIONS[0], **GREEDY)
    word = text.split()[2]
    cut = model.generate_text(QUESTIONS[0], stop=[word], **GREEDY)
    assert cut == text[: text.index(word)].rstrip()


def test_chat_template_is_respected():
    model = open_gate(writer())
    with pytest.raises(ValueError, match="no chat template"):
        model.generate_text(QUESTIONS[0], chat=True)
    model.backbone.tokenizer.chat_template = "says {{ messages[0]['content'] }} . the"
    (prompt,) = text_prompts(model, [(None, QUESTIONS[1])], chat=True)
    words = model.backbone.tokenizer.decode(prompt.token_ids).split()
    assert words[0] == "says" and words[-2:] == [".", "the"]
    assert model.backbone.tokenizer.decode(prompt.reading.memory_ids) == QUESTIONS[1]
    assert isinstance(model.generate_text(QUESTIONS[1], chat=True, **GREEDY), str)


def test_explained_answer_is_the_answer_with_text():
    model = open_gate(writer())
    plain, explained = model.answer(QUESTIONS[0]), model.answer(QUESTIONS[0], explain=True)
    assert plain.text is None and explained.text
    assert explained.value == plain.value and explained.probability == pytest.approx(plain.probability, abs=1e-5)


def test_saved_head_writes_the_same(tmp_path):
    model = open_gate(writer())
    model.save_pretrained(tmp_path)
    loaded = HybridModel.from_pretrained(tmp_path, model.backbone, dtype="float32")
    assert loaded.generate_text(QUESTIONS[0], **GREEDY) == model.generate_text(QUESTIONS[0], **GREEDY)


def test_what_cannot_be_done_is_said(model, any_backbone):
    with pytest.raises(ValueError, match=r"no text decoder: train one with text\.enabled"):
        model.generate(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="no text decoder"):
        model.answer(QUESTIONS[0], explain=True)
    able = writer()
    inputs = tokens(able)
    with pytest.raises(ValueError, match="padding_side='left'"):
        able.generate(inputs["input_ids"].flip(1), inputs["attention_mask"].flip(1))
    with pytest.raises(ValueError, match="the prompt is empty"):
        able.generate(torch.tensor([[9]]))  # the suffix alone
    with pytest.raises(ValueError, match="continuation 0 is empty"):
        text_log_likelihoods(able, [(None, "A ?")], [""])
    if any_backbone.name in ("bert", "t5"):
        with pytest.raises(ValueError, match="writes no text"):
            HybridModel.from_backbone(
                any_backbone,
                backbone_config=BackboneConfig(name_or_path=any_backbone.name),
                reasoner=tiny_reasoner(),
                text=TextConfig(enabled=True),
            )


def test_answer_in_words():
    (example,) = chain_examples(1)
    assert answer_text(TextConfig(), example) == example.answers[0]
    assert answer_text(TextConfig(answer="It is {answer}."), example) == f"It is {example.answers[0]}."
    assert answer_text(TextConfig(answer="no"), dataclasses.replace(example, answer_text="mine")) == "mine"
    two = dataclasses.replace(example, fields=(Field("P", "xy"), Field("Q", "xy")), answers=("x", "y"))
    assert answer_text(TextConfig(), two) == "P: x, Q: y"
    with pytest.raises(ValueError, match=r"names 'R': the fields are \['P', 'Q'\]"):
        answer_text(TextConfig(answer="{R}"), two)
