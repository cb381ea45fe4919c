"""The few layers that adapter, reasoner and decoder share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

NORM_EPSILON = 1e-5


def rms_norm(x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
    """Scale vectors to unit root mean square, without learned gain (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPSILON)


def init_linear_(module: nn.Module) -> None:
    """The one initialisation of the project: fan-in scaled, truncated normal weights (LeCun), zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            std = layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def rotation(
    positions: Int[Tensor, "batch length"], head_dim: int, base: float = 1000.0
) -> tuple[Float[Tensor, "batch 1 length quarter"], Float[Tensor, "batch 1 length quarter"]]:
    """Cosines and sines of rotary positions (Su et al. 2021, arXiv:2104.09864) for half of a head's width.

    The other half stays free of position, so that what a token is can be compared wherever it stands.
    """
    quarter = head_dim // 4
    frequencies = base ** -(torch.arange(quarter, device=positions.device) / quarter)
    angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch heads length head_dim"], cosines_and_sines: tuple[Tensor, Tensor] | None
) -> Float[Tensor, "batch heads length head_dim"]:
    """Turn queries or keys by their positions; `None` leaves them."""
    if cosines_and_sines is None:
        return x
    cosine, sine = (table.to(x.dtype) for table in cosines_and_sines)
    quarter = cosine.shape[-1]
    first, second, rest = x.split([quarter, quarter, x.shape[-1] - 2 * quarter], dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine, rest], dim=-1)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv:2002.05202); gate and up projection are one product."""

    def __init__(self, dim: int, intermediate_size: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, dim, bias=False)

    def forward(self, x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        """Transform each vector by itself; the shape stays."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Attention(nn.Module):
    """Multi-head attention of slots over memory and slots, in one softmax.

    Queries come from the slots; keys and values from the memory (projected once, by `project_memory`, and handed in)
    followed by the slots themselves, both through the same weights.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def _heads(self, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch heads length head_dim"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project_memory(
        self, memory: Float[Tensor, "batch tokens dim"], turn: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "batch heads tokens head_dim"], Float[Tensor, "batch heads tokens head_dim"]]:
        """Keys, turned by their positions, and values of the memory."""
        dim = memory.shape[-1]
        key, value = F.linear(memory, self.query_key_value.weight[dim:]).chunk(2, dim=-1)
        return rotate(self._heads(key), turn).contiguous(), self._heads(value).contiguous()

    def forward(
        self,
        x: Float[Tensor, "batch slots dim"],
        memory_key: Float[Tensor, "batch heads tokens head_dim"],
        memory_value: Float[Tensor, "batch heads tokens head_dim"],
        mask: Bool[Tensor, "batch 1 1 keys"] | None,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch slots dim"]:
        """Attend; `mask` is true at the keys (memory, then slots) that exist, `turn` the `rotation` of the slots."""
        query, key, value = map(self._heads, self.query_key_value(x).chunk(3, dim=-1))
        query, key = rotate(query, turn), rotate(key, turn)
        if x.device.type == "cpu":
            attended = _attend_by_products(query, (memory_key, key), (memory_value, value), mask)
        else:
            key, value = torch.cat([memory_key, key], dim=2), torch.cat([memory_value, value], dim=2)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(attended.transpose(1, 2).flatten(2))


def _attend_by_products(
    query: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """Softmax attention over two groups of keys. With few queries, twice as fast on a CPU as its fused kernel."""
    query = query * query.shape[-1] ** -0.5
    scores = torch.cat([query @ key.transpose(-2, -1) for key in keys], dim=-1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1).split([key.shape[2] for key in keys], dim=-1)
    return weights[0] @ values[0] + weights[1] @ values[1]
