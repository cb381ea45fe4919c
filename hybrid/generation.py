"""Text from the frozen model, steered by what the reasoner worked out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria

from hybrid.asking import fields_asked, in_eval_mode, texts_asked
from hybrid.backbone import Backbone, TextPrompt, length_batches, warn_caller
from hybrid.config import TextConfig
from hybrid.data import Example
from hybrid.decoder import Field, FieldBatch
from hybrid.losses import IGNORED
from hybrid.model import HybridModel
from hybrid.refinement import TOKEN_BUDGET, refine_rollouts
from hybrid.soft_prompt import PromptPass, SoftTokens, add_soft_tokens, next_token_logits, pad_left, read_prompts

NUM_TOKENS = 64  # of a text, at most, unless its length is asked for


@torch.inference_mode()
@in_eval_mode
def generate(
    model: HybridModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    choices: Sequence[str] | None = None,
    fields: Sequence[Field | str] | Mapping[str, Sequence[str]] | None = None,
    max_steps: int | None = None,
    halting: str | None = None,
    rollouts: int = 1,
    pick: str = "q",
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """Go on from tokenised prompts: `generate` of transformers, with the refined slots as soft tokens.

    The prompt is read once, for the reasoner and for generation. Where it stands in the chat template, or ends with
    the head's `text.suffix`, the reasoner reads the question alone.

    Args:
        model: A head with a text decoder.
        inputs: Prompts, padded on the left, (batch, tokens); or give `input_ids`.
        generation_config: Settings of transformers; by default the language model's own.
        input_ids: Likewise.
        attention_mask: (batch, tokens); by default, what follows the padding of a batch.
        choices: Options of a question with one answer; by default what the head was trained to answer.
        fields: What is asked, when there are several answers.
        max_steps: Refinement steps at most.
        halting: `learned`, `convergence` or `never`.
        rollouts: Noisy copies per prompt.
        pick: How one copy is chosen, `q` or `vote`.
        seed: Seed of the noise.
        **kwargs: Everything that `generate` of transformers takes: `max_new_tokens`, `do_sample`, `num_beams`,
            `num_return_sequences`, `streamer`, `stopping_criteria`, …

    Returns:
        What it returns: token ids of prompt and text, (batch × num_return_sequences, tokens).

    Raises:
        ValueError: The head has no text decoder, the prompts are no token ids, empty, padded on the right, or end
            differently, or drafts are asked for (`assistant_model`, `prompt_lookup_num_tokens`).
    """
    check_text_decoder(model)
    ids = inputs if input_ids is None else input_ids
    if ids is None:
        raise ValueError("no prompts: give input_ids, as the tokenizer returns them")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids: expected token ids, (batch, tokens), got {found}; generate_text takes texts")
    pad = model.backbone.tokenizer.pad_token_id if len(ids) > 1 and attention_mask is None else None
    if attention_mask is None:
        attention_mask = torch.ones_like(ids) if pad is None else ids.ne(pad).long().cummax(dim=1).values
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids, {(*ids.shape,)}, got {(*attention_mask.shape,)}"
        )
    if not bool(attention_mask[:, -1].all()) or (pad is not None and bool(ids[:, -1].eq(pad).any())):
        raise ValueError("attention_mask ends with padding: tokenise prompts with padding_side='left'")
    rows = [row[seen.bool()].tolist() for row, seen in zip(ids, attention_mask, strict=True)]
    prompts = [model.backbone.text_prompt_of_ids(row, model.config.text.suffix) for row in rows]
    asked = fields_asked(model, choices, fields)
    read, soft = _read_and_refine(
        model,
        prompts,
        asked,
        ids.shape[1],
        rollouts=rollouts,
        pick=pick,
        seed=seed,
        max_steps=max_steps,
        halting=halting,
    )
    return write(model, ids, attention_mask, read, soft, generation_config=generation_config, **kwargs)


def generate_text(model: HybridModel, question: str, *, context: str | None = None, **kwargs: Any) -> str:
    """Text in, text out.

    Args:
        model: A head with a text decoder.
        question: The question, or the whole text with the question at its end.
        context: The text that comes before the question.
        **kwargs: As in `generate_texts`.
    """
    if not isinstance(question, str):
        raise ValueError(f"question={question!r}: expected a text; generate_texts takes many")
    return generate_texts(model, [question], contexts=[context], **kwargs)[0]


@torch.inference_mode()
@in_eval_mode
def generate_texts(
    model: HybridModel,
    questions: Sequence[str],
    *,
    contexts: Sequence[str | None] | None = None,
    choices: Sequence[str] | None = None,
    fields: Sequence[Field | str] | Mapping[str, Sequence[str]] | None = None,
    chat: bool | None = None,
    stop: str | Sequence[str] | None = None,
    max_steps: int | None = None,
    halting: str | None = None,
    rollouts: int = 1,
    pick: str = "q",
    seed: int = 0,
    **kwargs: Any,
) -> list[str]:
    """What the language model writes after each question, in batches of similar length.

    Args:
        model: A head with a text decoder.
        questions: The questions.
        contexts: A context for each.
        choices: Options of a question with one answer; by default what the head was trained to answer.
        fields: What is asked, when there are several answers.
        chat: Put questions into the chat template; by default as the head was trained.
        stop: A text, or several, before which the answer ends.
        max_steps: Refinement steps at most.
        halting: `learned`, `convergence` or `never`.
        rollouts: Noisy copies per question.
        pick: How one copy is chosen, `q` or `vote`.
        seed: Seed of the noise.
        **kwargs: As in `generate` of transformers; 64 tokens at most, unless it is told.

    Raises:
        ValueError: The head has no text decoder, or several texts a question are asked for.
    """
    check_text_decoder(model)
    if isinstance(questions, str):
        raise ValueError(f"questions={questions!r}: expected a list of texts; generate_text takes one")
    for name, single in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
        if (value := _setting(model.backbone, kwargs, name) or single) != single:
            raise ValueError(f"{name}={value}: one text a question is returned; use generate, or give {name}={single}")
    config = kwargs.get("generation_config")
    told = vars(config or GenerationConfig()) | kwargs
    if told["max_new_tokens"] is None and told["max_length"] is None:
        if config is None:
            kwargs["max_new_tokens"] = NUM_TOKENS
        else:  # transformers wants arguments or a configuration, not both
            kwargs["generation_config"] = copy.copy(config)
            kwargs["generation_config"].max_new_tokens = NUM_TOKENS
    trained = model.config.text.chat
    if chat is not None and chat != trained:
        warn_caller(f"chat={chat}: this head was trained with text.chat={trained}: expect guesses")
    asked = fields_asked(model, choices, fields)
    all_prompts = text_prompts(model, texts_asked(questions, contexts, asked), chat) if questions else []
    stop = [stop] if isinstance(stop, str) else stop or []
    criteria, texts = list(kwargs.pop("stopping_criteria", [])), {}
    for rows in length_batches([len(prompt.reading.token_ids) for prompt in all_prompts], TOKEN_BUDGET):
        prompts = [all_prompts[row] for row in rows]
        read, soft = _read_and_refine(
            model, prompts, asked, rollouts=rollouts, pick=pick, seed=seed, max_steps=max_steps, halting=halting
        )
        ends = [_StopTexts(model.backbone.tokenizer, prompts, stop)] if stop else []
        written = write_texts(model, prompts, read, soft, stop, **kwargs, stopping_criteria=[*criteria, *ends])
        texts |= dict(zip(rows, written, strict=True))
    return [texts[row] for row in range(len(questions))]


class _StopTexts(StoppingCriteria):
    """Ends a row once one of some texts is written. Transformers' `stop_strings` does not read every vocabulary."""

    def __init__(self, tokenizer: Any, prompts: Sequence[TextPrompt], stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.start = max(len(prompt.token_ids) for prompt in prompts)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        """Which rows are done, (batch,)."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :])
        return torch.tensor([any(end in text for end in self.stop) for text in texts], device=input_ids.device)


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of `stop`."""
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]


