"""A head in lm-evaluation-harness: what its scores are, and that nothing but the question changes them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import (
    CHOICES,
    chain_examples,
    chatty_llama,
    open_gate,
    tiny_model,
    tiny_reasoner,
    word_tokenizer,
)

pytest.importorskip("lm_eval", reason="needs the extra [eval]: pip install 'hybrid-reasoner[eval]'")

import datasets
import lm_eval.evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hybrid import harness
from hybrid.backbone import Backbone, load_backbone
from hybrid.config import BackboneConfig, TextConfig
from hybrid.data import Example
from hybrid.decoder import Field
from hybrid.documents import documents_of
from hybrid.harness import FrozenLM, HybridLM
from hybrid.model import HybridModel


def requests_of(example: Example, doc_id: int = 0, choices=CHOICES, context: str | None = None) -> list[Instance]:
    """What lm-eval asks of the first field of an example."""
    document = documents_of(example)[0]
    return [
        Instance("loglikelihood", document, (context or document["prompt"], f" {choice}"), idx, ("chains", doc_id, 1))
        for idx, choice in enumerate(choices)
    ]


def task_of(rows: list[dict], **changes) -> ConfigurableTask:
    """A task on some rows."""
    config = {
        "task": "rows", "dataset_path": "rows", "test_split": "test", "fewshot_split": "test",
        "custom_dataset": lambda **kwargs: {"test": datasets.Dataset.from_list(rows)},
        "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "answer",
        "output_type": "multiple_choice",
    }  # fmt: skip
    return ConfigurableTask(config=config | changes)


def evaluate(model, *tasks: ConfigurableTask, **settings):
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **settings)


def same(scores, others) -> bool:
    """Equal but for the rounding of products of different size."""
    return [score for score, _ in scores] == pytest.approx([score for score, _ in others], abs=1e-5)


@pytest.fixture(autouse=True)
def no_machine_report(monkeypatch):
    """lm-eval asks the machine for its versions at every evaluation, which takes longer than these."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)


@pytest.fixture
def lm(model) -> HybridLM:
    return HybridLM(model)


@pytest.fixture(scope="module")
def language_model() -> Backbone:
    """A backbone that writes and talks: an end of text, and a chat template."""
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.chat_template = "{% for m in messages %}says {{ m.content }} {% endfor %}the "
    return Backbone(chatty_llama(), tokenizer, name="tiny-llama", layers=[0, 1, 2])


@pytest.fixture
def asked(model, monkeypatch) -> list[tuple[str | None, str]]:
    """The texts that reach the head."""
    texts, embed = [], model.embed
    monkeypatch.setattr(model, "embed", lambda pairs: texts.extend(pairs) or embed(pairs))
    return texts


# -- mode=choice ------------------------------------------------------------------------------------------------------


def test_scores_are_log_probabilities_over_the_choices(lm, model, asked):
    example = chain_examples(1)[0]
    scores = lm.loglikelihood(requests_of(example))
    assert asked == [(example.context, example.question)]  # once, and as in training
    assert math.fsum(math.exp(score) for score, _ in scores) == pytest.approx(1)
    answer = model.answer(example.question, context=example.context, choices=CHOICES)
    expected = answer.trace[-1]["answer"]
    assert [math.exp(score) for score, _ in scores] == pytest.approx([expected[choice] for choice in CHOICES])
    assert [choice for choice, (_, is_best) in zip(CHOICES, scores, strict=True) if is_best] == [answer.value]


@pytest.mark.filterwarnings("ignore:this head was trained on tiny-llama")
def test_encoders_serve_too(any_backbone):
    model = tiny_model(any_backbone)
    scores = HybridLM(model).loglikelihood(requests_of(chain_examples(1)[0]))
    assert math.fsum(math.exp(score) for score, _ in scores) == pytest.approx(1)


def test_permuted_choices_have_permuted_scores(lm):
    example = chain_examples(1)[0]
    scores = dict(zip(CHOICES, lm.loglikelihood(requests_of(example)), strict=True))
    for order in itertools.permutations(CHOICES):
        assert lm.loglikelihood(requests_of(example, choices=order)) == [scores[choice] for choice in order]
    mixed = requests_of(example, 0) + requests_of(chain_examples(2)[1], 1)
    assert lm.loglikelihood(mixed[::-1])[::-1] == lm.loglikelihood(mixed)


