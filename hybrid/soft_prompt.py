"""Soft tokens for the frozen model: one pass over a prompt, and going on from its cache.

Soft tokens lie in the cache between the head of a prompt and its tail, and are no tokens of the text: positions, masks
and all that `generate` counts leave them out. Each has a weight ≥ 0 by which the attention that the text pays to it is
multiplied, so that weights of zero leave the frozen model as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hybrid.backbone import Backbone, TextPrompt


@dataclass
class SoftTokens:
    """Soft tokens of a batch.

    Attributes:
        vectors: In the space of the token embeddings, (batch, soft, backbone_dim).
        log_weights: Logarithms of their weights, -inf for one that the text does not see, (batch, soft).
        exists: Which are no padding, (batch, soft).
    """

    vectors: Tensor
    log_weights: Tensor
    exists: Tensor


class SoftCache(DynamicCache):
    """A cache in which soft tokens lie behind the head of the prompt; its length does not count them.

    Attributes:
        head_mask: Which tokens of the head exist, (batch, head).
        log_weights: Logarithms of the soft tokens' weights, (batch, soft); `None` as long as there are none.
        was_read: Whether a model has read it since.
    """

    def __init__(self, head_mask: Tensor):
        super().__init__()
        self.head_mask, self.log_weights, self.was_read = head_mask, None, False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the text."""
        num_soft = 0 if self.log_weights is None else self.log_weights.shape[1]
        return super().get_seq_length(layer_idx) - num_soft

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, for beams or several sequences."""
        super().batch_repeat_interleave(repeats)
        self.head_mask = self.head_mask.repeat_interleave(repeats, dim=0)
        if self.log_weights is not None:
            self.log_weights = self.log_weights.repeat_interleave(repeats, dim=0)


@dataclass
class PromptPass:
    """A batch of prompts after one pass of the frozen model.

    Attributes:
        cache: What it keeps of the heads, padded on the left.
        tails: The tokens between the soft tokens and what is to be written, (batch, tail).
        states: States of each prompt's memory tokens (tokens, stored_layers, backbone_dim), if asked for.
    """

    cache: SoftCache
    tails: Tensor
    states: list[Tensor]


@torch.no_grad()
def read_prompts(
    backbone: Backbone, prompts: Sequence[TextPrompt], with_states: bool = True, width: int = 0
) -> PromptPass:
    """Read prompts once, for the reasoner and for going on from them.

    Where a reading goes on from the head of its prompt, as the second copy of an echo does, the head is computed once,
    and the rest runs on a copy of the cache up to the highest layer that is read.

    Args:
        backbone: A frozen causal language model.
        prompts: The prompts, which end alike: all with the same number of tokens behind the soft ones.
        with_states: Also return the states that become memory.
        width: Pad prompts on the left to this many tokens, at least.

    Raises:
        ValueError: The backbone writes no text, or the prompts end differently.
    """
    num_tail = prompts[0].num_tail
    if any(prompt.num_tail != num_tail for prompt in prompts):
        raise ValueError(
            "the prompts of this batch end differently, some with the head's text.suffix and some without: "
            "generate from them apart"
        )
    heads = [prompt.token_ids[:-num_tail] for prompt in prompts]
    tails = torch.tensor([prompt.token_ids[-num_tail:] for prompt in prompts], device=backbone.device)
    head_ids, head_mask = pad_left(heads, backbone.device, width - num_tail)
    readings = [prompt.reading for prompt in prompts]
    goes_on = all(r.token_ids[: len(head)] == head for r, head in zip(readings, heads, strict=True))
    layers, cache = backbone.computed_layers if with_states and goes_on else [], SoftCache(head_mask)
    head_states = backbone.run_on(head_ids, head_mask, cache, layers) if head_ids.shape[1] else []
    if not with_states:
        return PromptPass(cache, tails, [])
    if not layers:
        return PromptPass(cache, tails, [state.clone() for state in backbone.hidden_states(readings)])
    rest = [reading.token_ids[len(head) :] for reading, head in zip(readings, heads, strict=True)]
    rest_states: list[Tensor] = []
    if any(rest):
        rest_ids = nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rest], batch_first=True)
        rest_mask = torch.arange(rest_ids.shape[1]) < torch.tensor([len(row) for row in rest])[:, None]
        mask = torch.cat([head_mask, rest_mask.to(backbone.device)], dim=1)
        branch = copy.deepcopy(cache)
        rest_states = backbone.run_on(rest_ids.to(backbone.device), mask, branch, layers, to_the_end=False)
    states, stacked = [], [torch.stack(part, dim=2) if part else None for part in (head_states, rest_states)]
    for row, (reading, head) in enumerate(zip(readings, heads, strict=True)):
        places = slice(head_ids.shape[1] - len(head), None), slice(len(rest[row]))
        parts = [part[row, place] for part, place in zip(stacked, places, strict=True) if part is not None]
        states.append(backbone.stored_states(reading, reading.memory_of(torch.cat(parts)).unbind(1)))
    return PromptPass(cache, tails, states)


def add_soft_tokens(backbone: Backbone, cache: SoftCache, soft: SoftTokens) -> None:
    """Put soft tokens behind the heads in the cache, if there are any."""
    if _read_soft_tokens not in (owner := _owner_of_blocks(backbone))._forward_pre_hooks.values():
        owner.register_forward_pre_hook(_read_soft_tokens, with_kwargs=True)
    if not soft.vectors.shape[1]:
        return
    backbone.encoder(
        inputs_embeds=soft.vectors,
        attention_mask=_soft_bias(cache.head_mask, soft, 0),
        position_ids=_soft_positions(cache, soft),
        cache=cache,
        use_cache=True,
    )
    cache.log_weights = soft.log_weights


def next_token_logits(backbone: Backbone, prompts: PromptPass, soft: SoftTokens, token_ids: Tensor) -> Tensor:
    """Logits of each token of a continuation, given the prompt, the soft tokens and the continuation before it.

    Soft tokens, tail and continuation run in one pass, with gradient to the soft tokens and their weights. The cache
    of `prompts` is used up.

    Args:
        backbone: The frozen model.
        prompts: From `read_prompts`.
        soft: The soft tokens; there may be none.
        token_ids: The continuation, padded on the right, (batch, tokens).

    Returns:
        Tensor of shape (batch, tokens, vocabulary).
    """
    ids = torch.cat([prompts.tails, token_ids[:, :-1]], dim=1)
    head_mask, num_after = prompts.cache.head_mask, ids.shape[1]
    after = head_mask.sum(1, keepdim=True) + torch.arange(num_after, device=ids.device)
    embeddings = backbone.model.get_input_embeddings()(ids).to(soft.vectors.dtype)
    if soft.vectors.shape[1]:
        exists = torch.ones_like(ids, dtype=torch.bool)
        text_bias = _text_bias(head_mask, soft.log_weights, exists, num_after, embeddings.dtype)
        mask = torch.cat([_soft_bias(head_mask, soft, num_after), text_bias], dim=2)
    else:  # as the model itself runs: another kernel rounds otherwise
        mask = torch.cat([head_mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
    output: Any = backbone.model(
        inputs_embeds=torch.cat([soft.vectors, embeddings], dim=1),
        attention_mask=mask,
        position_ids=torch.cat([_soft_positions(prompts.cache, soft), after], dim=1),
        cache=prompts.cache,
        use_cache=True,
    )  # logits of all tokens: a slice of them makes one product a row, with a copy of the vocabulary for each
    return output.logits[:, -token_ids.shape[1] :]


def check_writes(backbone: Backbone) -> None:
    """Refuse a backbone that writes no text, or that cannot be shown soft tokens.

    Raises:
        ValueError: It has no language-model head, sees tokens that come later, attends within a window, or knows
            positions otherwise than by `position_ids`.
    """
    model, config = backbone.model, backbone.model.config.get_text_config()
    embeddings = model.get_input_embeddings()
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    reason = None
    if model.get_output_embeddings() is None or not model.can_generate() or model.config.is_encoder_decoder:
        reason = "it is no causal language model"
    elif "position_ids" not in inspect.signature(backbone.encoder.forward).parameters:
        reason = "it takes no position_ids"
    elif embeddings.weight.shape[1] != backbone.dim:
        reason = f"its embeddings have {embeddings.weight.shape[1]} dimensions and its states {backbone.dim}"
    elif set(kinds) != {"full_attention"}:
        reason = f"some of its layers have {', '.join(sorted(set(kinds) - {'full_attention'}))}"
    elif not backbone.is_causal:
        reason = "its tokens see later ones"
    if reason is not None:
        raise ValueError(f"{backbone.name} cannot serve a text decoder, as {reason}: leave text.enabled=false")


def pad_left(rows: Sequence[list[int]], device: torch.device, width: int = 0, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows padded on the left with `pad`, to `width` at least, and which tokens exist; (batch, tokens) each."""
    width = max(width, *(len(row) for row in rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def _soft_positions(cache: SoftCache, soft: SoftTokens) -> Tensor:
    """All soft tokens stand where the tail begins."""
    return cache.head_mask.sum(1, keepdim=True).expand(-1, soft.vectors.shape[1])


def _soft_bias(head_mask: Tensor, soft: SoftTokens, num_after: int) -> Tensor:
    """What is added to the attention scores of the soft tokens: they see the head, and one another in order.

    Returns:
        Tensor of shape (batch, 1, soft, head + soft + after).
    """
    num_soft, device = soft.exists.shape[1], head_mask.device
    order = torch.arange(num_soft + num_after, device=device)
    itself, earlier = order == order[:num_soft, None], order < order[:num_soft, None]
    exists = nn.functional.pad(soft.exists, (0, num_after))
    among = itself | (earlier & exists[:, None])
    seen = torch.cat([head_mask[:, None].expand(-1, num_soft, -1), among], dim=2)
    return torch.zeros(seen.shape, dtype=soft.vectors.dtype, device=device).masked_fill(~seen, float("-inf"))[:, None]


def _text_bias(
    head_mask: Tensor, log_weights: Tensor, after_mask: Tensor, num_queries: int, dtype: torch.dtype
) -> Tensor:
    """What is added to the attention scores of the text behind the soft tokens: the logarithm of each one's weight.

    Args:
        head_mask: (batch, head).
        log_weights: (batch, soft).
        after_mask: Which tokens behind the soft ones exist, (batch, after).
        num_queries: How many of the last ones ask.
        dtype: Type of the result.

    Returns:
        Tensor of shape (batch, 1, queries, head + soft + after).
    """
    num_after, device = after_mask.shape[1], head_mask.device
    order = torch.arange(num_after, device=device)
    seen = after_mask[:, None] & (order <= order[num_after - num_queries :, None])
    seen = torch.cat([head_mask[:, None].expand(-1, num_queries, -1), seen], dim=2)
    text = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))
    soft = log_weights.to(dtype)[:, None].expand(-1, num_queries, -1)
    num_head = head_mask.shape[1]
    return torch.cat([text[..., :num_head], soft, text[..., num_head:]], dim=2)[:, None]


