"""Text from the frozen model, steered by what the reasoner worked out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import StoppingCriteria

from hybrid.backbone import Backbone, TextPrompt, length_batches
from hybrid.config import TextConfig
from hybrid.data import Example
from hybrid.decoder import Field, FieldBatch
from hybrid.inference import TOKEN_BUDGET, fields_asked, refine_rollouts
from hybrid.losses import IGNORED
from hybrid.model import HybridModel
from hybrid.soft_prompt import PromptPass, add_soft_tokens, next_token_logits, read_prompts


@torch.inference_mode()
def generate(
    model: HybridModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    choices: Sequence[str] | None = None,
    fields: Sequence[Field] | None = None,
    max_steps: int | None = None,
    halting: str | None = None,
    rollouts: int = 1,
    pick: str = "q",
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """Go on from tokenised prompts: `generate` of transformers, with the refined slots as soft tokens.

    The prompt is read once, for the reasoner and for generation. Where it ends with the head's `text.suffix`, the
    reasoner reads what comes before.

    Args:
        model: A head with a text decoder.
        input_ids: Prompts, padded on the left, (batch, tokens).
        attention_mask: (batch, tokens); all ones by default.
        choices: Options of a question with one answer; by default those of the head.
        fields: What is asked, when there are several answers.
        max_steps: Refinement steps at most.
        halting: `learned`, `convergence` or `never`.
        rollouts: Noisy copies per prompt.
        pick: How one copy is chosen, `q` or `vote`.
        seed: Seed of the noise.
        **kwargs: Everything that `generate` of transformers takes: `max_new_tokens`, `generation_config`,
            `do_sample`, `num_beams`, `num_return_sequences`, `streamer`, `stopping_criteria`, …

    Returns:
        What it returns: token ids of prompt and text, (batch × num_return_sequences, tokens).

    Raises:
        ValueError: The head has no text decoder, or the prompts are empty or padded on the right.
    """
    check_text_decoder(model)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not bool(mask[:, -1].all()):
        raise ValueError("attention_mask ends with padding: tokenise prompts with padding_side='left'")
    rows = [ids[seen.bool()].tolist() for ids, seen in zip(input_ids, mask, strict=True)]
    prompts = [model.backbone.text_prompt_of_ids(row, model.config.text.suffix) for row in rows]
    read, hidden_states, memory_mask = read_texts(model, prompts)
    batch = model.field_batch([fields_asked(model, choices, fields)] * len(prompts))
    choose = {"rollouts": rollouts, "pick": pick, "seed": seed, "max_steps": max_steps, "halting": halting}
    refined = refine_rollouts(model, hidden_states, memory_mask, batch, **choose)
    return write(model, prompts, read, refined.answer_latent, batch, **kwargs)


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
def generate_texts(
    model: HybridModel,
    questions: Sequence[str],
    *,
    contexts: Sequence[str | None] | None = None,
    choices: Sequence[str] | None = None,
    fields: Sequence[Field] | None = None,
    chat: bool | None = None,
    stop: Sequence[str] | None = None,
    max_steps: int | None = None,
    halting: str | None = None,
    max_new_tokens: int = 64,
    **kwargs: Any,
) -> list[str]:
    """What the language model writes after each question, in batches of similar length.

    Args:
        model: A head with a text decoder.
        questions: The questions.
        contexts: A context for each.
        choices: Options of a question with one answer; by default those of the head.
        fields: What is asked, when there are several answers.
        chat: Put questions into the chat template; by default as the head was trained.
        stop: Texts before which the answer ends.
        max_steps: Refinement steps at most.
        halting: `learned`, `convergence` or `never`.
        max_new_tokens: Tokens to write at most.
        **kwargs: As in `generate` of transformers.
    """
    check_text_decoder(model)
    asked = fields_asked(model, choices, fields)
    contexts = contexts if contexts is not None else [None] * len(questions)
    all_prompts = text_prompts(model, list(zip(contexts, questions, strict=True)), chat)
    tokenizer, texts = model.backbone.tokenizer, {}
    for rows in length_batches([len(prompt.reading.token_ids) for prompt in all_prompts], TOKEN_BUDGET):
        prompts = [all_prompts[row] for row in rows]
        read, hidden_states, memory_mask = read_texts(model, prompts)
        batch = model.field_batch([asked] * len(rows))
        refined = refine_rollouts(
            model, hidden_states, memory_mask, batch, rollouts=1, max_steps=max_steps, halting=halting
        )
        stops = {"stopping_criteria": [_StopTexts(tokenizer, prompts, stop)]} if stop else {}
        latent, length = refined.answer_latent, {"max_new_tokens": max_new_tokens}
        written = write_texts(model, prompts, read, latent, batch, **length, **stops, **kwargs)
        texts |= dict(zip(rows, written, strict=True))
    return [_cut(texts[row], stop or ()) for row in range(len(questions))]


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
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))].rstrip()


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


def read_texts(model: HybridModel, prompts: Sequence[TextPrompt]) -> tuple[PromptPass, Tensor, Tensor]:
    """One pass over some prompts: what generation goes on from, and hidden states and memory mask for the reasoner."""
    read = read_prompts(model.backbone, prompts)
    return read, *model.pad_states([prompt.reading.memory_ids for prompt in prompts], read.states)


def write(
    model: HybridModel,
    prompts: Sequence[TextPrompt],
    read: PromptPass,
    answer_latent: Tensor,
    fields: FieldBatch,
    **kwargs: Any,
) -> Any:
    """`generate` of transformers, from prompts that were read and latents that were refined."""
    backbone = model.backbone
    add_soft_tokens(backbone, read.cache, *_soft_tokens(model, answer_latent.to(model.device), fields))
    config = kwargs.get("generation_config") or backbone.model.generation_config
    numbers = [kwargs.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences")]
    if (copies := max(number or 1 for number in numbers)) > 1:
        read.cache.batch_repeat_interleave(copies)
    reversed_ids = [torch.tensor(prompt.token_ids[::-1]) for prompt in prompts]
    input_ids = nn.utils.rnn.pad_sequence(reversed_ids, batch_first=True).flip(1)
    lengths = torch.tensor([len(ids) for ids in reversed_ids])
    mask = torch.arange(input_ids.shape[1]) >= input_ids.shape[1] - lengths[:, None]
    if config.pad_token_id is None and "pad_token_id" not in kwargs:  # what transformers takes, with a warning
        end = kwargs.get("eos_token_id", config.eos_token_id)
        kwargs["pad_token_id"] = end[0] if isinstance(end, list) else end
    return backbone.model.generate(
        input_ids=input_ids.to(backbone.device),
        attention_mask=mask.long().to(backbone.device),
        cache=read.cache,
        **kwargs,
    )


def write_texts(
    model: HybridModel,
    prompts: Sequence[TextPrompt],
    read: PromptPass,
    answer_latent: Tensor,
    fields: FieldBatch,
    **kwargs: Any,
) -> list[str]:
    """What `write` adds to each prompt, as text without special tokens."""
    output = write(model, prompts, read, answer_latent, fields, **kwargs)
    start = max(len(prompt.token_ids) for prompt in prompts)
    return [
        text.strip() for text in model.backbone.tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
    ]


def _soft_tokens(model: HybridModel, answer_latent: Tensor, fields: FieldBatch) -> tuple[Tensor, Tensor]:
    """Soft tokens, in the backbone's dtype, and the logarithms of their weights."""
    assert model.text_decoder is not None
    num_tape = answer_latent.shape[1] - fields.name_index.shape[1]
    slot_mask = torch.cat([fields.field_mask, fields.field_mask.new_ones(len(answer_latent), num_tape)], dim=1)
    soft, log_weights = model.text_decoder(answer_latent, slot_mask)
    return soft.to(model.backbone.dtype), log_weights