def test_scores_do_not_depend_on_what_else_is_asked(model):
    requests = [r for n, example in enumerate(chain_examples(12)) for r in requests_of(example, n)]
    scores = HybridLM(model, batch_size="auto").loglikelihood(requests)
    for batch_size in (1, 2, 5):
        assert same(HybridLM(model, batch_size=batch_size).loglikelihood(requests), scores)
    share = [n for n, request in enumerate(requests) if request.doc_id % 2]  # of the second of two processes
    assert same(HybridLM(model).loglikelihood([requests[n] for n in share]), [scores[n] for n in share])
    torch.nn.init.normal_(model.decoder.halt_head.weight)  # else all copies are believed in alike
    noisy = HybridLM(model, rollouts=3)
    assert same(noisy.loglikelihood(requests[20:]), noisy.loglikelihood(requests)[20:])
    assert not same(noisy.loglikelihood(requests), scores)
    assert not same(HybridLM(model, steps=1).loglikelihood(requests), scores)


def test_two_processes_give_what_one_gives(model, monkeypatch):
    rows = [row for example in chain_examples(7) for row in documents_of(example)]  # 4 and 3: the second is padded
    whole = evaluate(HybridLM(model), task_of(rows))
    sent: list[dict] = []
    monkeypatch.setattr(HybridLM, "world_size", 2)
    monkeypatch.setattr(HybridLM, "all_gather", lambda self, tensor: torch.tensor([16, 12]))
    monkeypatch.setattr(HybridLM, "barrier", lambda self: None)
    for rank in (1, 0):
        monkeypatch.setattr(HybridLM, "rank", rank)

        def gather(self, obj, dst=0, rank=rank):
            sent.append(obj)
            return None if rank else [obj, sent[len(sent) - 3]]  # samples, then metrics, of both

        monkeypatch.setattr(HybridLM, "gather_object", gather)
        parts = evaluate(HybridLM(model), task_of(rows))
    assert parts["results"] == whole["results"] and parts["n-samples"] == whole["n-samples"]
    found = {sample["doc_id"]: sample["filtered_resps"] for sample in parts["samples"]["rows"]}
    assert len(found) == 7
    assert all(same(found[sample["doc_id"]], sample["filtered_resps"]) for sample in whole["samples"]["rows"])


def test_fields_of_one_question_are_asked_together(lm, model, asked):
    fields = (Field("A", ("knight", "knave")), Field("B", ("knave", "knight")))
    example = Example(None, "A says B is a knave .", fields, ("knight", "knave"), None, "puzzle")
    requests = [
        Instance("loglikelihood", document, (document["prompt"], f" {choice}"), idx, ("puzzles", doc_id, 1))
        for doc_id, document in enumerate(documents_of(example))
        for idx, choice in enumerate(document["choices"])
    ]
    scores = lm.loglikelihood(requests)
    assert asked == [(None, example.question)]
    expected = model.answer(example.question, fields=fields).trace[-1]
    flat = [expected[field.name][option] for field in fields for option in field.options]
    assert [math.exp(score) for score, _ in scores] == pytest.approx(flat)


def test_fields_that_stand_in_the_text(language_model):
    """Documents tell where; among examples nobody finds the place."""
    model = tiny_model(language_model)
    model.config.places = {}
    field = Field("answer", CHOICES, at=5)
    rows = [replace(example, fields=(field,)) for example in chain_examples(4, depths=(1,))]
    documents = [row for example in rows for row in documents_of(example)]
    found = evaluate(HybridLM(model), task_of(documents), limit=1)["samples"]["rows"][0]
    expected = model.answer(rows[0].question, context=rows[0].context, fields=[field]).trace[-1]["answer"]
    scores = [float(response[0]) for response in found["filtered_resps"]]
    assert [math.exp(score) for score in scores] == pytest.approx([expected[option] for option in CHOICES])
    with pytest.raises(ValueError, match="which nobody finds among examples or in a chat: leave out num_fewshot"):
        evaluate(HybridLM(model), task_of(documents), num_fewshot=1, limit=1)


def test_other_tasks_are_read_whole(lm, asked):
    rows = [{"context": "A is left of B .", "question": "Where is A ?", "options": ["knave", "right"], "label": 1}] * 2
    task = task_of(
        rows, doc_to_text="{{context}} {{question}} Where ?", doc_to_choice="options", doc_to_target="label",
        description="A B C . ",
    )  # fmt: skip
    results = evaluate(lm, task)
    assert set(asked) == {(None, "A B C . A is left of B . Where is A ? Where ?")}
    assert set(results["results"]["rows"]) >= {"acc,none", "acc_norm,none"}


