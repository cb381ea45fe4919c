"""The recursive reasoner: one small network, applied many times to a latent answer.

In the family of HRM (Wang et al. 2025, arXiv:2506.21734) and TRM (Jolicoeur-Martineau 2025, arXiv:2510.04871). The
caller owns the outer loop: it holds a `ReasonerState`, asks for one refinement step at a time, and decides who halts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hybrid.layers import Attention, SwiGLU, rms_norm, rotation


@dataclass
class ReasonerState:
    """What one refinement step hands to the next; always detached."""

    y: Float[Tensor, "batch slots dim"]  # answer latent
    z: Float[Tensor, "batch slots dim"]  # scratch latent

    def select(self, rows: Tensor) -> ReasonerState:
        """The state of some rows."""
        return ReasonerState(self.y[rows], self.z[rows])


@dataclass
class ProjectedMemory:
    """What every pass of a network reads beside the slots.

    Attributes:
        keys: Keys of the memory, for every layer.
        values: Values of the memory, for every layer.
        mask: Which keys exist (memory, then slots); `None` if all do.
        turn: Rotary positions of the slots, if there are any.
    """

    keys: list[Float[Tensor, "batch heads tokens head_dim"]]
    values: list[Float[Tensor, "batch heads tokens head_dim"]]
    mask: Bool[Tensor, "batch 1 1 keys"] | None
    turn: tuple[Tensor, Tensor] | None = None

    def select(self, rows: Tensor) -> ProjectedMemory:
        """The memory of some rows."""
        mask = self.mask[rows] if self.mask is not None else None
        turn = (self.turn[0][rows], self.turn[1][rows]) if self.turn is not None else None
        return ProjectedMemory([key[rows] for key in self.keys], [value[rows] for value in self.values], mask, turn)


class ReasonerLayer(nn.Module):
    """Attention over memory and slots, then SwiGLU; normalised after each, so that states keep their scale."""

    def __init__(self, dim: int, num_heads: int, intermediate_size: int, dropout: float):
        super().__init__()
        self.attention = Attention(dim, num_heads)
        self.mlp = SwiGLU(dim, intermediate_size)
        self.dropout = dropout

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, turn: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Update the slots; shapes as in `Attention.forward`."""
        x = rms_norm(x + F.dropout(self.attention(x, key, value, mask, turn), self.dropout, self.training))
        return rms_norm(x + F.dropout(self.mlp(x), self.dropout, self.training))


