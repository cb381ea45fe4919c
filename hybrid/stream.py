"""The rows of a batch: which example each holds, what it sees next, and the depths that are drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hybrid.reasoner import ReasonerState

MASTERY_ROWS = 1000  # rows over which the curriculum follows the share of right answers


class RowStream:
    """Which example each row of the global batch sees next.

    Row `i` draws positions `i, i + B, i + 2B, …` of an endless stream of shuffled epochs, so what a row sees does not
    depend on the other rows, on accumulation or on the number of processes.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self._epochs: dict[int, np.ndarray] = {}

    def example(self, row: int, draw: int) -> int:
        """Number of the example that row `row` sees as its `draw`-th."""
        epoch, position = divmod(draw * self.batch_size + row, self.num_examples)
        if epoch not in self._epochs:
            if len(self._epochs) > 3:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
        return int(self._epochs[epoch][position])

    def min_steps(self, row: int, draw: int, exploration: float, max_steps: int) -> int:
        """Steps that this example must run before it may halt: random for a fraction `exploration`, else 1."""
        generator = np.random.default_rng([self.seed, 1, row, draw])
        return int(generator.integers(2, max_steps + 1)) if max_steps > 1 and generator.random() < exploration else 1


class CarriedRows:
    """The rows of one process: which example each holds, for how many steps, and its reasoner state."""

    def __init__(
        self, stream: RowStream, rows: range, num_slots: int, dim: int, device: torch.device, dtype: torch.dtype
    ):
        self.stream, self.rows = stream, rows
        self.draws = torch.full((len(rows),), -1)
        self.steps = torch.zeros(len(rows), dtype=torch.long)
        self.min_steps = torch.ones(len(rows), dtype=torch.long)
        self.halted = torch.ones(len(rows), dtype=torch.bool)
        self.y = torch.zeros(len(rows), num_slots, dim, device=device, dtype=dtype)
        self.z = torch.zeros_like(self.y)

    def refill(self, exploration: float, max_steps: int, accepts: Callable[[int], bool]) -> None:
        """Give each halted row its next example; `halted` then marks the rows whose state starts anew.

        Args:
            exploration: Fraction of examples with a random minimum of steps.
            max_steps: Refinement steps at most.
            accepts: Whether an example may be drawn now; others are passed over.
        """
        for index in self.halted.nonzero().flatten().tolist():
            draw = int(self.draws[index]) + 1
            while not accepts(self.stream.example(self.rows[index], draw)):
                draw += 1
            self.draws[index], self.steps[index] = draw, 0
            self.min_steps[index] = self.stream.min_steps(self.rows[index], draw, exploration, max_steps)

    def examples(self) -> list[int]:
        """Number of the example that each row holds."""
        return [self.stream.example(row, draw) for row, draw in zip(self.rows, self.draws.tolist(), strict=True)]

    def ending(self, part: Tensor, wants: Tensor, max_steps: int) -> Tensor:
        """Which rows are done with the step under way: those that want to halt and may, or must."""
        steps = self.steps[part] + 1
        return wants & (steps >= self.min_steps[part]) | (steps >= max_steps)

    def advance(self, part: Tensor, state: ReasonerState, wants: Tensor, max_steps: int) -> None:
        """Keep the new state and mark the rows that are done."""
        num_slots = state.y.shape[1]
        self.y[part, :num_slots], self.z[part, :num_slots] = state.y, state.z
        self.halted[part] = self.ending(part, wants, max_steps)
        self.steps[part] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on."""
        names = ("draws", "steps", "min_steps", "halted", "y", "z")
        return {name: getattr(self, name).clone() for name in names}


class Curriculum:
    """Which depths are drawn: the shallowest first; the next, once the deepest so far is answered well enough.

    Composing two steps is learned once one step is known, at a fraction of the questions. Rows without a depth are
    always drawn.

    Args:
        depths: Depth of each training example.
        threshold: Share of right answers at which the next depth is added; `None` draws all from the start.
    """

    def __init__(self, depths: Sequence[int | None], threshold: float | None):
        self.depths, self.threshold = depths, threshold
        self.levels = sorted({depth for depth in depths if depth is not None})
        if threshold is not None and len(self.levels) < 2:
            warnings.warn(f"training.curriculum={threshold}: rows of several depths are needed: ignored", stacklevel=2)
        self.level = 0 if threshold is not None else max(0, len(self.levels) - 1)
        self.mastery = 0.0

    @property
    def deepest(self) -> int | None:
        """The deepest depth that is drawn."""
        return self.levels[self.level] if self.levels else None

    def accepts(self, example: int) -> bool:
        """Whether a training example may be drawn now."""
        depth = self.depths[example]
        return depth is None or self.deepest is None or depth <= self.deepest

    def record(self, examples: Sequence[int], right: Tensor) -> None:
        """Follow the share of right answers at the deepest level, as a running mean over about `MASTERY_ROWS`."""
        for example, hit in zip(examples, right.tolist(), strict=True):
            if self.depths[example] == self.deepest:
                self.mastery += (hit - self.mastery) / MASTERY_ROWS

    def is_mastered(self) -> bool:
        """Whether the next depth may be added."""
        return self.threshold is not None and self.level + 1 < len(self.levels) and self.mastery > self.threshold

    def deepen(self) -> None:
        """Add the next depth."""
        self.level, self.mastery = self.level + 1, 0.0