def test_few_shot_examples_and_chat_templates_reach_the_head(language_model, monkeypatch):
    model = tiny_model(language_model)
    texts, embed = [], model.embed
    monkeypatch.setattr(model, "embed", lambda pairs: texts.extend(pairs) or embed(pairs))
    rows = [row for example in chain_examples(4, depths=(1,)) for row in documents_of(example)]
    found = evaluate(HybridLM(model), task_of(rows), num_fewshot=1, limit=2)
    assert found["n-shot"] == {"rows": 1}
    prompts = [sample["arguments"][0][0] for sample in found["samples"]["rows"]]
    assert sorted(texts) == sorted((None, prompt) for prompt in prompts)  # with its example, as `hf` gets it
    assert all(prompt.count("Answer:") == 2 for prompt in prompts)
    texts.clear()
    found = evaluate(HybridLM(model), task_of(rows), apply_chat_template=True, limit=1)
    assert texts == [(None, f"says {rows[0]['prompt']} the ")]
    frozen = evaluate(FrozenLM(model.backbone), task_of(rows), apply_chat_template=True, limit=1)
    assert frozen["samples"]["rows"][0]["arguments"] == found["samples"]["rows"][0]["arguments"]


def test_a_request_without_its_group_is_scored_by_itself(lm):
    example = chain_examples(1)[0]
    whole = lm.loglikelihood(requests_of(example))
    text = "A is left of B . Where is A ?"
    own = lm.loglikelihood(requests_of(example, context=text))
    assert lm.loglikelihood(requests_of(example)[2:3]) == whole[2:3]  # the document tells the other choices
    assert lm.loglikelihood(requests_of(example, context=text)[1:]) == own[1:]  # all are the head's own choices
    assert lm.loglikelihood([Instance("loglikelihood", {}, (text, " right"), 0)]) == own[1:2]
    with pytest.raises(ValueError, match="task None: ' knave' comes without other choices"):
        lm.loglikelihood([Instance("loglikelihood", {}, (text, f" {choice}"), 0) for choice in ("knave", "knight")])
    with pytest.raises(ValueError, match="task chains has a request with an empty text"):
        lm.loglikelihood(
            [Instance("loglikelihood", {}, ("", f" {c}"), n, ("chains", 0, 1)) for n, c in enumerate(CHOICES)]
        )


def test_the_response_cache_spares_the_head(lm, asked, tmp_path):
    rows = [row for example in chain_examples(4) for row in documents_of(example)]
    first = evaluate(lm, task_of(rows), use_cache=str(tmp_path / "cache"), limit=2)
    assert len(asked) == 2
    more = evaluate(lm, task_of(rows), use_cache=str(tmp_path / "cache"))
    assert len(asked) == 4
    assert more["samples"]["rows"][:2] == first["samples"]["rows"]
    assert more["results"] == evaluate(lm, task_of(rows))["results"]


# -- lm-eval's doors --------------------------------------------------------------------------------------------------


def test_by_name_and_what_the_results_say(backbone_folder, tmp_path):
    config = BackboneConfig(name_or_path=str(backbone_folder), layers=[0, 1, 2])
    HybridModel.from_backbone(
        load_backbone(config), backbone_config=config, reasoner=tiny_reasoner(), choices=CHOICES
    ).save_pretrained(tmp_path / "head")
    rows = [row for example in chain_examples(4) for row in documents_of(example)]
    arguments = f"pretrained={tmp_path / 'head'},mode=choice,steps=2,rollouts=2,dtype=float32,device=cpu"
    results = evaluate("hybrid", task_of(rows), model_args=arguments, batch_size=3, device=None)
    config = results["config"]
    assert config["model"] == "hybrid" and config["refinement"]["max_steps"] == 2
    assert "normalised over these choices: no likelihoods" in config["loglikelihood"]
    assert "without the reasoner" in config["loglikelihood_rolling"]
    assert config["model_dtype"] == config["backbone"]["dtype"] == "torch.float32"
    loaded = HybridLM(str(tmp_path / "head"), steps=2, rollouts=2, dtype="float32")
    assert evaluate(loaded, task_of(rows))["samples"] == results["samples"]