class ReasonerNetwork(nn.Module):
    """The two-layer network; one application is one pass."""

    def __init__(self, dim: int, num_heads: int, intermediate_size: int, num_layers: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(
            ReasonerLayer(dim, num_heads, intermediate_size, dropout) for _ in range(num_layers)
        )

    def project_memory(
        self,
        memory: Tensor,
        mask: Tensor | None,
        memory_turn: tuple[Tensor, Tensor] | None = None,
        slot_turn: tuple[Tensor, Tensor] | None = None,
    ) -> ProjectedMemory:
        """Keys and values of the memory, to be shared by all passes."""
        layers = cast(Iterable[ReasonerLayer], self.layers)
        pairs = [layer.attention.project_memory(memory, memory_turn) for layer in layers]
        return ProjectedMemory([key for key, _ in pairs], [value for _, value in pairs], mask, slot_turn)

    def forward(
        self, x: Float[Tensor, "batch slots dim"], memory: ProjectedMemory
    ) -> Float[Tensor, "batch slots dim"]:
        """One pass."""
        for layer, key, value in zip(self.layers, memory.keys, memory.values, strict=True):
            x = layer(x, key, value, memory.mask, memory.turn)
        return x


class RecursiveReasoner(nn.Module):
    """Refines an answer latent y and a scratch latent z by recursion over one shared network.

    Args:
        dim: Width of the slots.
        num_heads: Attention heads.
        intermediate_size: Width of the SwiGLU layers.
        num_layers: Layers of the network.
        num_latent_passes: Updates of z in a cycle (n); 0 leaves a single pass in a cycle, for heads without recursion.
        num_cycles: Cycles in a refinement step (T).
        num_gradient_cycles: Cycles at the end of a refinement step that carry gradient.
        tie_levels: One network for z and y, or one each.
        rotary: Whether attention knows positions.
        dropout: Dropout in training.
    """

    initial_y: Tensor
    initial_z: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int = 8,
        intermediate_size: int,
        num_layers: int = 2,
        num_latent_passes: int = 3,
        num_cycles: int = 3,
        num_gradient_cycles: int = 1,
        tie_levels: bool = True,
        rotary: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.head_dim, self.rotary = dim // num_heads, rotary
        self.num_latent_passes, self.num_cycles = num_latent_passes, num_cycles
        self.num_gradient_cycles = num_gradient_cycles
        self.networks = nn.ModuleList(
            ReasonerNetwork(dim, num_heads, intermediate_size, num_layers, dropout)
            for _ in range(1 if tie_levels else 2)
        )
        # Fixed random starting points, as in HRM: the network learns to move away from them.
        self.register_buffer("initial_y", torch.empty(dim))
        self.register_buffer("initial_z", torch.empty(dim))
        self.reset_initial_state()

    def reset_initial_state(self) -> None:
        """Draw the starting points anew."""
        nn.init.trunc_normal_(self.initial_y)
        nn.init.trunc_normal_(self.initial_z)

    def project_memory(
        self,
        memory: Float[Tensor, "batch tokens dim"],
        memory_mask: Bool[Tensor, "batch tokens"],
        slot_mask: Bool[Tensor, "batch slots"],
        slot_positions: Int[Tensor, "batch slots"] | None = None,
    ) -> list[ProjectedMemory]:
        """Keys and values of the memory for each network, computed once and read by every pass.

        Args:
            memory: The memory; its vectors stand at positions 0, 1, 2, …
            memory_mask: Which of its vectors exist.
            slot_mask: Which slots exist.
            slot_positions: Where the slots stand, needed with `rotary`.
        """
        mask = torch.cat([memory_mask, slot_mask], dim=1)
        keys_exist = None if bool(mask.all()) else mask[:, None, None]
        memory_turn = slot_turn = None
        if self.rotary:
            assert slot_positions is not None, "rotary positions need slot_positions"
            memory_positions = torch.arange(memory.shape[1], device=memory.device)[None]
            memory_turn, slot_turn = rotation(memory_positions, self.head_dim), rotation(slot_positions, self.head_dim)
        networks = cast(Iterable[ReasonerNetwork], self.networks)
        return [network.project_memory(memory, keys_exist, memory_turn, slot_turn) for network in networks]

    def initial_state(
        self, slots: Float[Tensor, "batch slots dim"], noise: Float[Tensor, "slots dim"] | float = 0.0
    ) -> ReasonerState:
        """The state before the first refinement step.

        Args:
            slots: What each slot stands for.
            noise: Added to z: the noise itself, the same for all rows, or its standard deviation, drawn for each row.
        """
        y, z = self.initial_y.expand_as(slots), self.initial_z.expand_as(slots)
        if isinstance(noise, Tensor):
            z = z + noise.to(z)
        elif noise > 0:
            z = z + noise * torch.randn_like(slots)
        return ReasonerState(y, z)

    # -- the algorithm ---------------------------------------------------------------------------------------------

    def refine_once(
        self, slots: Tensor, memory: list[ProjectedMemory], state: ReasonerState, num_latent_passes: int
    ) -> ReasonerState:
        """One cycle: update the scratch latent several times, then the answer latent once."""
        (z_network, z_memory), (y_network, y_memory) = self._levels(memory)
        x, y, z = slots, state.y, state.z
        for _ in range(num_latent_passes):  # n
            z = z_network(x + y + z, z_memory)
        y = y_network(y + z if num_latent_passes else x + y + z, y_memory)
        return ReasonerState(y, z)

    def refinement_step(
        self,
        slots: Float[Tensor, "batch slots dim"],
        memory: list[ProjectedMemory],
        state: ReasonerState,
        num_latent_passes: int | None = None,
        num_cycles: int | None = None,
    ) -> tuple[ReasonerState, Float[Tensor, "batch slots dim"]]:
        """Deep recursion, with gradient through the last cycle only (or the last `num_gradient_cycles`).

        Args:
            slots: What each slot stands for (x): the field's vector, or the tape slot's own.
            memory: From `project_memory`.
            state: From the step before, or `initial_state`.
            num_latent_passes: Overrides the module's number (n).
            num_cycles: Overrides the module's number (T).

        Returns:
            The detached state for the next step, and the answer latent with gradient.
        """
        num_latent_passes = self.num_latent_passes if num_latent_passes is None else num_latent_passes
        num_cycles = self.num_cycles if num_cycles is None else num_cycles
        num_free = max(0, num_cycles - self.num_gradient_cycles)
        with torch.no_grad():
            for _ in range(num_free):
                state = self.refine_once(slots, memory, state, num_latent_passes)
        for _ in range(num_cycles - num_free):
            state = self.refine_once(slots, memory, state, num_latent_passes)
        return ReasonerState(state.y.detach(), state.z.detach()), state.y

    def _levels(self, memory: list[ProjectedMemory]) -> tuple:
        """The network and memory of z, then those of y: the same pair when levels are tied."""
        levels = list(zip(self.networks, memory, strict=True))
        return levels[0], levels[-1]


# -- halting -------------------------------------------------------------------------------------------------------


def state_movement(
    y: Float[Tensor, "batch slots dim"],
    previous_y: Float[Tensor, "batch slots dim"],
    slot_mask: Bool[Tensor, "batch slots"],
) -> Float[Tensor, " batch"]:
    """How far a refinement step moved the answer latent, relative to its length, over the slots that exist."""
    weight = slot_mask.unsqueeze(-1).float()
    moved = ((y.float() - previous_y.float()) * weight).flatten(1).norm(dim=1)
    return moved / (y.float() * weight).flatten(1).norm(dim=1)


def has_halted(
    halting: str,
    halt_logits: Float[Tensor, " batch"],
    y: Float[Tensor, "batch slots dim"],
    previous_y: Float[Tensor, "batch slots dim"],
    slot_mask: Bool[Tensor, "batch slots"],
    tolerance: float,
) -> Bool[Tensor, " batch"]:
    """Which rows stop after this refinement step.

    `learned`: the q head says that all fields are right (q > 0). `convergence`: the answer latent moved by less than
    `tolerance` of its own length, over the slots that exist. `never`: none.
    """
    if halting == "learned":
        return halt_logits > 0
    if halting == "convergence":
        return state_movement(y, previous_y, slot_mask) < tolerance
    if halting == "never":
        return torch.zeros_like(halt_logits, dtype=torch.bool)
    raise ValueError(f"halting={halting!r}: expected 'learned', 'convergence' or 'never'")