# -- likelihoods ---------------------------------------------------------------------------------------------------


def text_log_likelihoods(
    model: HybridModel,
    texts: Sequence[tuple[str | None, str]],
    continuations: Sequence[str],
    *,
    choices: Sequence[str] | None = None,
    fields: Sequence[Field] | None = None,
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
        choices: Options of a question with one answer; by default those of the head.
        fields: What is asked, when there are several answers.
        chat: Put questions into the chat template; by default as the head was trained.
        suffix: What follows the question in the prompt; by default as the head was trained.
        max_steps: Refinement steps at most.
        halting: `learned`, `convergence` or `never`.
    """
    check_text_decoder(model)
    asked = fields_asked(model, choices, fields)
    all_prompts, tokenizer = text_prompts(model, texts, chat, suffix), model.backbone.tokenizer
    encoded = tokenizer(list(continuations), add_special_tokens=False)["input_ids"]
    if not all(encoded):
        raise ValueError(f"continuation {encoded.index([])} is empty: its likelihood is not defined")
    found: dict[int, tuple[float, bool]] = {}
    for rows in length_batches([len(prompt.reading.token_ids) for prompt in all_prompts], TOKEN_BUDGET):
        with torch.inference_mode():
            prompts = [all_prompts[row] for row in rows]
            read, hidden_states, memory_mask = read_texts(model, prompts)
            batch = model.field_batch([asked] * len(rows))
            refined = refine_rollouts(
                model, hidden_states, memory_mask, batch, rollouts=1, max_steps=max_steps, halting=halting
            )
            latent = refined.answer_latent.to(model.device)
            losses, greedy = continuation_losses(model, read, latent, batch, [encoded[row] for row in rows])
        sums = -losses.sum(1)
        found |= {row: (float(sums[i]), bool(greedy[i])) for i, row in enumerate(rows)}
    return [found[row] for row in range(len(texts))]


def continuation_losses(
    model: HybridModel, read: PromptPass, answer_latent: Tensor, fields: FieldBatch, token_ids: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Next-token loss of a continuation of each prompt, with gradient to the answer latent.

    Returns:
        Losses in nats, zero at padding, (batch, tokens), and whether greedy decoding writes it, (batch,).
    """
    rows = [torch.tensor(ids, dtype=torch.long) for ids in token_ids]
    labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED).to(model.device)
    soft, log_weights = _soft_tokens(model, answer_latent, fields)
    logits = next_token_logits(model.backbone, read, soft, log_weights, labels.clamp(min=0)).float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    greedy = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
    return losses.view_as(labels), greedy


