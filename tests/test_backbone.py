"""Any Hugging Face model: layers, padding, templates, clear errors."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import tiny_llama, word_tokenizer
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, Sequence, Split
from transformers import AutoModel, ByT5Tokenizer, OPTConfig, PreTrainedTokenizerFast, RobertaConfig

from hybrid import backbone as backbone_module
from hybrid.backbone import Backbone, default_layers, length_batches, native_dtype, one_text, sentences

TEXTS = [("A is left of B .", "Where is A ?"), ("A is left of B . B is above C .", "Where is A relative to C ?")]


def test_states_are_those_of_transformers(any_backbone):
    prompts = any_backbone.prompts(TEXTS)
    states = any_backbone.with_settings([1, 2], any_backbone.template).hidden_states(prompts)
    for prompt, state in zip(prompts, states, strict=True):
        ids = torch.tensor([prompt.token_ids])
        with torch.no_grad():
            expected = any_backbone.encoder(input_ids=ids, output_hidden_states=True).hidden_states
        memory = slice(prompt.memory_start, prompt.memory_stop)
        for index, layer in enumerate([1, 2]):
            torch.testing.assert_close(state[:, index], expected[layer][0, memory], rtol=1e-4, atol=1e-5)


def test_states_do_not_depend_on_the_batch(any_backbone):
    prompts = any_backbone.prompts(TEXTS)
    together = any_backbone.hidden_states(prompts)
    for prompt, state in zip(prompts, together, strict=True):
        alone = any_backbone.hidden_states([prompt])[0]
        assert state.shape == (prompt.memory_stop - prompt.memory_start, 2, any_backbone.dim)
        torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-5)


def test_echo_repeats_the_text_and_keeps_the_second_copy(backbone):
    plain = backbone.with_settings(backbone.layers, "plain")
    one, two = plain.prompt(*TEXTS[0]), backbone.prompt(*TEXTS[0])
    assert two.token_ids[two.memory_start : two.memory_stop] == one.token_ids == two.token_ids[: len(one.token_ids)]
    assert two.memory_start > len(one.token_ids)
    assert not torch.allclose(backbone.hidden_states([two])[0], plain.hidden_states([one])[0])


def test_the_question_alone_can_come_first(backbone):
    plain, first = (backbone.with_settings(backbone.layers, template) for template in ("plain", "question_first"))
    one, two = plain.prompt(*TEXTS[0]), first.prompt(*TEXTS[0])
    assert two.memory_ids == one.memory_ids == one.token_ids  # places count as in the text shown once
    question = plain.prompt(None, TEXTS[0][1]).token_ids
    assert two.token_ids[: len(question)] == question and two.memory_start > len(question)
    assert len(two.token_ids) < len(backbone.prompt(*TEXTS[0]).token_ids)
    assert not torch.allclose(first.hidden_states([two])[0], plain.hidden_states([one])[0])
    assert first.prompt(None, "A is left").token_ids == backbone.prompt(None, "A is left").token_ids  # an echo


def test_one_text_equals_context_and_question(backbone):
    context, question = TEXTS[0]
    assert backbone.prompt(context, question) == backbone.prompt(None, f"{context} {question}")


def test_characters_are_found_in_the_tokens_of_the_memory(any_backbone):
    prompt, text = any_backbone.prompt(*TEXTS[1]), one_text(*TEXTS[1])
    assert text == "A is left of B . B is above C . Where is A relative to C ?"
    [token, first] = any_backbone.tokens_at(text, [text.index("C"), 0])
    assert prompt.memory_ids[token] == any_backbone.tokenizer("C", add_special_tokens=False)["input_ids"][-1]
    assert first == 0
    assert any_backbone.tokens_at(text, [-1, -len(text)]) == [len(prompt.memory_ids) - 1, 0]
    for outside in (len(text), -len(text) - 1):
        with pytest.raises(ValueError, match=f"stands at character {outside}, and the text .* has "):
            any_backbone.tokens_at(text, [0, outside])


def test_memory_of_sentences_is_that_of_their_last_tokens(any_backbone):
    text = one_text(*TEXTS[1])
    whole = any_backbone.prompt(*TEXTS[1])
    is_end = [any_backbone.tokenizer.decode([token]).strip() in (".", "?") for token in whole.memory_ids]
    ends = [token for token, end in zip(whole.memory_ids, is_end, strict=True) if end]
    view = any_backbone.with_settings(any_backbone.layers, any_backbone.template, "sentences")
    prompt = view.prompt(*TEXTS[1])
    assert prompt.token_ids == whole.token_ids and prompt.memory_ids == ends and len(ends) == 3
    [all_states], [states] = any_backbone.hidden_states([whole]), view.hidden_states([prompt])
    torch.testing.assert_close(states[:, 1:], all_states[torch.tensor(is_end)])
    words = any_backbone.embed_tokens(torch.tensor(whole.memory_ids[: is_end.index(True) + 1]))
    torch.testing.assert_close(states[0, 0], words.mean(0))  # in place of the embedding of a full stop
    places = [text.index("C"), text.index("?"), 0, text.index("B is")]
    assert view.tokens_at(text, places) == [1, 2, 0, 1]
    assert len(view.prompt(None, "A is left").memory_ids) == 1  # the end of a text is one, too
    changed = {"memory": "sentences", "layers": any_backbone.layers}
    assert view.fingerprint() == any_backbone.fingerprint() | changed


@pytest.mark.parametrize("memory", ["tokens", "sentences"])
def test_sentences_apart_are_read_as_if_alone(any_backbone, memory):
    apart = any_backbone.with_settings(any_backbone.layers, "apart", memory)
    alone = any_backbone.with_settings(any_backbone.layers, "plain", memory)
    text = one_text(*TEXTS[1])
    read = [(None, " A is left of B ."), (None, " B is above C ."), (None, " Where is A relative to C ?")]
    assert apart.parts(*TEXTS[1]) == read and alone.parts(*TEXTS[1]) == [TEXTS[1]]
    [prompt, other], expected = apart.prompts([TEXTS[1], TEXTS[0]]), alone.prompts(read)
    states, other_states = apart.hidden_states([prompt, other])
    torch.testing.assert_close(states, torch.cat(alone.hidden_states(expected)))
    assert torch.equal(other_states[0], states[0])  # the same sentence
    assert prompt.memory_ids == [token for part in expected for token in part.memory_ids]
    places = [0, text.index("B is"), text.index("C"), text.index(" Where"), -1]  # the space is the second's last sign
    vectors = apart.tokens_at(text, places)
    if memory == "sentences":
        assert vectors == [0, 1, 1, 1, 2]
    else:
        read_there = [apart.tokenizer.decode([prompt.memory_ids[vector]]).strip() for vector in vectors]
        assert read_there == ["A", "B", "C", ".", "?"]
    assert apart.fingerprint() != alone.fingerprint()


def test_sentences_apart_are_read_in_passes_of_limited_size(backbone, monkeypatch):
    monkeypatch.setattr(backbone_module, "APART_TOKENS", 8)
    apart, shapes, run_to = backbone.with_settings(backbone.layers, "apart"), [], Backbone._run_to

    def run(self, layers, token_ids, mask):
        shapes.append(tuple(token_ids.shape))
        return run_to(self, layers, token_ids, mask)

    monkeypatch.setattr(Backbone, "_run_to", run)
    context = "A is left of B . " * 30 + "A " * 100 + ".\n" + "B .\n" * 9 + "C is left ."
    prompt = apart.prompt(context, "Where is A ?")
    [states] = apart.hidden_states([prompt])
    assert len(states) == len(prompt.memory_ids) and torch.equal(states[:6], states[6:12])
    assert max(rows * width for rows, width in shapes) <= len(prompt.token_ids)  # a sentence that recurs is read once


def test_what_is_no_sentence(backbone):
    assert sentences('A is it. "B?" C:\n1 _\n\u200b\n Pi is 3.14?! x') == [
        (0, " A is it."), (9, ' "B?"'), (14, " C:"), (17, " 1 _"), (24, " Pi is 3.14?!"), (37, " x"),
    ]  # fmt: skip
    start = time.perf_counter()
    assert len(sentences("a" + "." * 100_000)) == 1 and len(sentences("a?" * 50_000 + ". b")) == 2
    assert time.perf_counter() - start < 1
    apart = backbone.with_settings(backbone.layers, "apart", "sentences")
    with pytest.raises(ValueError, match="holds no sentence: every example needs a question"):
        apart.prompt(None, "\u200b")
    assert apart.tokens_at("A is left .\n\u200b", [-1]) == [0]


def test_the_mark_of_a_word_is_not_its_first_letter(backbone):
    characters = Tokenizer(WordLevel({"<unk>": 0, "▁": 1, "5": 2, "3": 3}, unk_token="<unk>"))
    characters.pre_tokenizer = Sequence([Metaspace(), Split(Regex("."), "isolated")])
    other = copy.copy(backbone)
    other.tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>")
    assert other.tokenizer("53 5")["input_ids"] == [1, 2, 3, 1, 2]
    assert other.tokens_at("53 5", [0, 1, 3]) == [1, 2, 4]
    other.tokenizer = ByT5Tokenizer()
    with pytest.raises(ValueError, match="does not tell where its tokens stand: set data.places=false"):
        other.tokens_at("53", [0])


def test_special_tokens_frame_the_prompt_and_stay_out_of_memory(any_backbone):
    prompt = any_backbone.prompt(*TEXTS[0])
    if any_backbone.name == "bert":
        assert (prompt.token_ids[0], prompt.token_ids[-1]) == (2, 3)
        assert prompt.memory_stop == len(prompt.token_ids) - 1


def test_pass_stops_at_the_highest_layer_asked_for(backbone):
    ran = []
    handles = [
        block.register_forward_pre_hook(lambda module, args, layer=layer: ran.append(layer))
        for layer, block in enumerate(backbone._short_encoder.layers, start=1)
    ]
    backbone.with_settings([1, 2], "echo").hidden_states([backbone.prompt(*TEXTS[0])])
    for handle in handles:
        handle.remove()
    assert ran == [1, 2]


def test_a_causal_model_needs_no_mask_for_padding_and_others_get_one(any_backbone):
    masks = []
    handle = any_backbone._short_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    any_backbone.hidden_states(any_backbone.prompts(TEXTS))
    handle.remove()
    assert any_backbone.is_causal == (any_backbone.name not in ("bert", "t5"))
    assert (masks[-1] is None) == any_backbone.is_causal


def test_threads_read_the_same_model_at_once_at_their_own_layers(backbone):
    prompts = backbone.prompts(TEXTS)
    views = [backbone.with_settings(layers, "echo") for layers in ([1], [2], [1, 3], [3])]
    expected = [view.hidden_states(prompts) for view in views]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda view: view.hidden_states(prompts), views * 8))
    for states, expected_states in zip(results, expected * 8, strict=True):
        for state, alone in zip(states, expected_states, strict=True):
            torch.testing.assert_close(state, alone)


def test_short_and_long_texts_give_the_same_states(any_backbone, monkeypatch):
    prompts = any_backbone.prompts(TEXTS)
    if any_backbone.encoder.config._attn_implementation == "sdpa":
        assert any_backbone._short_encoder.config._attn_implementation == "eager"
    short = any_backbone.hidden_states(prompts)
    monkeypatch.setattr("hybrid.backbone.SHORT", 0)
    for state, other in zip(short, any_backbone.hidden_states(prompts), strict=True):
        torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-5)


def test_compiled_blocks_give_the_same_states(monkeypatch):
    backbone = Backbone(tiny_llama(), word_tokenizer(), name="tiny-llama", layers=[0, 1, 2])
    before = backbone.hidden_states(backbone.prompts(TEXTS))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # no C++ compiler needed
    assert backbone.compile() and backbone.compile()
    for state, other in zip(before, backbone.hidden_states(backbone.prompts(TEXTS)), strict=True):
        torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_the_model_runs_as_before(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    backbone = Backbone(tiny_llama(), word_tokenizer(), name="tiny-llama", layers=[0, 1, 2])
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    with pytest.warns(UserWarning, match="going on without: .*no C\\+\\+ compiler"):
        assert not backbone.compile()
    assert len(backbone.hidden_states(backbone.prompts(TEXTS))) == 2


def test_embedding_layer_is_a_look_up(backbone):
    prompt = backbone.prompt(*TEXTS[0])
    ids = torch.tensor([prompt.token_ids])
    with torch.no_grad():
        expected = backbone.model(ids, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(backbone.embed_tokens(ids), expected)


def test_frozen(backbone):
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training


@pytest.mark.parametrize(
    ("context", "question", "message"),
    [(None, "  ", "text 0 is empty"), ("A " * 200, "Where ?", "reads 128: shorten it")],
)
def test_bad_text(backbone, context, question, message):
    with pytest.raises(ValueError, match=message):
        backbone.prompt(context, question)


def test_bad_names_and_layers(backbone, backbone_folder):
    with pytest.raises(ValueError, match="'no/such-model' could not be loaded"):
        Backbone.from_pretrained("no/such-model")
    with pytest.raises(ValueError, match="layers 0 to 3"):
        backbone.with_settings([0, 9], "plain")
    with pytest.raises(ValueError, match="backbone.template='ehco': expected plain or echo"):
        backbone.with_settings([0, 1], "ehco")
    with pytest.raises(ValueError, match="layer numbers ≥ 0 in rising order"):
        Backbone.from_pretrained(str(backbone_folder), layers=[-1])
    with pytest.raises(ValueError, match="no such file"):
        Backbone.from_pretrained(str(backbone_folder), gguf_file="missing.gguf")
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        Backbone.from_pretrained(str(backbone_folder), quantization="4bit")


def test_embeddings_of_another_width_are_refused(backbone):
    config = OPTConfig(
        vocab_size=40, hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="embeddings of width 16 and states of 32"):
        Backbone(AutoModel.from_config(config), backbone.tokenizer, name="opt")


def test_the_longest_text_is_what_the_model_reads(backbone):
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, intermediate_size=16, max_position_embeddings=20, pad_token_id=1)
    model = AutoModel.from_config(config)
    longest = Backbone(model, backbone.tokenizer, name="roberta").max_tokens
    assert longest == 18
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(torch.full((1, longest + 1), 5))


def test_from_folder_and_fingerprint(backbone, backbone_folder):
    loaded = Backbone.from_pretrained(str(backbone_folder), layers=[0, 1, 2], dtype="float32")
    assert loaded.full_hash() == backbone.full_hash()
    same, other = loaded.fingerprint(), loaded.with_settings([0, 1, 3], "plain").fingerprint()
    assert same["weights"] == other["weights"] and same != other
    assert Backbone.from_pretrained(str(backbone_folder), dtype="bfloat16").dtype == torch.bfloat16


def test_default_layers_are_the_embedding_and_two_in_the_middle():
    assert default_layers(30) == [0, 12, 20]
    assert default_layers(2) == [0, 1]


def test_length_batches_keep_the_budget_and_waste_little():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 160, (2000,), generator=generator).tolist()
    batches = length_batches(lengths, 2048)
    assert sorted(index for batch in batches for index in batch) == list(range(2000))
    padded = [max(lengths[i] for i in batch) * len(batch) for batch in batches]
    assert max(padded) <= 2048
    assert 1 - sum(lengths) / sum(padded) < 0.03  # padding fraction
    assert max(lengths[i] for i in batches[0]) == max(lengths)
    assert length_batches([5000, 10], 2048) == [[0], [1]]  # one text over the budget still runs, alone


def test_builds_without_onednn_compute_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert native_dtype(torch.device("cpu")) == torch.float32