def _owner_of_blocks(backbone: Backbone) -> nn.Module:
    """The module that runs the blocks and is given the attention mask: some models call it past their base model."""
    owners = [
        module for module in backbone.encoder.modules() for child in module.children() if child is backbone.blocks
    ]
    return owners[0] if owners else backbone.encoder


def _read_soft_tokens(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward hook: let the model, whoever runs it, see the soft tokens of a `SoftCache`."""
    cache = kwargs.get("cache")
    if not isinstance(cache, SoftCache):
        return None
    cache.was_read = True
    inputs = args[0] if args else kwargs.get("input_ids")
    inputs = inputs if inputs is not None else kwargs["inputs_embeds"]
    if (copies := len(inputs) // len(cache.head_mask)) > 1:  # beams, or several sequences a prompt
        cache.batch_repeat_interleave(copies)
    if cache.log_weights is None:
        return None
    mask, head_mask, num_queries = kwargs.get("attention_mask"), cache.head_mask, inputs.shape[1]
    if mask is None:
        mask = head_mask.new_ones(len(head_mask), cache.get_seq_length() + num_queries)
    after_mask, dtype = mask[:, head_mask.shape[1] :].bool(), cache.layers[0].keys.dtype
    return args, kwargs | {"attention_mask": _text_bias(head_mask, cache.log_weights, after_mask, num_queries, dtype)}