# -- the parts -----------------------------------------------------------------------------------------------------


def check_text_decoder(model: HybridModel) -> None:
    """Refuse a head that writes no text.

    Raises:
        ValueError: It has no text decoder.
    """
    if model.text_decoder is None:
        raise ValueError("this head has no text decoder: train one with text.enabled=true, or ask for choices")


def text_prompts(
    model: HybridModel,
    texts: Sequence[tuple[str | None, str]],
    chat: bool | None = None,
    suffix: str | None = None,
) -> list[TextPrompt]:
    """Prompts of (context, question) pairs as the head was trained, but for what is given."""
    settings = model.config.text
    chat = settings.chat if chat is None else chat
    suffix = settings.suffix if suffix is None and not chat else suffix or ""
    return model.backbone.text_prompts(texts, suffix, chat)


def read_texts(model: HybridModel, prompts: Sequence[TextPrompt], width: int = 0) -> tuple[PromptPass, Tensor, Tensor]:
    """One pass over some prompts: what generation goes on from, and hidden states and memory mask for the reasoner."""
    read = read_prompts(model.backbone, prompts, width=width)
    return read, *model.pad_states([prompt.reading.memory_ids for prompt in prompts], read.states)


def _read_and_refine(
    model: HybridModel, prompts: Sequence[TextPrompt], asked: Sequence[Field], width: int = 0, **refinement: Any
) -> tuple[PromptPass, SoftTokens]:
    read, hidden_states, memory_mask = read_texts(model, prompts, width)
    batch = model.field_batch([asked] * len(prompts))
    refined = refine_rollouts(model, hidden_states, memory_mask, batch, **refinement)
    return read, soft_tokens(model, refined.answer_latent, batch)


