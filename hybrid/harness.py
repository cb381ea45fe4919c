"""Heads as the model `hybrid` of lm-evaluation-harness.

What a shipped task asks without few-shot examples and chat template reaches the head as in training: context, question
and all fields of the question. Any other request is read as any model gets it, whole.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import accelerate
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from tqdm import tqdm

from hybrid import __version__
from hybrid.backbone import Backbone, load_backbone, one_text, quick_hash
from hybrid.baselines import check_zero_shot
from hybrid.config import HybridConfig
from hybrid.decoder import Field
from hybrid.documents import fields_of, is_document
from hybrid.generation import generate, text_log_likelihoods
from hybrid.hub import check_head_folder
from hybrid.model import HybridModel
from hybrid.refinement import PICKS, TOKEN_BUDGET, refine_rollouts

MODES = {
    "choice": "log-probabilities that the reasoner gives the choices of a document, normalised over these choices: no "
    "likelihoods of a language model, so acc_norm and perplexities mean nothing",
    "lm": "log-likelihoods of the continuations under the frozen language model behind the reasoner's soft tokens",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


@contextmanager
def quiet_lm_eval() -> Generator[None]:
    """Silence lm-eval's warnings about what is meant so; those of an evaluation (a text cut short) are shown."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Question:
    """What the reasoner is asked once, however many choices or documents it stands for."""

    context: str | None
    question: str
    fields: tuple[Field, ...]


class Processes:
    """What lm-eval asks of a model that several processes of `accelerate launch` hold a copy of."""

    @cached_property
    def state(self) -> accelerate.PartialState:
        """The processes; others wait while one computes."""
        return accelerate.PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.state.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.state.num_processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of every process, one after the other."""
        return accelerate.utils.gather(tensor) if self.world_size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """An object of every process, on process `dst`."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst)
        return gathered

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.state.wait_for_everyone()


class FrozenLM(Processes, HFLM):
    """The model `hf` of lm-eval on a backbone that is loaded already.

    Args:
        backbone: A causal language model.
        batch_size: Requests at a time; more are quicker on a GPU, and padding changes rounded scores a little.

    Raises:
        ValueError: Its tokenizer has no token that a text could begin or end with.
    """

    def __init__(self, backbone: Backbone, batch_size: int = 1):
        tokenizer: Any = backbone.tokenizer
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {backbone.name} has neither a BOS nor an EOS token: lm-eval needs one")
        with quiet_lm_eval():
            super().__init__(
                pretrained=backbone.model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                softmax_dtype="float32",  # sums of rounded log-probabilities would tie
            )
        self.backbone = backbone

    def get_model_info(self) -> dict[str, Any]:
        """What a result file says of the model."""
        return {
            "model": "hf",
            "model_num_parameters": self.backbone.model.num_parameters(),
            "model_dtype": str(self.backbone.dtype),
            "model_revision": self.backbone.revision,
            "model_sha": self.backbone.quick_hash(),
            "model_name": self.backbone.name,
        }