def test_frozen_model_is_hf_of_lm_eval(backbone, language_model, tmp_path):
    language_model.model.save_pretrained(tmp_path)
    language_model.tokenizer.save_pretrained(tmp_path)
    theirs_lm = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32")
    rows = [row for example in chain_examples(4) for row in documents_of(example)]
    ours, theirs = evaluate(FrozenLM(language_model), task_of(rows)), evaluate(theirs_lm, task_of(rows))
    for one, other in zip(ours["samples"]["rows"], theirs["samples"]["rows"], strict=True):
        assert same(one["filtered_resps"], other["filtered_resps"])
    rolling = [Instance("loglikelihood_rolling", {}, ("A is left of B .",), 0)]
    found = HybridLM(tiny_model(language_model)).loglikelihood_rolling(rolling)
    assert found == pytest.approx(theirs_lm.loglikelihood_rolling(rolling), rel=1e-5)
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token"):
        FrozenLM(backbone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 3}, "model_args have no ['step']: there are pretrained, mode,"),
        ({"mode": "fields"}, "mode='fields': expected one of choice, lm"),
        ({"halting": "soon"}, "halting='soon': expected one of None, learned"),
        ({"steps": 0}, "steps=0: expected a number > 0"),
        ({"batch_size": "many"}, "batch_size=many: expected a number > 0"),
        ({"mode": "lm"}, "mode=lm needs a text decoder"),
    ],
)
def test_bad_arguments_are_one_line(model, arguments, message):
    with pytest.raises(ValueError) as error:
        HybridLM(model, **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


# -- heads that write ------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(language_model) -> HybridModel:
    """An untrained head with a text decoder, which changes nothing yet."""
    torch.manual_seed(0)
    return HybridModel.from_backbone(
        language_model,
        backbone_config=BackboneConfig(name_or_path="tiny-llama"),
        reasoner=tiny_reasoner(refine_memory=True, rotary=True),
        text=TextConfig(enabled=True),
        choices=CHOICES,
    ).eval()


def test_mode_lm_gives_likelihoods(writer, language_model):
    example = chain_examples(1)[0]
    other = requests_of(example, 1, ("knave", "the A", "left"), "A is left of B . Where is A ?")
    requests = requests_of(example) + other
    frozen = FrozenLM(language_model).loglikelihood(requests)
    found = HybridLM(writer, mode="lm").loglikelihood(requests)
    assert same(found, frozen) and [greedy for _, greedy in found] == [greedy for _, greedy in frozen]
    steered = HybridLM(open_gate(writer), mode="lm").loglikelihood(requests)
    assert not same(steered, found)
    assert HybridLM(writer, mode="lm").loglikelihood(other) == steered[len(CHOICES) :]
    assert same(HybridLM(writer).loglikelihood(other[:1] + other[2:]), steered[4:5] + steered[6:])  # one was cached
    with pytest.raises(ValueError, match="rollouts=2: mode=lm takes one"):
        HybridLM(writer, mode="lm", rollouts=2)


def test_text_in_mode_lm_is_what_hf_reads_and_the_reasoner_as_in_training(writer, monkeypatch):
    seen = []

    def text_log_likelihoods(model, texts, continuations, **kwargs):
        seen.append((texts[0], kwargs["suffix"], kwargs["chat"], [field.name for field in kwargs["fields"]]))
        return [(-1.0, False) for _ in texts]

    monkeypatch.setattr(harness, "text_log_likelihoods", text_log_likelihoods)
    fields = (Field("A", ("knight", "knave")), Field("B", ("knave", "knight")))
    puzzle = Example("A says B is a knave .", "Where ?", fields, ("knight", "knave"), None, "puzzle")
    lm = HybridLM(writer, mode="lm")
    lm.loglikelihood(requests_of(puzzle, choices=("knight", "knave")))
    lm.loglikelihood(requests_of(puzzle, choices=("knight", "knave"), context="A is ?\nAnswer:"))
    assert seen == [
        (("A says B is a knave .", "Where ?"), "\nA:", False, ["A", "B"]),
        ((None, "A is ?\nAnswer:"), "", False, ["A", "B"]),
    ]


def test_generated_text_is_that_of_hf_up_to_a_stop_sequence(writer, language_model):
    rows = [
        {"passage": "A is left of B .", "answer": " left"},
        {"passage": "C is above the knave .", "answer": " left"},
    ]
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    asks = {"output_type": "generate_until", "doc_to_text": "passage", "doc_to_choice": None, "metric_list": metrics}
    free = {"until": [], "max_gen_toks": 12, "do_sample": False}
    alone = evaluate(FrozenLM(language_model), task_of(rows, **asks, generation_kwargs=dict(free)))
    found = evaluate(HybridLM(writer), task_of(rows, **asks, generation_kwargs=dict(free)))
    texts = [sample["resps"][0][0] for sample in found["samples"]["rows"]]
    assert texts == [sample["resps"][0][0] for sample in alone["samples"]["rows"]]
    assert len(texts[0].split()) > 1
    stop = texts[0].split()[-1]
    found = evaluate(HybridLM(writer), task_of(rows, **asks, generation_kwargs={**free, "until": [stop]}))
    assert found["samples"]["rows"][0]["resps"][0][0] == texts[0].split(stop)[0]
    steered = evaluate(HybridLM(open_gate(writer)), task_of(rows, **asks, generation_kwargs=dict(free)))
    assert [sample["resps"][0][0] for sample in steered["samples"]["rows"]] != texts


def test_generation_without_a_text_decoder_is_one_line(lm):
    with pytest.raises(ValueError, match="which asks for generated text, needs a text decoder, which .* lacks"):
        lm.generate_until([Instance("generate_until", {}, ("A", {"until": []}), 0, ("babi", 0, 1))])
