"""Text from the frozen model: unchanged by an untrained head, steered by a trained one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import (
    CHOICES,
    chain_examples,
    chatty_llama,
    open_gate,
    tiny_llama_config,
    tiny_reasoner,
    word_tokenizer,
)
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybrid import generation
from hybrid.backbone import Backbone
from hybrid.config import BackboneConfig, TextConfig
from hybrid.decoder import Field
from hybrid.generation import (
    answer_text,
    answer_text_loss,
    continuation_losses,
    generate_texts,
    is_answer,
    read_texts,
    soft_tokens,
    text_log_likelihoods,
    text_prompts,
)
from hybrid.model import HybridModel
from hybrid.refinement import refine
from hybrid.soft_prompt import SoftTokens, next_token_logits, read_prompts

QUESTIONS = ["A is left of B . B is left of C . Where is A relative to C ?", "C is above D . Where is C ?"]
GREEDY = {"do_sample": False, "max_new_tokens": 10}


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=128))


def tiny_opt() -> OPTForCausalLM:
    """A model whose language-model head runs the blocks past its base model."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=128, word_embed_proj_dim=32))


def tiny_gemma() -> GemmaForCausalLM:
    """A model that scales its token embeddings."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return GemmaForCausalLM(GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8))


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


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_opt, tiny_gemma])
def test_other_architectures_write_what_they_are_trained_to(make):
    model = writer(language_model=make())
    inputs = tokens(model)
    alone = model.backbone.model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), alone)
    written = open_gate(model).generate_text(QUESTIONS[0], max_new_tokens=5, do_sample=False)
    # Generation sees soft tokens through a hook, the loss through its own mask: both find the same text likeliest.
    ids = model.generate(**tokens(model, QUESTIONS[:1]), max_new_tokens=5, do_sample=False)[0, -5:].tolist()
    prompts = text_prompts(model, [(None, QUESTIONS[0])])
    read, states, mask = read_texts(model, prompts)
    batch = model.field_batch([[Field("answer", CHOICES)]])
    soft = soft_tokens(model, refine(model, states, mask, batch).answer_latent.clone(), batch)
    with torch.no_grad():
        assert continuation_losses(model, read, soft, [ids])[1][0], written


def test_weights_multiply_the_attention_that_soft_tokens_get():
    """A weight of 2 counts a soft token twice."""
    model = writer()
    prompts = text_prompts(model, [(None, QUESTIONS[0])])
    vectors, ids = torch.randn(1, 1, 32), torch.tensor([[6, 7, 8]])
    logits = []
    for twice, weight in ((False, 2.0), (True, 1.0)):
        number = 2 if twice else 1
        read = read_prompts(model.backbone, prompts, with_states=False)
        read_twin = SoftTokens(
            vectors.expand(-1, number, -1), torch.full((1, number), weight).log(), torch.ones(1, number).bool()
        )
        if twice:  # twins that do not see each other are one soft token counted twice
            read_twin.exists[:] = False
        with torch.no_grad():
            logits.append(next_token_logits(model.backbone, read, read_twin, ids))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


def test_untrained_head_changes_nothing_in_bfloat16_either():
    model = writer(language_model=chatty_llama().bfloat16()).bfloat16()
    inputs = tokens(model)
    alone = model.backbone.model.generate(**inputs, do_sample=False, max_new_tokens=30)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=30), alone)


def test_what_cannot_be_shown_soft_tokens_is_refused():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    mistral = MistralConfig(**sizes, intermediate_size=48, num_key_value_heads=2, sliding_window=4)
    with pytest.raises(ValueError, match=r"some of its layers have sliding_attention: leave text\.enabled=false"):
        writer(language_model=MistralForCausalLM(mistral))
    bloom = BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4)
    with pytest.raises(ValueError, match="takes no position_ids"):
        writer(language_model=BloomForCausalLM(bloom))


def test_soft_tokens_that_generation_would_not_see_are_an_error():
    class Around(LlamaForCausalLM):
        """Calls its base model in a way that runs no hooks."""

        def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
            output = self.model.forward(input_ids=input_ids, **kwargs)
            return CausalLMOutputWithPast(logits=self.lm_head(output.last_hidden_state))

    model = open_gate(writer(language_model=Around(tiny_llama_config())))
    for _ in range(2):  # by the second time, the hook is there when the prompt is read
        with pytest.raises(RuntimeError, match="tiny-llama runs its blocks where soft tokens cannot be shown to it"):
            model.generate_text(QUESTIONS[0], **GREEDY)


def test_fields_that_do_not_exist_say_nothing():
    model, examples = open_gate(writer()), chain_examples(2)
    read = [(example.context, example.question) for example in examples]
    losses = []
    for width in (1, 4):
        batch = model.field_batch([example.fields for example in examples], num_fields=width)
        latent = refine(model, *model.embed(read), batch).answer_latent
        with torch.no_grad():
            losses.append(answer_text_loss(model, latent, batch, examples)[0])
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)


def test_prompts_keep_the_width_and_the_padding_that_they_came_with():
    model = writer()
    tokenizer = model.backbone.tokenizer
    texts = [f"{question} is" for question in QUESTIONS]
    encoded = tokenizer(texts, return_tensors="pt", padding="max_length", max_length=30)
    ids = encoded["input_ids"]
    alone = model.backbone.model.generate(input_ids=ids, attention_mask=encoded["attention_mask"], **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=encoded["attention_mask"], **GREEDY), alone)
    assert torch.equal(model.generate(ids, **GREEDY)[:, 30:], alone[:, 30:])  # the mask is found as transformers does
    model.config.text.suffix = " is the"
    mixed = tokenizer([f"{texts[0]} the", QUESTIONS[1]], return_tensors="pt", padding=True)["input_ids"]
    with pytest.raises(ValueError, match="end differently"):
        model.generate(mixed)


def test_generation_settings_of_model_and_caller_meet_as_in_transformers():
    model = writer()
    inputs = tokens(model)
    model.backbone.model.generation_config.num_beams = 3
    try:
        for how in ({"max_new_tokens": 6}, {"generation_config": GenerationConfig(max_new_tokens=6, do_sample=False)}):
            alone = model.backbone.model.generate(**inputs, **how)
            assert torch.equal(model.generate(**inputs, **how), alone)
        config = GenerationConfig(max_new_tokens=6, do_sample=False)
        ids, mask = inputs["input_ids"], {"attention_mask": inputs["attention_mask"]}
        assert torch.equal(model.generate(ids, config, **mask), alone)
    finally:
        model.backbone.model.generation_config.num_beams = 1
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(**inputs, use_cache=False)
    with pytest.raises(ValueError, match="one text a question"):
        model.generate_text(QUESTIONS[0], num_return_sequences=2)
    short = model.generate_text(QUESTIONS[0], generation_config=GenerationConfig(max_new_tokens=2, do_sample=False))
    assert len(short.split()) <= 2
    for name, value, single in (("num_return_sequences", 2, 1), ("return_dict_in_generate", True, False)):
        config = GenerationConfig(do_sample=True, max_new_tokens=3, **{name: value})
        with pytest.raises(ValueError, match=f"{name}={value}: one text a question"):
            model.generate_text(QUESTIONS[0], generation_config=config)
        assert isinstance(model.generate_text(QUESTIONS[0], generation_config=config, **{name: single}), str)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(**inputs, generation_config=GenerationConfig(use_cache=False))
    assert generate_texts(model, []) == [] == text_log_likelihoods(model, [], [])
    with pytest.raises(ValueError, match="expected a list of texts; generate_text takes one"):
        generate_texts(model, QUESTIONS[0])


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "another"}])
def test_decoding_with_drafts_is_refused(how):
    model = writer()
    (name,) = how
    with pytest.raises(ValueError, match=f"{name}=.*: drafts are not supported"):
        model.generate(**tokens(model), **how)
    with pytest.raises(ValueError, match=f"{name}=.*: drafts are not supported"):
        model.generate_text(QUESTIONS[0], **how)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens=2"):
        model.generate(**tokens(model), generation_config=GenerationConfig(prompt_lookup_num_tokens=2))


def test_prompts_that_are_no_token_ids_are_refused():
    model = writer()
    ids = tokens(model)["input_ids"]
    for wrong in (QUESTIONS[0], ids[0], ids.float(), ids[:, :0], ids[:0]):
        with pytest.raises(ValueError, match=r"expected token ids, \(batch, tokens\), got"):
            model.generate(wrong)
    with pytest.raises(ValueError, match="attention_mask: expected the shape of input_ids"):
        model.generate(ids, attention_mask=torch.ones_like(ids[:, 1:]))


def test_padding_is_found_where_it_is_the_end_of_text_too():
    model = open_gate(writer())
    inputs = tokens(model)
    expected = model.generate(**inputs, **GREEDY)
    model.backbone.tokenizer.eos_token = model.backbone.tokenizer.pad_token
    assert torch.equal(model.generate(inputs["input_ids"], **GREEDY), expected)
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(inputs["input_ids"].flip(1), **GREEDY)


@pytest.mark.parametrize(
    ("how", "most"),
    [
        ({}, 64),
        ({"generation_config": GenerationConfig(eos_token_id=-1)}, 64),
        ({"generation_config": GenerationConfig(eos_token_id=-1, max_new_tokens=7)}, 7),
        ({"generation_config": GenerationConfig(eos_token_id=-1), "max_new_tokens": 5}, 5),
    ],
)
def test_texts_have_64_tokens_unless_another_length_is_told(how, most):
    model, seen = writer(), []

    def notes(input_ids, scores, **kwargs):
        seen.append(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    model.backbone.model.generation_config.eos_token_id = None
    model.generate_text(QUESTIONS[0], stopping_criteria=[notes], **how)
    assert len(seen) == most
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate_text(QUESTIONS[0], max_new_tokens=0)


def test_suffix_is_found_where_it_became_one_token_with_the_question():
    model = writer(suffix=" A")
    tokenizer = model.backbone.tokenizer
    (prompt,) = text_prompts(model, [(None, "Where is B")])
    assert model.backbone.text_prompt_of_ids(prompt.token_ids, " A").reading == prompt.reading
    tokenizer.add_tokens(["B A"])  # a tokeniser that joins what meets at the border
    ids = tokenizer("Where is B A")["input_ids"]
    assert len(ids) == 3
    found = model.backbone.text_prompt_of_ids(ids, " A")
    assert (found.num_tail, found.reading) == (1, prompt.reading)


@pytest.mark.parametrize("template", ["echo", "plain"])
def test_soft_tokens_stand_at_the_same_place_if_a_question_begins_like_the_suffix(template):
    model = open_gate(writer(template, "\nis above"))
    questions = ["is above left of B ?", "Where is B ?"]
    first, second = text_prompts(model, [(None, question) for question in questions])
    assert first.num_tail == second.num_tail == (2 if template == "echo" else 3)
    assert model.backbone.text_prompt_of_ids(first.token_ids, "\nis above") == first
    assert generate_texts(model, questions, **GREEDY) == [model.generate_text(text, **GREEDY) for text in questions]


def test_no_token_of_the_prompt_is_computed_twice(monkeypatch):
    """Head, then the rest of the echo up to the highest layer read, then soft tokens and tail: nothing else runs."""
    model = open_gate(writer("echo", " is"))
    seen = {1: 0, 3: 0}  # tokens that reach each block
    for layer in seen:
        block = model.backbone.encoder.layers[layer - 1]
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


def test_long_continuations_of_short_prompts_are_no_single_batch(monkeypatch):
    model, texts = open_gate(writer()), [(None, "Where is A ?")] * 6
    continuations = [" left of" * number for number in (1, 20, 20, 20, 20, 1)]
    whole, sizes = text_log_likelihoods(model, texts, continuations), []

    def losses(model, read, soft, token_ids):
        sizes.append(len(token_ids) * max(map(len, token_ids)))
        return continuation_losses(model, read, soft, token_ids)

    monkeypatch.setattr(generation, "TOKEN_BUDGET", 100)
    monkeypatch.setattr(generation, "continuation_losses", losses)
    found = text_log_likelihoods(model, texts, continuations)
    assert len(sizes) == 3 and max(sizes) <= 100
    assert [value for value, _ in found] == pytest.approx([value for value, _ in whole], abs=1e-3)


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
    assert model.generate_text(QUESTIONS[0], stop=word, **GREEDY) == cut


def test_text_that_begins_with_a_stop_text_is_empty():
    model = writer(suffix="")
    ids = model.backbone.tokenizer("\nleft of")["input_ids"]
    start = len(QUESTIONS[1].split())
    how = GREEDY | {"prefix_allowed_tokens_fn": lambda row, text: [ids[(len(text) - start) % len(ids)]]}
    assert model.generate_text(QUESTIONS[1], **how).startswith("left of")
    assert model.generate_text(QUESTIONS[1], stop=["\n left"], **how) == ""


def test_chat_template_is_respected():
    model = open_gate(writer())
    with pytest.raises(ValueError, match="no chat template"):
        model.generate_text(QUESTIONS[0], chat=True)
    model.backbone.tokenizer.chat_template = "says {{ messages[0]['content'] }} . the"
    (prompt,) = text_prompts(model, [(None, QUESTIONS[1])], chat=True)
    words = model.backbone.tokenizer.decode(prompt.token_ids).split()
    assert words[0] == "says" and words[-2:] == [".", "the"]
    (plain,) = text_prompts(model, [(None, QUESTIONS[1])])
    assert prompt.reading == plain.reading  # the reasoner reads what it was trained on
    ids = torch.tensor([prompt.token_ids])
    text = model.generate_text(QUESTIONS[1], chat=True, **GREEDY)
    new = model.generate(ids, **GREEDY)[0, ids.shape[1] :]
    assert model.backbone.tokenizer.decode(new, skip_special_tokens=True).strip() == text
    model.config.text.chat = True
    explained = model.answer(QUESTIONS[1], explain=True)
    assert explained.probability == pytest.approx(model.answer(QUESTIONS[1]).probability, abs=1e-5)
    model.backbone.tokenizer.chat_template = "says"
    with pytest.raises(ValueError, match="drops what the user says"):
        model.generate_text(QUESTIONS[0])


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
        able.generate(inputs["input_ids"].flip(1), attention_mask=inputs["attention_mask"].flip(1))
    with pytest.raises(ValueError, match="the prompt holds no question"):
        able.generate(torch.tensor([[9]]))  # the suffix alone
    with pytest.raises(ValueError, match="continuation 0 is empty"):
        text_log_likelihoods(able, [(None, "A ?")], [""])
    if any_backbone.name in ("bert", "t5"):
        with pytest.raises(ValueError, match="cannot serve a text decoder"):
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
    for template in ("{R}", "{P", "{}", "{P.x}"):
        with pytest.raises(ValueError, match=r"cannot be filled .*: the answers are of \['P', 'Q'\]"):
            answer_text(TextConfig(answer=template), two)


def test_an_answer_is_right_word_for_word_up_to_its_last_line():
    assert is_answer(" left.\nWhat", "left") and is_answer("1 2 \n3 4\n\n", "1 2\n3 4")
    assert not is_answer("lefty", "left") and not is_answer("1 2", "1 2\n3 4")
