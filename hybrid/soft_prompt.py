"""Soft tokens for the frozen model: one pass over a prompt, and going on from its cache.

Soft tokens lie in the cache between the head of a prompt and its tail, and are no tokens of the text: positions, masks
and everything that `generate` counts leave them out. Each has a weight ≥ 0 by which the attention paid to it is
multiplied, so that weights of zero leave the frozen model as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hybrid.backbone import Backbone, TextPrompt


class SoftCache(DynamicCache):
    """A cache in which soft tokens lie behind the head of the prompt; its length does not count them.

    Attributes:
        head_mask: Which tokens of the head exist, (batch, head).
        log_weights: Logarithms of the soft tokens' weights, (batch, soft); `None` as long as there are none.
    """

    def __init__(self, head_mask: Tensor):
        super().__init__()
        self.head_mask, self.log_weights = head_mask, None

    @property
    def num_soft(self) -> int:
        """How many soft tokens it holds."""
        return 0 if self.log_weights is None else self.log_weights.shape[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the text."""
        return super().get_seq_length(layer_idx) - self.num_soft

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
def read_prompts(backbone: Backbone, prompts: Sequence[TextPrompt], with_states: bool = True) -> PromptPass:
    """Read prompts once, for the reasoner and for going on from them.

    What a prompt and its reading begin with alike is computed once. The rest of the reading (the second copy of an
    echo) runs on a copy of the cache, and stops at the highest layer that the head reads.

    Args:
        backbone: A frozen causal language model.
        prompts: The prompts.
        with_states: Also return the states that become memory.

    Raises:
        ValueError: The backbone writes no text.
    """
    check_writes(backbone)
    device = backbone.device
    shared = [_num_shared(prompt.token_ids[:-1], prompt.reading.token_ids) for prompt in prompts]
    num_tail = max(len(prompt.token_ids) - length for prompt, length in zip(prompts, shared, strict=True))
    heads = [prompt.token_ids[: max(0, len(prompt.token_ids) - num_tail)] for prompt in prompts]
    tails = torch.tensor([prompt.token_ids[-num_tail:] for prompt in prompts], device=device)
    head_ids, head_mask = _pad([list(reversed(head)) for head in heads], device)
    head_ids, head_mask = head_ids.flip(1), head_mask.flip(1)
    layers = backbone.stored_layers if with_states else []
    cache = SoftCache(head_mask)
    head_states = backbone.run_on(head_ids, head_mask, cache, layers) if head_ids.shape[1] else []
    if not with_states:
        return PromptPass(cache, tails, [])
    rest = [prompt.reading.token_ids[len(head) :] for prompt, head in zip(prompts, heads, strict=True)]
    rest_ids, rest_mask = _pad(rest, device)
    rest_states: list[Tensor] = []
    if layers and rest_ids.shape[1]:
        branch, mask = copy.deepcopy(cache), torch.cat([head_mask, rest_mask], dim=1)
        rest_states = backbone.run_on(rest_ids, mask, branch, layers, to_the_end=False)
    states = []
    for row, prompt in enumerate(prompts):
        reading, padding = prompt.reading, head_ids.shape[1] - len(heads[row])
        parts = [torch.empty(0 if layers else reading.memory_stop, len(layers), backbone.dim, dtype=backbone.dtype)]
        parts += [torch.stack(head_states, dim=2)[row, padding:]] if head_states else []
        parts += [torch.stack(rest_states, dim=2)[row, : len(rest[row])]] if rest_states else []
        states.append(torch.cat([part.to(device) for part in parts])[reading.memory_start : reading.memory_stop])
    return PromptPass(cache, tails, states)


def add_soft_tokens(backbone: Backbone, cache: SoftCache, soft: Tensor, log_weights: Tensor) -> None:
    """Put soft tokens behind the heads in the cache.

    Args:
        backbone: The frozen model.
        cache: From `read_prompts`.
        soft: (batch, soft, backbone_dim), in the space of the token embeddings.
        log_weights: (batch, soft), -inf for a soft token that nobody sees.
    """
    _watch_soft_tokens(backbone)
    bias = _soft_bias(cache.head_mask, log_weights, 0, soft.dtype)
    backbone._encoder(
        inputs_embeds=soft, attention_mask=bias, position_ids=_soft_positions(cache, soft), cache=cache, use_cache=True
    )
    cache.log_weights = log_weights