def soft_tokens(model: HybridModel, answer_latent: Tensor, fields: FieldBatch) -> SoftTokens:
    """Soft tokens on the backbone's device and in its dtype; none, if none of them would be seen.

    Args:
        model: A head with a text decoder.
        answer_latent: Of field and tape slots, (batch, slots, dim).
        fields: What was asked.
    """
    assert model.text_decoder is not None
    num_tape = answer_latent.shape[1] - fields.name_index.shape[1]
    exists = torch.cat([fields.field_mask, fields.field_mask.new_ones(len(answer_latent), num_tape)], dim=1)
    vectors, log_weights = model.text_decoder(answer_latent.to(model.device, model.dtype), exists)
    num_kept = vectors.shape[1] if bool(log_weights.isfinite().any()) else 0
    device = model.backbone.device
    vectors = vectors[:, :num_kept].to(device, model.backbone.dtype)
    return SoftTokens(vectors, log_weights[:, :num_kept].to(device), exists[:, :num_kept].to(device))


def write(
    model: HybridModel, input_ids: Tensor, attention_mask: Tensor, read: PromptPass, soft: SoftTokens, **kwargs: Any
) -> Any:
    """`generate` of transformers, from prompts that were read, behind soft tokens."""
    backbone = model.backbone
    if _setting(backbone, kwargs, "use_cache") is False:
        raise ValueError("use_cache=False: the soft tokens lie in the cache; leave it out")
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate"):
        if (value := _setting(backbone, kwargs, name)) is not None:  # the prompt would be read again, behind them
            raise ValueError(f"{name}={value!r}: drafts are not supported with soft tokens; leave it out")
    add_soft_tokens(backbone, read.cache, soft)
    read.cache.was_read = False  # the passes so far have set it
    output = backbone.model.generate(
        input_ids=input_ids.to(backbone.device),
        attention_mask=attention_mask.to(backbone.device),
        cache=read.cache,
        **kwargs,
    )
    if not read.cache.was_read:
        raise RuntimeError(f"{backbone.name} runs its blocks where soft tokens cannot be shown to it")
    return output


def _setting(backbone: Backbone, kwargs: dict[str, Any], name: str) -> Any:
    """A setting of `generate`: an argument, else what `generation_config` says, else the model's own."""
    given = getattr(kwargs.get("generation_config"), name, None)
    return kwargs.get(name, getattr(backbone.model.generation_config, name, None) if given is None else given)


