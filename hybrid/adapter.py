"""Hidden states to memory: the learned projection between the frozen model and the reasoner."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hybrid.layers import Attention, SwiGLU, rms_norm

MIN_DEVIATION = 1e-4  # of a dimension that is read
VARIANCE_FLOOR = 0.03  # of a direction that is whitened, so that what hardly varies is not blown up


class Adapter(nn.Module):
    """Projects hidden states of one or several layers to the memory that the reasoner reads.

    Every dimension of every layer is first standardised with statistics of the training set (`fit_statistics`): a few
    dimensions of a language model's states are huge and nearly constant, and would drown the others. Then the layers
    are mixed, projected to `dim` and scaled to unit root mean square. With `whiten`, the dimensions of a layer are
    decorrelated in between.

    Args:
        kind: `linear`, `mlp` or `resampler`.
        layer_mix: `concat` or `weighted_sum`.
        whiten: Decorrelate the dimensions of each layer.
        num_layers: Layers per token in the input.
        backbone_dim: Width of the input.
        dim: Width of the memory.
        num_heads: Attention heads of the resampler.
        num_vectors: Vectors that the resampler makes.
        dropout: Dropout on whole memory vectors in training.
    """

    center: Tensor
    inverse_scale: Tensor
    whitening: Tensor | None

    def __init__(
        self,
        *,
        kind: str = "linear",
        layer_mix: str = "concat",
        whiten: bool = False,
        num_layers: int,
        backbone_dim: int,
        dim: int,
        num_heads: int = 8,
        num_vectors: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.dropout = dropout
        self.register_buffer("center", torch.zeros(num_layers, backbone_dim))
        self.register_buffer("inverse_scale", torch.ones(num_layers, backbone_dim))
        whitening = torch.eye(backbone_dim).repeat(num_layers, 1, 1) if whiten else None
        self.register_buffer("whitening", whitening)
        self.mix_logits = nn.Parameter(torch.zeros(num_layers)) if layer_mix == "weighted_sum" else None
        self.projection = nn.Linear(backbone_dim * (1 if layer_mix == "weighted_sum" else num_layers), dim, bias=False)
        self.mlp = SwiGLU(dim, 2 * dim) if kind == "mlp" else None
        self.resampler = Resampler(dim, num_heads, num_vectors) if kind == "resampler" else None

    @torch.no_grad()
    def fit_statistics(self, hidden_states: Float[Tensor, "tokens layers backbone_dim"]) -> None:
        """Take what standardises, and whitens, each layer from a sample of the training set's tokens."""
        states = hidden_states.float()
        self.center.copy_(states.mean(0))
        deviation = states.std(0)  # what is the same everywhere says nothing, and would be huge where it differs once
        self.inverse_scale.copy_(torch.where(deviation < MIN_DEVIATION, 0.0, 1 / deviation.clamp(min=MIN_DEVIATION)))
        if self.whitening is not None:
            scaled = ((states - self.center) * self.inverse_scale).transpose(0, 1)  # (layers, tokens, backbone_dim)
            variances, directions = torch.linalg.eigh(scaled.mT @ scaled / len(states))
            self.whitening.copy_(directions / (variances.clamp(min=0) + VARIANCE_FLOOR).sqrt().unsqueeze(1))

    def forward(
        self, hidden_states: Float[Tensor, "batch tokens layers backbone_dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch vectors dim"], Bool[Tensor, "batch vectors"]]:
        """Memory, and which of its vectors exist (`vectors` is `tokens` but for the resampler)."""
        scaled = (hidden_states - self.center) * self.inverse_scale
        if self.whitening is not None:
            scaled = torch.einsum("btld,lde->btle", scaled, self.whitening)
        if self.mix_logits is not None:
            mixed = torch.einsum("btld,l->btd", scaled, self.mix_logits.softmax(0))
        else:
            mixed = scaled.flatten(2)
        memory = rms_norm(self.projection(mixed))
        if self.mlp is not None:
            memory = rms_norm(memory + self.mlp(memory))
        if self.resampler is not None:
            memory = self.resampler(memory, mask)
            mask = mask.new_ones(memory.shape[:2])
        if self.training and self.dropout > 0:
            kept = mask & (torch.rand(mask.shape, device=mask.device) >= self.dropout)
            mask = torch.where(kept.any(1, keepdim=True), kept, mask)  # never hide all of it
        return memory, mask


class Resampler(nn.Module):
    """Compresses a memory of any length to a fixed number of vectors (Perceiver, Jaegle et al. 2021).

    Learned queries read the memory twice, through the same attention that the reasoner uses.
    """

    def __init__(self, dim: int, num_heads: int, num_vectors: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_vectors, dim))
        self.attention = Attention(dim, num_heads)
        self.mlp = SwiGLU(dim, 2 * dim)

    def forward(
        self, memory: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch vectors dim"]:
        """The compressed memory."""
        key, value = self.attention.project_memory(memory)
        vectors = self.queries.expand(len(memory), -1, -1)
        keys_exist = F.pad(mask, (0, vectors.shape[1]), value=True)[:, None, None]
        for _ in range(2):
            vectors = rms_norm(vectors + self.attention(vectors, key, value, keys_exist))
            vectors = rms_norm(vectors + self.mlp(vectors))
        return vectors