def next_token_logits(
    backbone: Backbone, prompts: PromptPass, soft: Tensor, log_weights: Tensor, token_ids: Tensor
) -> Tensor:
    """Logits of each token of a continuation, given the prompt, the soft tokens and the continuation before it.

    Soft tokens, tail and continuation run in one pass, with gradient to `soft` and `log_weights`. The cache of
    `prompts` is used up.

    Args:
        backbone: The frozen model.
        prompts: From `read_prompts`.
        soft: (batch, soft, backbone_dim).
        log_weights: (batch, soft).
        token_ids: The continuation, padded on the right, (batch, tokens).

    Returns:
        Tensor of shape (batch, tokens, vocabulary).
    """
    ids = torch.cat([prompts.tails, token_ids[:, :-1]], dim=1)
    inputs = torch.cat([soft, backbone.embed_tokens(ids).to(soft.dtype)], dim=1)
    head_mask, num_after = prompts.cache.head_mask, ids.shape[1]
    soft_bias = _soft_bias(head_mask, log_weights, num_after, soft.dtype)
    text_bias = _text_bias(head_mask, log_weights, torch.ones_like(ids, dtype=torch.bool), num_after, soft.dtype)
    after = head_mask.sum(1, keepdim=True) + torch.arange(num_after, device=ids.device)
    output: Any = backbone.model(
        inputs_embeds=inputs,
        attention_mask=torch.cat([soft_bias, text_bias], dim=2),
        position_ids=torch.cat([_soft_positions(prompts.cache, soft), after], dim=1),
        cache=prompts.cache,
        use_cache=True,
    )  # logits of all tokens: a slice of them makes one product a row, with a copy of the vocabulary for each
    return output.logits[:, -token_ids.shape[1] :]


def check_writes(backbone: Backbone) -> None:
    """Refuse a backbone that writes no text.

    Raises:
        ValueError: It is an encoder, or has no language-model head.
    """
    if backbone.model.get_output_embeddings() is None or not backbone.model.can_generate():
        raise ValueError(f"{backbone.name} writes no text: a text decoder needs a causal language model")


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the right, and which tokens exist."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def _soft_positions(cache: SoftCache, soft: Tensor) -> Tensor:
    """All soft tokens stand where the tail begins."""
    return cache.head_mask.sum(1, keepdim=True).expand(-1, soft.shape[1])


def _soft_bias(head_mask: Tensor, log_weights: Tensor, num_after: int, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores of the soft tokens: they see the head, and one another in order.

    Returns:
        Tensor of shape (batch, 1, soft, head + soft + after).
    """
    num_soft, device = log_weights.shape[1], head_mask.device
    order = torch.arange(num_soft + num_after, device=device)
    among = (order <= order[:num_soft, None]).expand(len(head_mask), -1, -1)
    seen = torch.cat([head_mask[:, None].expand(-1, num_soft, -1), among], dim=2)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))[:, None]


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


def _watch_soft_tokens(backbone: Backbone) -> None:
    """Let the model see the soft tokens of a `SoftCache`, whoever runs it."""
    if _see_soft_tokens not in backbone._encoder._forward_pre_hooks.values():
        backbone._encoder.register_forward_pre_hook(_see_soft_tokens, with_kwargs=True)


def _see_soft_tokens(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward hook: widen a mask over the text to one that holds the soft tokens, too."""
    cache = kwargs.get("cache")
    if not isinstance(cache, SoftCache) or cache.log_weights is None:
        return None
    inputs = args[0] if args else kwargs.get("input_ids")
    num_queries = (inputs if inputs is not None else kwargs["inputs_embeds"]).shape[1]
    mask, head_mask, log_weights = kwargs.get("attention_mask"), cache.head_mask, cache.log_weights
    if mask is None:
        mask = head_mask.new_ones(len(head_mask), cache.get_seq_length() + num_queries)
    dtype = module.get_input_embeddings().weight.dtype
    after_mask = mask[:, head_mask.shape[1] :].bool()
    return args, kwargs | {"attention_mask": _text_bias(head_mask, log_weights, after_mask, num_queries, dtype)}