def answer_text_loss(
    model: HybridModel, answer_latent: Tensor, fields: FieldBatch, examples: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """The loss of writing each example's answer, a mean over its tokens, and whether it would be written; (batch,)."""
    prompts = text_prompts(model, [(example.context, example.question) for example in examples])
    read = read_prompts(model.backbone, prompts, with_states=False)
    token_ids = answer_token_ids(model, examples)
    losses, greedy = continuation_losses(model, read, answer_latent, fields, token_ids)
    lengths = torch.tensor([len(ids) for ids in token_ids], device=losses.device)
    return losses.sum(1) / lengths, greedy


def answer_token_ids(model: HybridModel, examples: Sequence[Example]) -> list[list[int]]:
    """Tokens of each example's answer in words, up to the end of the text."""
    settings, tokenizer = model.config.text, model.backbone.tokenizer
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
    answers = {field.name: answer for field, answer in zip(example.fields, example.answers, strict=True)}
    if settings.answer is None:
        listed = ", ".join(f"{name}: {answer}" for name, answer in answers.items())
        return listed if len(answers) > 1 else example.answers[0]
    try:
        return settings.answer.format_map(answers)
    except KeyError as error:
        raise ValueError(f"text.answer={settings.answer!r} names {error}: the fields are {list(answers)}") from None


# -- texts that are to stay as they are ----------------------------------------------------------------------------


@torch.inference_mode()
def own_texts(backbone: Backbone, number: int, num_tokens: int, seed: int, batch_size: int = 64) -> list[list[int]]:
    """Texts that the frozen model writes by itself, sampled from its own distribution after a random first token.

    Returns:
        Token ids, `num_tokens` + 1 each, behind the special tokens that the model begins with.
    """
    model: Any = backbone.model
    texts: list[list[int]] = []
    with torch.random.fork_rng(devices=[] if backbone.device.type == "cpu" else [backbone.device]):
        torch.manual_seed(seed)
        first = torch.randint(len(backbone.tokenizer), (number,))
        for batch in first.split(batch_size):
            prompts = torch.tensor([backbone.special_prefix + [token] for token in batch.tolist()])
            output = model.generate(
                input_ids=prompts.to(backbone.device),
                attention_mask=torch.ones_like(prompts).to(backbone.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
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
    latent = refine_rollouts(model, hidden_states, memory_mask, batch, rollouts=1).answer_latent
    losses, _ = continuation_losses(
        model, read, latent.clone().to(model.device), batch, [text[half:] for text in texts]
    )
    return losses.mean()
