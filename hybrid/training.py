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
import signal
import threading
import time
import warnings
from collections.abc import Generator, Sequence
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
from torch import Tensor
from tqdm import tqdm

from hybrid.backbone import Backbone, native_dtype
from hybrid.batches import EmbeddedExamples
from hybrid.config import ReasonerConfig, RunConfig, stage_at, to_plain
from hybrid.data import Example, data_fingerprint
from hybrid.decoder import FieldBatch
from hybrid.evaluation import by_depth, device_name, run_steps, run_text
from hybrid.generation import answer_text_loss, keep_loss, own_texts
from hybrid.losses import IGNORED, all_fields_right
from hybrid.model import HybridModel
from hybrid.parallel import map_in_threads
from hybrid.preparation import prepare
from hybrid.reasoner import ReasonerState, has_halted
from hybrid.stream import CarriedRows, Curriculum, RowStream
from hybrid.weights import MasterWeights, learning_rate

CHECKPOINT = "checkpoint.pt"
MAX_WRITTEN = 200  # validation answers that are written in words at each evaluation
NUM_KEPT, KEPT_TOKENS, KEPT_ROWS = 256, 96, 4  # texts of the frozen model's own, their length, how many an update sees
MIN_PART = 16  # rows of a part below which matrix products get slow


@dataclass
class PartStep:
    """What a refinement step of some rows gives: state, means to log, gradients; who halts, is asked, is right."""

    state: ReasonerState
    means: dict[str, Tensor]
    gradients: Sequence[Tensor | None]
    wants_halt: Tensor
    asked: Tensor
    right: Tensor


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
    def data_hash(self) -> str:
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
            "data": self.data_hash,
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
        if checkpoint.get("data") not in (None, self.data_hash):
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
        backbone: A loaded backbone to use instead of loading one; template and memory are the configuration's, and
            layers, too, where it names any.

    Raises:
        ValueError: The configuration, the data or an existing output folder does not allow the run.
        FloatingPointError: The loss or its gradient is not finite.
    """
    folder = Path(config.training.output_folder)
    if not resume and (folder / CHECKPOINT).exists():
        raise ValueError(f"{folder} holds a run already: go on with --resume, or give another training.output_folder")
    checkpoint = read_checkpoint(config) if resume else None
    last = max((stage.start for stage in config.training.recursion_schedule), default=0)
    if last >= config.training.num_updates:
        warnings.warn(
            f"training.recursion_schedule has a stage from update {last} on, and the run ends after "
            f"{config.training.num_updates}: what is evaluated was not trained; let it start earlier",
            stacklevel=2,
        )
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