@register_model("hybrid")
class HybridLM(Processes, LM):
    """A head, asked by lm-evaluation-harness.

    Args:
        pretrained: Folder or Hub id of a head, or a loaded one.
        mode: What `loglikelihood` returns: `choice` asks the reasoner once for all choices of a document, `lm` gives
            likelihoods under the frozen language model with the reasoner's soft tokens.
        steps: Refinement steps at most; by default those of the head.
        halting: `learned`, `convergence` or `never`; by default that of the head.
        rollouts: Noisy copies per question.
        pick: How one copy is chosen, `q` or `vote`.
        seed: Seed of the noise.
        dtype: Type of the weights, of head and backbone, if the head is loaded here.
        device: Likewise; by default `cuda` if there is one, else `cpu`. Several processes take a device each.
        batch_size: Questions at a time; by default as many as fit a budget of tokens.
        max_batch_size: Ignored.
        **unknown: Refused.

    Raises:
        ValueError: An argument is unknown or out of range, there is no such head, or it has no text decoder for `lm`.
    """

    def __init__(
        self,
        pretrained: str | Path | HybridModel,
        mode: str = "choice",
        steps: int | None = None,
        halting: str | None = None,
        rollouts: int = 1,
        pick: str = "q",
        seed: int = 0,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            known = "pretrained, mode, steps, halting, rollouts, pick, seed, dtype, device"
            raise ValueError(f"model_args have no {sorted(unknown)}: there are {known}")
        _check_known("mode", mode, MODES)
        _check_known("halting", halting, (None, "learned", "convergence", "never"))
        _check_known("pick", pick, PICKS)
        _check_known("dtype", dtype, DTYPES)
        for name, number in (("steps", steps), ("rollouts", rollouts), ("batch_size", batch_size)):
            if number not in (None, "auto") and (not str(number).isdigit() or int(number) < 1):
                raise ValueError(f"{name}={number}: expected a number > 0")
        self.batch_size = None if batch_size in (None, "auto") else int(batch_size)
        if isinstance(pretrained, HybridModel):
            self.model, self.name = pretrained.eval(), pretrained.config.name_or_path or type(pretrained).__name__
        else:
            device = str(self.state.device) if self.world_size > 1 else device
            self.model, self.name = _load_head(str(pretrained), dtype, device), str(pretrained)
        self.mode = mode
        self.refinement: dict[str, Any] = {
            "max_steps": steps,
            "halting": halting,
            "rollouts": rollouts,
            "pick": pick,
            "seed": seed,
        }
        if mode == "lm":
            self.check_text_decoder("mode=lm")
            if rollouts > 1:
                raise ValueError(f"rollouts={rollouts}: mode=lm takes one; mode=choice and generated text take more")

    @property
    def device(self) -> torch.device:
        """Device of the head."""
        return self.model.device

    @property
    def has_text_decoder(self) -> bool:
        """Whether the head can write."""
        return self.model.text_decoder is not None

    def check_text_decoder(self, wanted: str) -> None:
        """Refuse what a head cannot do that only chooses among options."""
        if not self.has_text_decoder:
            raise ValueError(f"{wanted} needs a text decoder, which {self.name} lacks: use mode=choice on choices")

    # -- choices ---------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations; the flag marks the best choice (`choice`), or what greedy decoding gives (`lm`).

        Raises:
            ValueError: A continuation comes without the other choices, and the head has no text decoder.
        """
        results: dict[int, tuple[float, bool]] = {}
        asked: dict[Question, list[tuple[int, int, str]]] = defaultdict(list)  # number of the request, field, choice
        alone: list[tuple[list[int], tuple[Field, ...] | None]] = []  # numbers of requests after one text, its fields
        for numbers in _groups(requests):
            choices = [requests[number].args[1].strip() for number in numbers]
            question, field = self._question([requests[number] for number in numbers], choices) or (None, 0)
            if question is None:
                alone.append((numbers, None))
            elif self.mode == "lm":
                alone.append((numbers, question.fields))
            else:
                asked[question] += [(number, field, choice) for number, choice in zip(numbers, choices, strict=True)]
        with tqdm(total=len(requests), unit="choice", disable=disable_tqdm or self.rank != 0, leave=False) as bar:
            for numbers, fields in alone:
                scores = self._likelihoods([requests[number] for number in numbers], fields)
                results.update(zip(numbers, scores, strict=True))
                bar.update(len(numbers))
            for questions in self._batches(list(asked)) if asked else ():
                for question, options in zip(questions, self._log_probabilities(questions), strict=True):
                    for number, field, choice in asked[question]:
                        value = options[field][choice]
                        results[number] = value, value == max(options[field].values())
                        self.cache_hook.add_partial("loglikelihood", requests[number].args, results[number])
                    bar.update(len(asked[question]))
        return [results[number] for number in range(len(requests))]

    def _question(self, group: Sequence[Instance], choices: Sequence[str]) -> tuple[Question, int] | None:
        """The question that a document asks, and which of its fields; `None` without alternatives to choose from.

        A part of a document's choices may lie in the response cache. A shipped document tells all of them, any other
        only if they were numbered without a gap; the head's own choices stand in where they hold the ones asked for.
        """
        document = group[0].doc
        is_as_it_was = is_document(document) and group[0].args[0] == document["prompt"]
        if self.model.config.places is not None and not is_as_it_was:
            raise ValueError(
                f"task {group[0].task_name}: the fields of this head stand at characters of a question, which nobody "
                "finds among examples or in a chat: leave out num_fewshot and chat, and use a task of `hybrid harness`"
            )
        if is_document(document):
            fields = fields_of(document)
            asked = [field.name for field in fields].index(document["field"])
            if set(choices) <= set(fields[asked].options):
                return Question(*_text(group[0]), fields), asked
        numbers, options = {request.idx for request in group}, list(dict.fromkeys(choices))
        if len(options) < 2 or numbers != set(range(len(numbers))):
            own = self.model.config.choices or []
            if not set(options) <= set(own):
                return None
            options = own
        return Question(*_text(group[0]), (Field("answer", options),)), 0

    def _batches(self, questions: Sequence[Question]) -> Generator[list[Question]]:
        """Questions of equal length, longest first: without padding, no score depends on what else is in its batch."""
        prompts = self.model.backbone.prompts([(question.context, question.question) for question in questions])
        alike: dict[tuple[int, ...], list[Question]] = defaultdict(list)
        for question, prompt in zip(questions, prompts, strict=True):
            alike[len(prompt.token_ids), len(prompt.memory_ids), len(question.fields)].append(question)
        for (length, *_), same in sorted(alike.items(), key=lambda item: item[0], reverse=True):
            size = self.batch_size or max(1, TOKEN_BUDGET // length)
            yield from (same[start : start + size] for start in range(0, len(same), size))

    def _log_probabilities(self, questions: Sequence[Question]) -> list[list[dict[str, float]]]:
        """For each question and field, the log-probability of each option, in nats."""
        texts = [(question.context, question.question) for question in questions]
        hidden_states, mask = self.model.embed(texts)
        asked = [question.fields for question in questions]
        fields = self.model.field_batch(asked, starts=self.model.starts_of(asked, texts))
        scores = refine_rollouts(self.model, hidden_states, mask, fields, **self.refinement).scores
        return [
            [
                dict(zip(field.options, row[: len(field.options)].log_softmax(-1).tolist(), strict=True))
                for field, row in zip(question.fields, rows, strict=False)
            ]
            for question, rows in zip(questions, scores, strict=True)
        ]

    # -- text ------------------------------------------------------------------------------------------------------

    def _likelihoods(self, group: Sequence[Instance], fields: Sequence[Field] | None) -> list[tuple[float, bool]]:
        """Log-likelihoods, in nats, of continuations of one text, and whether each is the greedy one."""
        task, text = group[0].task_name, group[0].args[0]
        if not self.has_text_decoder:
            raise ValueError(
                f"task {task}: {group[0].args[1]!r} comes without other choices after the same text, so there is "
                "nothing to choose from, and a likelihood needs a head with a text decoder"
            )
        context, question = _text(group[0])
        read = one_text(context, question)
        scores = text_log_likelihoods(
            self.model,
            [(context, question)] * len(group),
            [request.args[1] for request in group],
            fields=fields,
            chat=False,
            suffix=text.removeprefix(read),
            max_steps=self.refinement["max_steps"],
            halting=self.refinement["halting"],
        )
        for request, score in zip(group, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, score)
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text of the frozen model behind the reasoner's soft tokens, up to the first stop sequence.

        Raises:
            ValueError: The head has no text decoder.
        """
        self.check_text_decoder(f"task {requests[0].task_name}, which asks for generated text,")
        results = []
        for request in tqdm(requests, unit="text", disable=disable_tqdm or self.rank != 0, leave=False):
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1]))
            stop, max_new_tokens = kwargs.pop("until"), kwargs.pop("max_gen_toks")
            if not kwargs.get("do_sample"):
                kwargs.pop("temperature", None)
            token_ids = torch.tensor([self.tokenizer(request.args[0])["input_ids"]])
            stops = stop_sequences_criteria(self.tokenizer, stop, token_ids.shape[1], 1)
            output = generate(
                self.model,
                token_ids,
                max_new_tokens=max_new_tokens,
                stopping_criteria=stops,
                **self.refinement,
                **kwargs,
            )
            text = self.tokenizer.decode(output[0, token_ids.shape[1] :], skip_special_tokens=True)
            results.append(postprocess_generated_text(text, stop, None))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts under the frozen language model alone, as `--model hf` computes it."""
        check_zero_shot(self.model.backbone)
        self.frozen.set_cache_hook(self.cache_hook)
        return self.frozen.loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    @cached_property
    def frozen(self) -> FrozenLM:
        """The language model without the reasoner."""
        return FrozenLM(self.model.backbone)

    # -- what lm-eval writes down ----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The backbone's."""
        return self.model.backbone.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's cache of requests."""
        return self.frozen.tokenizer_name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The backbone's chat template."""
        return self.frozen.chat_template(chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the backbone's chat template."""
        return self.frozen.apply_chat_template(chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What a result file says of the model, and of what its scores are."""
        backbone = self.model.backbone
        return {
            "model": "hybrid",
            "model_num_parameters": sum(self.model.parameter_groups().values()),
            "model_dtype": str(self.model.dtype),
            "model_revision": None,
            "model_sha": quick_hash(self.model),
            "model_name": self.name,
            "backbone": {"name": backbone.name, "dtype": str(backbone.dtype), "weights": backbone.quick_hash()},
            "hybrid_version": __version__,
            "mode": self.mode,
            "refinement": self.refinement,
            "loglikelihood": MODES[self.mode],
            "loglikelihood_rolling": "the frozen language model's own, without the reasoner",
        }


def _load_head(pretrained: str, dtype: str, device: str | None) -> HybridModel:
    if dtype == "auto":
        return HybridModel.from_pretrained(pretrained, device=device)
    if Path(pretrained).is_dir():
        check_head_folder(Path(pretrained))
    backbone = load_backbone(replace(HybridConfig.from_pretrained(pretrained).backbone, dtype=dtype), device)
    return HybridModel.from_pretrained(pretrained, backbone, dtype=dtype, device=device)


def _check_known(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(str(each) for each in known)}")


def _groups(requests: Sequence[Instance]) -> list[list[int]]:
    """Numbers of the requests that ask for choices of one document after one text."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        by_itself = number if request.doc_id is None else None
        groups[request.task_name, request.doc_id, request.args[0], by_itself].append(number)
    return list(groups.values())


def _text(request: Instance) -> tuple[str | None, str]:
    """Context and question of a request, as the module's docstring says."""
    document, prompt = request.doc, request.args[0]
    if is_document(document) and prompt == document["prompt"]:
        return document["context"], document["question"]
    if not prompt.strip():
        raise ValueError(f"task {request.task_name} has a request with an empty text: there is nothing to read")
    return None, prompt