def write_texts(
    model: HybridModel,
    prompts: Sequence[TextPrompt],
    read: PromptPass,
    soft: SoftTokens,
    stop: Sequence[str] = (),
    **kwargs: Any,
) -> list[str]:
    """What `write` adds to each prompt before the first of `stop`, as text without special tokens and outer spaces."""
    tokenizer = model.backbone.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids, mask = pad_left([prompt.token_ids for prompt in prompts], model.backbone.device, pad=pad)
    output = write(model, ids, mask.long(), read, soft, **kwargs)
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [_cut(text, stop).strip() for text in texts]


@torch.inference_mode()
def greedy_texts(backbone: Backbone, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """What a language model itself writes after each prompt, greedily, without special tokens."""
    texts: dict[int, str] = {}
    for rows in length_batches([len(prompt) for prompt in prompts], TOKEN_BUDGET):
        token_ids, mask = pad_left([prompts[row] for row in rows], backbone.device)
        model: Any = backbone.model
        output = model.generate(
            input_ids=token_ids, attention_mask=mask.long(), max_new_tokens=max_new_tokens, do_sample=False
        )
        found = backbone.tokenizer.batch_decode(output[:, token_ids.shape[1] :], skip_special_tokens=True)
        texts |= dict(zip(rows, found, strict=True))
    return [texts[row] for row in range(len(prompts))]


def is_answer(text: str, answer: str) -> bool:
    """Whether a text begins with an answer's lines, but for spaces around lines and a full stop at the end."""
    lines = text.strip().split("\n")[: answer.count("\n") + 1]
    return "\n".join(line.strip() for line in lines).rstrip(".") == answer.rstrip(".")


# -- likelihoods ---------------------------------------------------------------------------------------------------


def text_log_likelihoods(
    model: HybridModel,
    texts: Sequence[tuple[str | None, str]],
    continuations: Sequence[str],
    *,
    choices: Sequence[str] | None = None,
    fields: Sequence[Field | str] | Mapping[str, Sequence[str]] | None = None,
    chat: bool | None = None,
    suffix: str | None = None,
    max_steps: int | None = None,
    halting: str | None = None,
) -> list[tuple[float, bool]]:
    """Log-likelihood, in nats, of each continuation under the steered model, and whether greedy decoding writes it.

    Args:
        model: A head with a text decoder.
        texts: (context, question) pairs.
        continuations: What follows each prompt, from its first space on.
        choices: Options of a question with one answer; by default what the head was trained to answer.
        fields: What is asked, when there are several answers.
        chat: Put questions into the chat template; by default as the head was trained.
        suffix: What follows the question in the prompt; by default as the head was trained.
        max_steps: Refinement steps at most.
        halting: `learned`, `convergence` or `never`.
    """
    check_text_decoder(model)
    if len(continuations) != len(texts):
        raise ValueError(f"{len(texts)} texts and {len(continuations)} continuations: give one for each")
    asked = fields_asked(model, choices, fields)
    all_prompts = text_prompts(model, texts, chat, suffix) if texts else []
    encoded: Any = (
        model.backbone.tokenizer(list(continuations), add_special_tokens=False)["input_ids"] if texts else []
    )
    if not all(encoded):
        raise ValueError(f"continuation {encoded.index([])} is empty: its likelihood is not defined")
    found: dict[int, tuple[float, bool]] = {}
    pairs = zip(all_prompts, encoded, strict=True)
    lengths = [len(prompt.reading.token_ids) + len(ids) for prompt, ids in pairs]
    for rows in length_batches(lengths, TOKEN_BUDGET):
        with torch.inference_mode():
            prompts = [all_prompts[row] for row in rows]
            read, soft = _read_and_refine(model, prompts, asked, rollouts=1, max_steps=max_steps, halting=halting)
            losses, greedy = continuation_losses(model, read, soft, [encoded[row] for row in rows])
        sums = -losses.sum(1)
        found |= {row: (float(sums[i]), bool(greedy[i])) for i, row in enumerate(rows)}
    return [found[row] for row in range(len(texts))]


def continuation_losses(
    model: HybridModel, read: PromptPass, soft: SoftTokens, token_ids: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Next-token loss of a continuation of each prompt, with gradient to the soft tokens.

    Returns:
        Losses in nats, zero at padding, (batch, tokens), and whether greedy decoding writes it, (batch,).
    """
    rows = [torch.tensor(ids, dtype=torch.long) for ids in token_ids]
    labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED).to(model.backbone.device)
    logits = next_token_logits(model.backbone, read, soft, labels.clamp(min=0)).float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    greedy = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
    return losses.view_as(labels).to(model.device), greedy.to(model.device)


def answer_text_loss(
    model: HybridModel, answer_latent: Tensor, fields: FieldBatch, examples: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """The loss of writing each example's answer, a mean over its tokens, and whether it would be written; (batch,)."""
    prompts = text_prompts(model, [(example.context, example.question) for example in examples])
    read = read_prompts(model.backbone, prompts, with_states=False)
    token_ids = answer_token_ids(model.backbone.tokenizer, model.config.text, examples)
    losses, greedy = continuation_losses(model, read, soft_tokens(model, answer_latent, fields), token_ids)
    lengths = torch.tensor([len(ids) for ids in token_ids], device=losses.device)
    return losses.sum(1) / lengths, greedy


def answer_token_ids(tokenizer: Any, settings: TextConfig, examples: Sequence[Example]) -> list[list[int]]:
    """Tokens of each example's answer in words, up to the end of the text."""
    space = "" if settings.chat else " "
    texts = [f"{space}{answer_text(settings, example)}" for example in examples]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return [[*ids, *end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def answer_text(settings: TextConfig, example: Example) -> str:
    """An example's answer in words: its own, or what the head's template makes of the fields.

    Raises:
        ValueError: The template names a field that there is not.
    """
    if example.answer_text is not None:
        return example.answer_text
    answers = {field.name: answer for field, answer in example.answered}
    if settings.answer is None:
        listed = ", ".join(f"{name}: {answer}" for name, answer in answers.items())
        return listed if len(answers) > 1 else next(iter(answers.values()))
    try:
        return settings.answer.format_map(answers)
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(
            f"text.answer={settings.answer!r} cannot be filled ({type(error).__name__}: {error}): the answers are of "
            f"{list(answers)}, each named in braces"
        ) from None


# -- texts that are to stay as they are ----------------------------------------------------------------------------


@torch.inference_mode()
def own_texts(backbone: Backbone, number: int, num_tokens: int, seed: int, batch_size: int = 64) -> list[list[int]]:
    """Texts that the frozen model writes by itself, sampled from its own distribution after a random first token.

    Returns:
        Token ids, `num_tokens` + 1 each, behind the special tokens that the model begins with.
    """
    model: Any = backbone.model
    config, texts = GenerationConfig(), []
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    config.update(**settings, num_beams=1, max_new_tokens=num_tokens, pad_token_id=0, eos_token_id=-1)  # no token ends
    with torch.random.fork_rng(devices=[] if backbone.device.type == "cpu" else [backbone.device]):
        torch.manual_seed(seed)
        first = torch.randint(len(backbone.tokenizer), (number,))
        for batch in first.split(batch_size):
            prompts = torch.tensor([backbone.special_prefix + [token] for token in batch.tolist()])
            output = model.generate(
                input_ids=prompts.to(backbone.device),
                attention_mask=torch.ones_like(prompts).to(backbone.device),
                generation_config=config,
            )
            texts += output.tolist()
    return texts


def keep_loss(model: HybridModel, texts: Sequence[list[int]], fields: Sequence[Field]) -> Tensor:
    """Next-token loss of the second half of texts that the frozen model wrote, with gradient to the text decoder.

    As they are samples of its own distribution, no steering does better than none.
    """
    half = len(texts[0]) // 2
    prompts = [model.backbone.text_prompt_of_ids(text[:half]) for text in texts]
    read, hidden_states, memory_mask = read_texts(model, prompts)
    batch = model.field_batch([fields] * len(texts))
    refined = refine_rollouts(model, hidden_states, memory_mask, batch, rollouts=1)
    latent = refined.answer_latent.clone()  # made in inference mode; its copy may carry gradient
    losses, _ = continuation_losses(model, read, soft_tokens(model, latent, batch), [text[half:] for text in texts])
    return losses.mean()
