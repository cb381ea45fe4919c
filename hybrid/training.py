"""The training loop: carried states, EMA, checkpoints, resume.

One update is one refinement step for every row of the batch. A row keeps its state from update to update until it
halts; then its place is taken by the next example of its own stream. Because each row draws from its own stream, what
it sees does not depend on the number of processes, unless a curriculum adds a depth as soon as the rows of one of
them are answered well; because noise is seeded by the update, a run resumed on the same number of threads goes on as
if it had never stopped.
"""

from __future__ import annotations

import errno
import json
import math
import reprlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from hybrid.backbone import Backbone, load_backbone, native_dtype
from hybrid.batches import (
    EmbeddedExamples,
    common_fields,
    common_options,
    common_places,
    embed_examples,
    known_options,
)
from hybrid.config import HybridConfig, ReasonerConfig, RunConfig, TrainingConfig, to_plain
from hybrid.data import Example, data_fingerprint, load_examples
from hybrid.decoder import FieldBatch, is_unnamed
from hybrid.evaluation import by_depth, device_name, run_steps, run_text
from hybrid.generation import answer_text, answer_text_loss, keep_loss, own_texts
from hybrid.hub import check_head_folder
from hybrid.losses import IGNORED, all_fields_right
from hybrid.model import HybridModel
from hybrid.parallel import map_in_threads
from hybrid.reasoner import ReasonerState, has_halted

CHECKPOINT = "checkpoint.pt"
MAX_WRITTEN = 200  # validation answers that are written in words at each evaluation
# What a run may have otherwise than the head that it starts from; cycles only if its reasoner is trained.
CYCLES = {"num_cycles", "num_gradient_cycles"}
START_FREE = CYCLES | {
    "dtype", "quantization", "max_steps", "halting", "convergence_tolerance", "dropout", "state_noise",
}  # fmt: skip
NUM_KEPT, KEPT_TOKENS, KEPT_ROWS = 256, 96, 4  # texts of the frozen model's own, their length, how many an update sees
MASTERY_ROWS = 1000  # rows over which the curriculum follows the share of right answers
MIN_PART = 16  # rows of a part below which matrix products get slow
NUM_STATISTICS_TOKENS = 16_384  # training tokens from which the adapter takes means and deviations


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

    def __init__(self, stream: RowStream, rows: range, num_slots: int, dim: int, device: torch.device, dtype: Any):
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


class MasterWeights:
    """Float32 weights, their EMA and the optimizer, for a model that may compute in bfloat16."""

    def __init__(self, model: HybridModel, config: TrainingConfig):
        frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.frozen = {name: parameter.float().clone() for name, parameter in frozen.items()}
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in self.parameters]
        self.ema = [master.detach().clone() for master in self.masters]
        self.config = config
        self.optimizers = self._make_optimizers(model)

    def _make_optimizers(self, model: HybridModel) -> list[torch.optim.Optimizer]:
        """AdamW, or Muon for the weights of linear layers with AdamW for the rest."""
        config, masters = self.config, dict(zip(self.names, self.masters, strict=True))
        linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        linear = [name for name in linear if name in masters and len(masters[name]) > 1]
        muon = [masters.pop(name) for name in linear] if config.optimizer == "muon" else []
        decayed = [master for master in masters.values() if master.ndim > 1]
        plain = [master for master in masters.values() if master.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        ]
        if muon:  # scaled so that AdamW's learning rate and decay serve both (Liu et al. 2025, arXiv:2502.16982)
            rate, decay = config.learning_rate, config.weight_decay
            optimizers.append(torch.optim.Muon(muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        return optimizers

    def add_gradients(self, gradients: Sequence[Tensor | None], share: float) -> None:
        """Add the gradients of a part's mean loss, weighted by its share of the rows; summed in float32."""
        for master, gradient in zip(self.masters, gradients, strict=True):
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            if gradient is not None:
                master.grad.add_(gradient, alpha=share)

    def reduce_gradients(self, accelerator: Accelerator) -> None:
        """Average the gradients over all processes."""
        gradients = [master.grad for master in self.masters if master.grad is not None]
        mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        sizes = [gradient.numel() for gradient in gradients]
        torch._foreach_copy_([gradient.view(-1) for gradient in gradients], list(mean.split(sizes)))

    def update(self, learning_rate: float, num_updates: int) -> float:
        """One optimizer step from the gradients added up; returns the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm, foreach=True)
        if not torch.isfinite(norm):  # before it reaches the weights, and a checkpoint
            raise FloatingPointError(
                f"the gradient is not finite at update {num_updates}: lower training.learning_rate="
                f"{self.config.learning_rate:g} and go on from the last checkpoint with --resume"
            )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
        decay = ema_decay(self.config.ema_decay, num_updates)
        torch._foreach_lerp_(self.ema, [master.detach() for master in self.masters], 1 - decay)
        self._show(self.masters)
        return float(norm)

    @torch.no_grad()
    def _show(self, weights: Sequence[Tensor]) -> None:
        torch._foreach_copy_([parameter.detach() for parameter in self.parameters], [w.detach() for w in weights])

    @contextmanager
    def averaged(self) -> Generator[None]:
        """The model with its EMA weights, for evaluation."""
        self._show(self.ema)
        try:
            yield
        finally:
            self._show(self.masters)

    def head_state(self, model: HybridModel) -> dict[str, Tensor]:
        """The state dict that is saved: EMA weights in float32, what is not trained, and buffers."""
        state = self.frozen | {name: buffer.float() for name, buffer in model.named_buffers()}
        return state | dict(zip(self.names, (weight.clone() for weight in self.ema), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        masters = [master.detach() for master in self.masters]
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"masters": masters, "ema": self.ema, "optimizers": optimizers, "frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for target, source in ((self.masters, state["masters"]), (self.ema, state["ema"])):
            torch._foreach_copy_([weight.detach() for weight in target], source)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.frozen = state.get("frozen", self.frozen)
        self._show(self.masters)


@dataclass
class PartStep:
    """What a refinement step of some rows gives: state, means to log, gradients; who halts, is asked, is right."""

    state: ReasonerState
    means: dict[str, Tensor]
    gradients: Sequence[Tensor | None]
    wants_halt: Tensor
    asked: Tensor
    right: Tensor


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


class Trainer:
    """A training run.

    Args:
        config: The run.
        model: The head, with its backbone attached.
        train: Embedded training examples.
        valid: Embedded validation examples.
        accelerator: Processes and devices.
    """

    def __init__(
        self,
        config: RunConfig,
        model: HybridModel,
        train: EmbeddedExamples,
        valid: EmbeddedExamples,
        accelerator: Accelerator,
    ):
        self.config, self.settings, self.accelerator = config, config.training, accelerator
        self.folder = Path(self.settings.output_folder)
        native = native_dtype(accelerator.device)
        dtype = {"auto": native, "bf16": torch.bfloat16, "fp32": torch.float32}[self.settings.precision]
        self.train, self.valid = train, valid
        self.model = model.to(accelerator.device)
        if accelerator.num_processes > 1:  # machines may differ in the last bit of what they embed or draw
            for tensor in (*model.parameters(), *model.buffers()):
                torch.distributed.broadcast(tensor.data, 0)
        self.weights = MasterWeights(model, self.settings)  # before rounding to bfloat16
        self.model.to(dtype)
        local = self.settings.batch_size // accelerator.num_processes
        self.rows = CarriedRows(
            RowStream(len(train), self.settings.batch_size, self.settings.seed),
            range(accelerator.process_index * local, (accelerator.process_index + 1) * local),
            num_slots(model, train),
            model.config.reasoner.dim,
            accelerator.device,
            dtype,
        )
        self.curriculum = Curriculum([example.depth for example in train.examples], self.settings.curriculum)
        # Threads share one random generator, so with noise the parts run one after the other: a run can be repeated.
        noise = (
            config.reasoner.dropout,
            config.reasoner.state_noise,
            config.adapter.dropout,
            self.settings.feature_noise,
        )
        self.in_threads = accelerator.device.type == "cpu" and not any(noise)
        self.kept: list[list[int]] = []  # texts of the frozen model's own, written when the run begins
        self.num_updates, self.seconds, self.num_bad = 0, 0.0, 0
        self.best_score, self.best_accuracy = (-1.0, 0.0), 0.0  # answers, in words too; of equals, right fields decide
        self.window: dict[str, float] = {}
        self.stop_requested, self.finished = False, False

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> Path | None:
        """Train to the end, or until interrupted; returns the folder of the best head, `None` if interrupted."""
        settings = self.settings
        if settings.keep_loss_weight > 0 and not self.kept:
            self.kept = own_texts(self.model.backbone, NUM_KEPT, KEPT_TOKENS, settings.seed)
        start = time.monotonic() - self.seconds
        bar = tqdm(
            total=settings.num_updates,
            initial=self.num_updates,
            unit="update",
            desc="train",
            disable=not self.accelerator.is_main_process,
        )
        with bar, _interrupt_sets(self):
            while not self.finished and not self.any_process(self.stop_requested):
                self.update()
                self.seconds = time.monotonic() - start
                if self.num_updates % settings.log_every == 0:
                    line = self.log()
                    bar.set_postfix(
                        answer_loss=f"{line['answer_loss']:.3f}", accuracy=f"{line['accuracy']:.3f}", refresh=False
                    )
                self.finished = self.num_updates >= settings.num_updates
                if self.num_updates % settings.eval_every == 0 or self.finished:
                    self.evaluate()
                if self.num_updates % settings.save_every == 0:
                    self.save_checkpoint()
                bar.update()
        self.save_checkpoint()
        if not self.finished:
            self.accelerator.print(f"stopped after update {self.num_updates}, saved; go on with --resume")
        else:
            self.accelerator.print(f"best head: {self.folder / 'best'} (validation accuracy {self.best_accuracy:.3f})")
        self.accelerator.end_training()
        return self.folder / "best" if self.finished else None

    def update(self) -> None:
        """One refinement step for every row, one optimizer step."""
        settings, stage = self.settings, self.stage()
        torch.manual_seed(hash((settings.seed, self.num_updates, self.accelerator.process_index)) % 2**63)
        self.model.train()
        self.rows.refill(settings.halt_exploration, stage.max_steps, self.curriculum.accepts)
        examples = self.rows.examples()
        parts = self._parts([self.train.lengths[example] for example in examples])
        run = map_in_threads if self.in_threads else map
        steps = run(lambda part: self._step(part, [examples[row] for row in part.tolist()], stage), parts)
        for part, step in zip(parts, steps, strict=True):
            share = len(part) / len(examples)
            self.weights.add_gradients(step.gradients, share)
            self.rows.advance(part, step.state, step.wants_halt, stage.max_steps)
            self.curriculum.record([examples[row] for row in part[step.asked].tolist()], step.right[step.asked])
            finished = self.rows.halted[part]
            self._count({name: float(value) for name, value in step.means.items()}, share)
            self._count(
                {"rows_finished": float(finished.sum()), "steps": float(self.rows.steps[part][finished].sum())}
            )
        if self.kept:
            self._add_keep_loss()
        if self.accelerator.num_processes > 1:
            self.weights.reduce_gradients(self.accelerator)
        if self.settings.curriculum is not None and self.any_process(self.curriculum.is_mastered()):
            self.curriculum.deepen()
        rate = learning_rate(settings, self.num_updates)
        self._count({"gradient_norm": self.weights.update(rate, self.num_updates)})
        self.num_updates += 1

    def _add_keep_loss(self) -> None:
        """Add the gradient of leaving some of the frozen model's own texts as they are."""
        drawn = np.random.default_rng([self.settings.seed, 2, self.num_updates, self.accelerator.process_index])
        texts = [self.kept[row] for row in drawn.choice(len(self.kept), KEPT_ROWS, replace=False)]
        fields = self.train.examples[int(drawn.integers(len(self.train)))].fields
        loss = keep_loss(self.model, texts, fields)
        weighted = self.settings.keep_loss_weight * loss
        self.weights.add_gradients(torch.autograd.grad(weighted, self.weights.parameters, allow_unused=True), 1.0)
        self._count({"keep_loss": float(loss.detach())})

    def _parts(self, lengths: Sequence[int]) -> list[Tensor]:
        """The rows in parts of similar length, so that little padding is computed, the longest first.

        On a CPU there are two parts for each thread, if they have `MIN_PART` rows; else as many as accumulation asks.
        """
        num_parts = self.settings.gradient_accumulation_steps
        if self.accelerator.device.type == "cpu":
            num_parts = max(num_parts, min(2 * torch.get_num_threads(), len(lengths) // MIN_PART))
        order = torch.tensor(lengths).argsort(descending=True, stable=True)
        return list(order.chunk(num_parts))

    def _step(self, part: Tensor, examples: Sequence[int], stage: ReasonerConfig) -> PartStep:
        """One refinement step of some rows, with its gradients."""
        rows, settings = self.rows, self.settings
        hidden_states, mask, fields, labels = self.train.batch(self.model, examples, self.train.num_fields)
        due = self.train.due_labels(examples, (rows.steps[part] + 1).tolist(), labels)
        if settings.feature_noise > 0:
            scale = self.model.adapter.inverse_scale
            deviation = torch.where(scale > 0, settings.feature_noise / scale, 0.0)
            hidden_states = hidden_states + deviation.to(hidden_states.dtype) * torch.randn_like(hidden_states)
        output: Any = self.model(
            hidden_states,
            mask,
            fields,
            labels=labels,
            due_labels=due,
            state=ReasonerState(rows.y[part], rows.z[part]),
            fresh=rows.halted[part].to(mask.device),
            num_latent_passes=stage.num_latent_passes,
            num_cycles=stage.num_cycles,
            halt_loss_weight=settings.halt_loss_weight,
            answer_loss_weight=settings.answer_loss_weight,
        )
        fresh = rows.halted[part].to(mask.device)[:, None, None]
        previous_y = torch.where(fresh, self.model.reasoner.initial_y, rows.y[part, : output.state.y.shape[1]])
        signs = output.halt_logits.detach(), output.state.y, previous_y, output.slot_mask, stage.convergence_tolerance
        wants_halt = has_halted(stage.halting, *signs).cpu()
        if self.model.text_decoder is not None:
            ending = rows.ending(part, wants_halt, stage.max_steps)
            self._add_text_loss(output, ending, fields, [self.train.examples[example] for example in examples])
        loss = output.loss.detach()
        if not torch.isfinite(loss):
            names = [self.train.examples[example].id for example in examples[:3]]
            raise FloatingPointError(
                f"the loss is {float(loss)} at update {self.num_updates} (rows {names} …): lower "
                f"training.learning_rate={settings.learning_rate:g} and go on from the last checkpoint with --resume"
            )
        gradients: Sequence[Tensor | None] = [None] * len(self.weights.parameters)
        if output.loss.requires_grad:  # else no text was written, and nothing but the text decoder is trained
            gradients = torch.autograd.grad(output.loss, self.weights.parameters, allow_unused=True)
        asked, right = (due != IGNORED).any(1).cpu(), all_fields_right(output.scores.detach(), due).cpu()
        return PartStep(output.state, {"loss": loss, **output.metrics}, gradients, wants_halt, asked, right)

    def _add_text_loss(self, output: Any, ending: Tensor, fields: FieldBatch, examples: Sequence[Example]) -> None:
        """Add the loss of writing the answer, for the rows whose refinement ends with this step."""
        numbers = ending.nonzero().squeeze(1)
        losses, written = output.loss.new_zeros(1), torch.zeros(1)
        if len(numbers):
            latent = output.y[numbers, : self.model.num_answer_slots(fields)]
            chosen = [examples[number] for number in numbers.tolist()]
            losses, written = answer_text_loss(self.model, latent, fields.select(numbers), chosen)
        share = losses.sum() / len(ending)  # a row counts once, however many steps it takes
        output.loss = output.loss + self.settings.text_loss_weight * share
        output.metrics |= {"text_loss": share.detach(), "written_right": written.float().sum() / len(ending)}

    @cached_property
    def data(self) -> str:
        """Hash of the training examples, taken once: of many rows of many fields it takes seconds."""
        return data_fingerprint(self.train.examples)

    def stage(self) -> ReasonerConfig:
        """The recursion numbers of the next update."""
        return stage_at(self.config, self.num_updates)

    # -- log, evaluation -------------------------------------------------------------------------------------------

    def _count(self, values: dict[str, float], weight: float = 1.0) -> None:
        for name, value in values.items():
            self.window[name] = self.window.get(name, 0.0) + weight * value

    def log(self) -> dict[str, Any]:
        """Write means since the last log line, over all processes."""
        totals = torch.tensor([self.window[name] for name in sorted(self.window)], dtype=torch.float64)
        totals = self.accelerator.reduce(totals.to(self.accelerator.device).float(), "mean").tolist()
        window = dict(zip(sorted(self.window), totals, strict=True))
        finished, steps = window.pop("rows_finished"), window.pop("steps")
        line: dict[str, Any] = {
            "update": self.num_updates,
            **{k: v / self.settings.log_every for k, v in window.items()},
        }
        line["rows_finished"] = finished * self.accelerator.num_processes
        line["deepest"] = self.curriculum.deepest
        line["mean_steps"] = steps / finished if finished else None
        line["learning_rate"] = learning_rate(self.settings, self.num_updates - 1)
        line["seconds"] = round(self.seconds, 2)
        self.window = {}
        self._write_log(line)
        return line

    def _write_log(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=self.num_updates)

    def evaluate(self) -> None:
        """Accuracy of the EMA weights on the validation examples; the best head is saved."""
        if self.accelerator.is_main_process:
            max_steps = self.config.reasoner.max_steps  # whatever the stage: as the saved head will be used
            written: dict[str, float] = {}
            with self.weights.averaged():
                record = run_steps(self.model, self.valid, max_steps)
                if self.model.text_decoder is not None:
                    chosen = range(0, len(self.valid), math.ceil(len(self.valid) / MAX_WRITTEN))
                    written["valid_written"] = float(run_text(self.model, self.valid, chosen).float().mean())
            halted = record.when_halted(record.right, max_steps)
            accuracy = float(halted.float().mean())
            depths = {str(row["depth"]): round(row["accuracy"], 4) for row in by_depth(halted, self.valid.examples)}
            fields = float(record.when_halted(record.fields_right, max_steps).mean())
            steps = float(record.steps_used(max_steps).float().mean())
            several = any(len(example.answered) > 1 for example in self.valid.examples)
            line: dict[str, Any] = {
                "update": self.num_updates,
                "valid_accuracy": accuracy,
                "valid_by_depth": depths,
                "valid_steps": steps,
                "device": device_name(),
                **({"valid_fields": fields} if several else {}),
                **written,
            }
            trained = stage_at(self.config, self.num_updates - 1)
            shortened = replace(self.config.reasoner, max_steps=trained.max_steps)
            if trained.max_steps < max_steps and trained == shortened:  # the steps beyond are not trained yet
                line["valid_accuracy_of_stage"] = float(record.right[trained.max_steps - 1].float().mean())
            shown = f"update {self.num_updates}: validation accuracy {accuracy:.3f}  {depths}  steps {steps:.1f}"
            if several:
                shown += f"  fields {fields:.3f}"
            if "valid_accuracy_of_stage" in line:
                shown += f"  after {trained.max_steps} of them {line['valid_accuracy_of_stage']:.3f}"
            if written:
                shown += f"  written {written['valid_written']:.3f}"
            self._write_log(line)
            tqdm.write(shown)
            score = (accuracy + written.get("valid_written", 0.0), fields)
            self.num_bad = 0 if score > self.best_score else self.num_bad + 1
            if score > self.best_score:
                self.best_score, self.best_accuracy = score, accuracy
                self.save_head("best")
            self.save_head("last")
        if self.any_process(self._out_of_patience()):
            self.accelerator.print(f"no better in {self.settings.patience} evaluations: training ends")
            self.finished = True

    def _out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.num_bad >= self.settings.patience

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set anywhere: processes must leave the loop together."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)

    # -- save and resume -------------------------------------------------------------------------------------------

    def save_head(self, name: str) -> None:
        """Save the EMA weights as a head that `HybridModel.from_pretrained` loads, with the run's configuration."""
        folder = self.folder / name
        with _disk_full_explained(folder):
            (folder / "results.json").unlink(missing_ok=True)  # figures of other weights
            folder.mkdir(parents=True, exist_ok=True)  # the card that is written next says what is in run.yaml
            (folder / "run.yaml").write_text(yaml.safe_dump(to_plain(self.config), sort_keys=False))
            self.model.save_pretrained(folder, state_dict=self.weights.head_state(self.model))

    def save_checkpoint(self) -> None:
        """Write everything a resumed run needs, whole or not at all."""
        rows = {k: self.accelerator.gather(v.to(self.accelerator.device)) for k, v in self.rows.state_dict().items()}
        window = sorted(self.window.items())
        totals = self.accelerator.reduce(
            torch.tensor([value for _, value in window], dtype=torch.float64).to(self.accelerator.device), "mean"
        )
        if not self.accelerator.is_main_process:
            return
        checkpoint = {
            "config": to_plain(self.config),
            "data": self.data,
            "num_updates": self.num_updates,
            "seconds": self.seconds,
            "best_score": self.best_score,
            "best_accuracy": self.best_accuracy,
            "kept": self.kept,
            "buffers": {name: buffer.float() for name, buffer in self.model.named_buffers()},
            "num_bad": self.num_bad,
            "window": dict(zip([name for name, _ in window], totals.tolist(), strict=True)),
            "curriculum": {"level": self.curriculum.level, "mastery": self.curriculum.mastery},
            "weights": self.weights.state_dict(),
            "rows": rows,
        }
        path = self.folder / CHECKPOINT
        with _disk_full_explained(path):
            torch.save(checkpoint, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint (`read_checkpoint`).

        Raises:
            ValueError: The training data are not those of the run that was stopped.
        """
        if checkpoint.get("data") not in (None, self.data):
            raise ValueError("--resume: the training data have changed since the run was stopped; use a new folder")
        for name in ("num_updates", "seconds", "best_accuracy", "num_bad", "window"):
            setattr(self, name, checkpoint[name])
        score = checkpoint.get("best_score", self.best_accuracy)
        self.best_score = score if isinstance(score, tuple) else (score, 0.0)  # a number in older checkpoints
        self.kept = checkpoint.get("kept", [])
        weights = {**checkpoint.get("buffers", {}), **checkpoint["weights"].get("frozen", {})}
        self.model.load_state_dict(weights, strict=False)
        self.curriculum.level = checkpoint["curriculum"]["level"]
        self.curriculum.mastery = checkpoint["curriculum"]["mastery"]
        self.finished = self.num_updates >= self.settings.num_updates or self._out_of_patience()
        self.weights.load_state_dict(checkpoint["weights"])
        local = slice(self.rows.rows.start, self.rows.rows.stop)
        for name, value in checkpoint["rows"].items():
            getattr(self.rows, name).copy_(value[local])
        if self.accelerator.is_main_process:
            self._truncate_log()
        self.accelerator.print(f"resumed after update {self.num_updates}")

    def _truncate_log(self) -> None:
        """Drop the log lines that the killed run wrote after its last checkpoint: they will be written again."""
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["update"] <= self.num_updates]
        path.write_text("".join(f"{line}\n" for line in kept))


def num_slots(model: HybridModel, examples: EmbeddedExamples) -> int:
    """Most slots that a row of these examples has."""
    reasoner, adapter = model.config.reasoner, model.config.adapter
    num_vectors = adapter.num_vectors if adapter.kind == "resampler" else max(examples.lengths)
    return examples.num_fields + reasoner.num_tape_slots + (num_vectors if reasoner.refine_memory else 0)


def ema_decay(longest: float, num_updates: int) -> float:
    """Decay of the moving average of weights: a short memory at first, for short runs."""
    return min(longest, (1 + num_updates) / (10 + num_updates))


def stage_at(config: RunConfig, update: float) -> ReasonerConfig:
    """The recursion numbers of an update: its stage's, and what the stage leaves out as configured."""
    stages = [stage for stage in config.training.recursion_schedule if stage.start <= update]
    names = ("num_latent_passes", "num_cycles", "max_steps")
    given = {name: value for stage in stages[-1:] for name in names if (value := getattr(stage, name)) is not None}
    most = given.get("num_cycles", config.reasoner.num_cycles)
    return replace(config.reasoner, **given, num_gradient_cycles=min(config.reasoner.num_gradient_cycles, most))


def learning_rate(settings: TrainingConfig, update: int) -> float:
    """Linear warm-up, then constant, or cosine to a tenth of the peak."""
    warm = min(1.0, (update + 1) / max(1, settings.warmup_updates))
    if settings.decay == "constant":
        return settings.learning_rate * warm
    progress = max(0.0, update - settings.warmup_updates) / max(1, settings.num_updates - settings.warmup_updates)
    return settings.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that differ and would change the course of training."""
    free = {"output_folder", "eval_every", "save_every", "patience", "trackers", "gradient_accumulation_steps"}
    free |= {"learning_rate", "folder", "token_budget"}
    default = to_plain(RunConfig())  # what a run of an older version had where it has nothing
    return [
        f"{section}.{key}"
        for section in ("backbone", "adapter", "reasoner", "text", "data", "features", "training")
        for key in now[section]
        if key not in free
        and _without_nulls(before.get(section, {}).get(key, default[section][key]))
        != _without_nulls(now[section][key])
    ]


def _without_nulls(value: Any) -> Any:
    """The value without null entries: a key that a newer version adds, and leaves unset, is no difference."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _interrupt_sets(trainer: Trainer) -> Generator[None]:
    """Ctrl-C and SIGTERM end the run after the current update; a second Ctrl-C ends it at once.

    Python lets the main thread alone say so: elsewhere a run goes on to its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(number: int, frame: Any) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _disk_full_explained(path: Path) -> Generator[None]:
    signs = ("No space left", "File too large", "inline_container", "PytorchStreamWriter")
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(sign in str(error) for sign in signs):
            raise OSError(
                errno.ENOSPC,
                f"the disk is full while writing {path}; what was saved before is whole: free space, then --resume",
            ) from error
        raise


# -- a run from its configuration ----------------------------------------------------------------------------------


def prepare(
    config: RunConfig, accelerator: Accelerator, backbone: Backbone | None = None, resume: bool = False
) -> tuple[HybridModel, EmbeddedExamples, EmbeddedExamples]:
    """Data, backbone, feature cache and a new head; cheap checks come first.

    With `resume`, the weights of `training.start_from` are left to the checkpoint.
    """
    examples = {role: load_examples(config.data, role) for role in ("train", "valid")}
    if config.text.enabled:
        for example in (*examples["train"], *examples["valid"]):
            answer_text(config.text, example)
    check_due(config, examples["train"])
    accelerator.print(told(examples))
    if backbone is None:
        backbone = load_backbone(config.backbone, accelerator.device)
    else:
        own = config.backbone
        backbone = backbone.with_settings(own.layers or backbone.layers, own.template, own.memory)
    common = common_fields(examples["train"])
    is_single = common is not None and list(common) == ["answer"]
    options = common_options(examples["train"])
    torch.manual_seed(config.training.seed)
    model = HybridModel.from_backbone(
        backbone,
        backbone_config=config.backbone,
        adapter=config.adapter,
        reasoner=config.reasoner,
        text=config.text,
        known_options=known_options(examples["train"]),
        choices=options if any(is_unnamed(example.fields) for example in examples["train"]) else None,
        options=options,
        fields=None if is_single else common,
        places=common_places(examples["train"]),
        find_names=config.data.find_names,
        license=config.data.license,
    )
    for name, part in model.named_children():
        part.requires_grad_(config.training.parts is None or name in config.training.parts)
    if config.training.start_from is not None and not resume:
        load_weights(model, Path(config.training.start_from), config.training.parts)
    with accelerator.main_process_first(), accelerator.local_main_process_first():  # others find the cache filled
        progress = accelerator.is_main_process
        embedded = embed_examples(config.features, model.backbone, examples, progress)
    if config.training.start_from is None:
        model.adapter.fit_statistics(_sample_states(model, embedded["train"], config.training.seed))
    return model, embedded["train"], embedded["valid"]


def told(examples: Mapping[str, Sequence[Example]]) -> str:
    """What a run has before it, in a line: questions, those with a context, depths, options."""
    train, valid = examples["train"], examples["valid"]
    depths = sorted({example.depth for example in train if example.depth is not None})
    options = {option for fields in {e.fields for e in train} for field in fields for option in field.options}
    shown = reprlib.repr(sorted(options)) if len(options) <= 6 else f"{len(options):,} different"
    parts = [
        f"training on {len(train):,} questions, {sum(e.context is not None for e in train):,} of them with a context",
        f"{len(valid):,} for validation",
        f"depths {depths[0]} to {depths[-1]}" if depths else "no depths",
        f"options: {shown}",
    ]
    return "; ".join(parts)


def check_due(config: RunConfig, examples: Sequence[Example]) -> None:
    """Refuse answers that no step of the training would be asked for.

    Raises:
        ValueError: One is due later than the last step.
    """
    latest = max((max(example.due) for example in examples if example.due), default=1)
    max_steps = stage_at(config, math.inf).max_steps
    if latest > max_steps:
        raise ValueError(
            f"an answer is due from step {latest} on, and training ends with {max_steps} steps at most: raise "
            "reasoner.max_steps (or that of the last training.recursion_schedule), or leave out the column `due`"
        )


def load_weights(model: HybridModel, folder: Path, parts: Sequence[str] | None) -> None:
    """Start a head, of which some parts are trained, from another's weights; parts that it lacks stay as they are.

    Raises:
        ValueError: The folder is no head, or one of another kind.
    """
    check_head_folder(folder)
    other, own = HybridConfig.from_pretrained(folder).to_dict(), model.config.to_dict()
    free = START_FREE if parts is None or "reasoner" in parts else START_FREE - CYCLES
    for section in ("backbone", "adapter", "reasoner"):
        for key in sorted(own[section].keys() - free):
            if other[section][key] != own[section][key]:
                raise ValueError(
                    f"training.start_from={str(folder)!r} has {section}.{key}={other[section][key]!r}, and this run "
                    f"{own[section][key]!r}: use the same"
                )
    if other["text"]["enabled"] and model.text_decoder is None:
        raise ValueError(
            f"text.enabled=false, but training.start_from={str(folder)!r} has a text decoder: set text.enabled=true"
        )
    if (other["places"] is None) != (own["places"] is None):
        raise ValueError(
            f"training.start_from={str(folder)!r}: its fields stood in the text (at) in training, or those of this "
            "run do, but not both: set data.places (or data.answer_at) as it was there"
        )
    if other["known_options"] != own["known_options"]:
        raise ValueError(f"training.start_from={str(folder)!r} was trained on other options than these data have")
    model.load_state_dict(model.state_dict() | load_file(folder / "model.safetensors"))


def _sample_states(model: HybridModel, train: EmbeddedExamples, seed: int) -> Tensor:
    """Hidden states of random training rows (tokens, layers, backbone_dim), about `NUM_STATISTICS_TOKENS` of them."""
    states, num_tokens = [], 0
    for row in np.random.default_rng(seed).permutation(len(train)).tolist():
        hidden_states, mask, _, _ = train.batch(model, [row])
        states.append(hidden_states[mask])
        num_tokens += len(states[-1])
        if num_tokens >= NUM_STATISTICS_TOKENS:
            break
    return torch.cat(states)


def read_checkpoint(config: RunConfig) -> dict[str, Any]:
    """The checkpoint of a run that goes on with the same settings.

    Raises:
        ValueError: There is no checkpoint, or the configuration differs where it matters.
    """
    path = Path(config.training.output_folder) / CHECKPOINT
    if not path.exists():
        raise ValueError(f"--resume: no {path}; start without --resume, or give the right training.output_folder")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if changed := _changed(checkpoint["config"], to_plain(config)):
        raise ValueError(f"--resume: {changed} differ from the run that was stopped; use the same, or a new folder")
    return checkpoint


def train(config: RunConfig, resume: bool = False, backbone: Backbone | None = None) -> Path | None:
    """Train a head; returns the folder of the best one, or `None` if the run was interrupted (and saved).

    Args:
        config: The run.
        resume: Go on from the checkpoint in `training.output_folder`.
        backbone: A loaded backbone to use instead of loading one, read as the configuration says.

    Raises:
        ValueError: The configuration, the data or an existing output folder does not allow the run.
        FloatingPointError: The loss or its gradient is not finite.
    """
    folder = Path(config.training.output_folder)
    if not resume and (folder / CHECKPOINT).exists():
        raise ValueError(f"{folder} holds a run already: go on with --resume, or give another training.output_folder")
    checkpoint = read_checkpoint(config) if resume else None
    trackers: Any = config.training.trackers or None
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # training.precision decides, with master weights of our own
        gradient_accumulation_steps=1,  # the loop accumulates by itself
        log_with=trackers,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],  # others wait while one embeds
    )
    parts = accelerator.num_processes * config.training.gradient_accumulation_steps
    if config.training.batch_size % parts:
        raise ValueError(
            f"training.batch_size={config.training.batch_size}: expected a multiple of {parts}, which is "
            "processes × training.gradient_accumulation_steps"
        )
    folder.mkdir(parents=True, exist_ok=True)
    model, train_examples, valid_examples = prepare(config, accelerator, backbone, resume)
    if accelerator.is_main_process:
        if not resume:  # what a run that never came to a checkpoint left
            (folder / "log.jsonl").unlink(missing_ok=True)
        model.print_trainable_parameters()
        (folder / "run.yaml").write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
    if trackers:
        accelerator.init_trackers("hybrid", config={"run": json.dumps(to_plain(config))})
    trainer = Trainer(config, model, train_examples, valid_examples, accelerator)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer.run()
