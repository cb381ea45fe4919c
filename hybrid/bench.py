"""`hybrid bench`: the three loops beside what the machine can do, and beside what users would pick instead.

Every ratio comes from measurements taken in turns in one run, because machines are
noisy; a row is the median of them. The machine's own rate is taken once, at the start.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hybrid.backbone import Backbone, Prompt, native_dtype
from hybrid.batches import EmbeddedExamples, embed_examples
from hybrid.config import FeatureConfig, ReasonerConfig, RunConfig, TrainingConfig
from hybrid.data import Example
from hybrid.evaluation import wilson_interval
from hybrid.features import COMPILED_TOKENS, FeatureCache, fill_cache
from hybrid.losses import all_fields_right
from hybrid.model import HybridModel
from hybrid.parallel import map_in_threads
from hybrid.preparation import prepare
from hybrid.refinement import Refined, refine
from hybrid.training import Trainer

MATRIX = 2048  # rows of the square product that stands for what the machine can do
REPEATS = 3
NUM_TOKENS = 30_000  # of each source of texts
PLAIN_BATCH = 32  # texts per batch of the plain loop


@dataclass
class Row:
    """One comparison: what is measured, against what, and the figure to reach.

    `ratio` is ours over the other's in speed (times are inverted), so more is better but for memory and cold start.
    """

    loop: str
    against: str
    ours: str
    other: str
    ratio: float | None
    reach: str
    note: str = ""


@dataclass
class Bench:
    """What every measurement needs.

    Attributes:
        backbone: The frozen model.
        device: Where everything runs.
        matrix_rate: Best matrix-product rate of the machine in `backbone.dtype`, FLOP/s.
    """

    backbone: Backbone
    device: torch.device
    matrix_rate: float

    def seconds(self, function: Callable[[], Any]) -> float:
        """Wall-clock seconds of one call."""
        self._wait()
        start = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - start

    def medians(self, *functions: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
        """Median seconds of each function, called in turns; call each before, to warm up."""
        rounds = [[self.seconds(function) for function in functions] for _ in range(repeats)]
        return [statistics.median(times) for times in zip(*rounds, strict=True)]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matrix_rate(device: torch.device) -> float:
    """The best rate of a large matrix product, in FLOP/s: on a CPU on all threads at once, or one product a thread."""
    matrix = torch.randn(MATRIX, MATRIX, device=device, dtype=native_dtype(device))

    def products(count: int) -> None:
        for _ in range(count):
            matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rates, num_threads = [], torch.get_num_threads()
    for workers in {1, num_threads if device.type == "cpu" else 1}:
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            list(map_in_threads(products, [20] * workers))
            rates.append(workers * 20 * 2 * MATRIX**3 / (time.perf_counter() - start))
    return max(rates)


# -- embedding --------------------------------------------------------------------------------------------------------


def bench_embedding(bench: Bench, name: str, examples: Sequence[Example]) -> list[Row]:
    """The embedder against a plain loop, the machine, and its own cache, on the first `NUM_TOKENS` of some texts."""
    backbone = bench.backbone
    read = [part for example in examples for part in backbone.parts(example.context, example.question)]
    texts = list(dict.fromkeys(read))  # what is read by itself, once
    prompts = backbone.prompts(texts)
    ends = list(itertools.accumulate(len(prompt.token_ids) for prompt in prompts))
    texts = texts[: bisect.bisect(ends, NUM_TOKENS) + 1]
    prompts, num_tokens = prompts[: len(texts)], ends[len(texts) - 1]
    compile_seconds = bench.seconds(backbone.compile) if bench.device.type == "cpu" else 0.0
    arguments = backbone.fingerprint(), backbone.num_stored_layers, backbone.dim
    with tempfile.TemporaryDirectory() as folder:

        def fill(cache: FeatureCache) -> None:
            fill_cache(cache, backbone, texts, token_budget=FeatureConfig().token_budget, progress=False)

        def embed() -> None:
            with FeatureCache.open(tempfile.mkdtemp(dir=folder), *arguments) as cache:
                fill(cache)

        backbone.hidden_states(prompts[:8])
        plain_embedding(backbone, prompts[:8])
        ours, plain = bench.medians(embed, lambda: plain_embedding(backbone, prompts), repeats=2)
        with FeatureCache.open(folder, *arguments) as cache:
            first, second = bench.seconds(lambda: fill(cache)), bench.seconds(lambda: fill(cache))
    flops = 2 * backbone.num_block_parameters * num_tokens
    speed = f"{num_tokens / ours:,.0f} tokens/s"
    depth = f"stops at layer {max(backbone.layers)} of {backbone.num_layers}"
    loop = f"embedding {name} into an empty cache"
    return [
        Row(loop, f"plain transformers loop, batches of {PLAIN_BATCH} padded to the longest", speed,
            f"{num_tokens / plain:,.0f} tokens/s", plain / ours, "≥ 1.8",
            f"{len(texts)} texts of {num_tokens / len(texts):.0f} tokens on average; ours {depth}, compiled as jobs "
            f"over {COMPILED_TOKENS:,} tokens are ({compile_seconds:.0f} s, not counted)"),
        Row(loop, "the machine's matrix products", f"{flops / ours / 1e9:,.0f} GFLOP/s",
            f"{bench.matrix_rate / 1e9:,.0f} GFLOP/s", flops / ours / bench.matrix_rate, "≥ 0.75",
            "2 × parameters of the blocks run × real tokens; attention and padding not counted"),
        Row(f"embedding {name}, second run", "first run", f"{second:.3f} s", f"{first:.2f} s", first / second, "≥ 50"),
    ]  # fmt: skip


@torch.no_grad()
def plain_embedding(backbone: Backbone, prompts: Sequence[Prompt]) -> None:
    """What a user would write: batches in the order of the data, padded to the longest text, every state asked for."""
    encoder: Any = backbone.model.base_model
    for start in range(0, len(prompts), PLAIN_BATCH):
        rows = [torch.tensor(prompt.token_ids) for prompt in prompts[start : start + PLAIN_BATCH]]
        token_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(backbone.device)
        lengths = torch.tensor([len(row) for row in rows], device=backbone.device)
        mask = (torch.arange(token_ids.shape[1], device=backbone.device) < lengths[:, None]).long()
        encoder(input_ids=token_ids, attention_mask=mask, output_hidden_states=True)


# -- training ---------------------------------------------------------------------------------------------------------


def bench_training(bench: Bench, config: RunConfig, trm_path: str | None, folder: Path) -> list[Row]:
    """One update of the default head against the reference codes and the machine, and its memory."""
    trainer = _trainer(bench, config, folder, config.reasoner)
    reasoner, batch_size = trainer.config.reasoner, trainer.settings.batch_size
    num_slots = trainer.train.num_fields + reasoner.num_tape_slots
    longest = max(trainer.train.lengths)
    peers: dict[str, Callable[[], None]] = {}
    absent: dict[str, str] = {}
    for name, make in {
        "TRM reference code": lambda: trm_update(trm_path, reasoner, batch_size, num_slots, bench.device),
        "TRM reference code, the question in its sequence": lambda: trm_update(
            trm_path, reasoner, batch_size, num_slots + longest, bench.device
        ),
        "tiny-recursive-model package": lambda: lucidrains_update(reasoner, batch_size, num_slots, bench.device),
    }.items():
        try:
            peers[name] = make()
        except ImportError as error:
            absent[name] = str(error)
    for update in (trainer.update, *peers.values()):
        update()
    ours, *theirs = bench.medians(trainer.update, *peers.values(), repeats=5)
    seconds = dict(zip(peers, theirs, strict=True))
    passes = f"{reasoner.num_cycles} × ({reasoner.num_latent_passes} + 1) passes"
    sizes = f"AdamW, dim {reasoner.dim}, {num_slots} slots, {passes}"
    rows, loop = [], f"training step, batch {batch_size}"
    for name in [*peers, *absent]:
        note = f"{sizes}, gradient through the last cycle" if name in peers else f"skipped: {absent[name]}"
        other = f"{seconds[name]:.3f} s" if name in peers else "–"
        ratio = seconds[name] / ours if name in peers else None
        reach = "–" if "question" in name else "≥ 1.5"
        rows.append(Row(loop, name, f"{ours:.3f} s", other, ratio, reach, note))
    flops = _update_flops(trainer)
    rows.append(
        Row(loop, "the machine's matrix products", f"{flops / ours / 1e9:,.0f} GFLOP/s",
            f"{bench.matrix_rate / 1e9:,.0f} GFLOP/s", flops / ours / bench.matrix_rate, "≥ 0.5",
            "all products of forward and backward, padding included")
    )  # fmt: skip
    base, longer = _peak_bytes(trainer), _peak_bytes(trainer, 4)
    deeper = _trainer(bench, config, folder, replace(reasoner, num_cycles=4 * reasoner.num_cycles))
    for name, peak in {"4 × num_cycles": _peak_bytes(deeper), "4 refinement steps on end": longer}.items():
        rows.append(Row("peak memory of a training step", name, f"{base / 2**20:,.0f} MiB",
                        f"{peak / 2**20:,.0f} MiB", peak / base, "≤ 1.05"))  # fmt: skip
    return rows


def _trainer(bench: Bench, config: RunConfig, folder: Path, reasoner: ReasonerConfig) -> Trainer:
    training = TrainingConfig(output_folder=str(folder / "run"), batch_size=64)
    config = replace(config, reasoner=reasoner, training=training)
    accelerator = Accelerator(cpu=bench.device.type == "cpu")
    return Trainer(config, *prepare(config, accelerator, bench.backbone), accelerator)


def _update_flops(trainer: Trainer) -> int:
    in_threads, trainer.in_threads = trainer.in_threads, False  # the counter sees its own thread only
    with FlopCounterMode(display=False) as counter:
        trainer.update()
    trainer.in_threads = in_threads
    return counter.get_total_flops()


def _peak_bytes(trainer: Trainer, num_updates: int = 1) -> int:
    """Most memory allocated at once during some updates, beyond what is held before, parts one after the other."""
    trainer.update()
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(num_updates):
            trainer.update()
        return torch.cuda.max_memory_allocated() - before
    trainer.in_threads = False  # how parts overlap in time is chance
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(num_updates):
            trainer.update()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def trm_update(
    path: str | None, reasoner: ReasonerConfig, batch_size: int, seq_len: int, device: torch.device
) -> Callable[[], None]:
    """One training update of the TRM reference code at our sizes, with AdamW and an EMA as ours has."""
    if path is None:
        raise ImportError("give --trm-path, a checkout of SamsungSAILMontreal/TinyRecursiveModels")
    if path not in sys.path:
        sys.path.insert(0, path)
    from models.losses import ACTLossHead  # ty: ignore[import-not-found]
    from models.recursive_reasoning.trm import (  # ty: ignore[import-not-found]
        TinyRecursiveReasoningModel_ACTV1,
    )

    dtype = str(native_dtype(device)).removeprefix("torch.")
    sizes = dict(
        batch_size=batch_size, seq_len=seq_len, num_puzzle_identifiers=1, vocab_size=16, puzzle_emb_len=0,
        H_cycles=reasoner.num_cycles, L_cycles=reasoner.num_latent_passes, H_layers=0, L_layers=reasoner.num_layers,
        hidden_size=reasoner.dim, num_heads=reasoner.num_heads, pos_encodings="rope", forward_dtype=dtype,
        expansion=reasoner.intermediate_size / reasoner.dim * 1.5, halt_max_steps=reasoner.max_steps,
        halt_exploration_prob=0.1,
    )  # fmt: skip
    with device:
        model = ACTLossHead(TinyRecursiveReasoningModel_ACTV1(sizes), loss_type="stablemax_cross_entropy").train()
        labels = torch.full((batch_size, seq_len), -100)
        labels[:, 0] = torch.randint(16, (batch_size,))
        batch = {
            "inputs": torch.randint(16, (batch_size, seq_len)),
            "labels": labels,
            "puzzle_identifiers": torch.zeros(batch_size, dtype=torch.long),
        }
        carry = model.initial_carry(batch)
    step = _optimizer_step(model)

    def update() -> None:
        nonlocal carry
        with device:
            carry, loss, *_ = model(return_keys=[], carry=carry, batch=batch)
            (loss / batch_size).backward()
        step()

    return update


def lucidrains_update(
    reasoner: ReasonerConfig, batch_size: int, seq_len: int, device: torch.device
) -> Callable[[], None]:
    """One training update of the `tiny-recursive-model` package at our sizes, in bfloat16 where that is native."""
    from tiny_recursive_model import TinyRecursiveModel  # ty: ignore[import-not-found]
    from x_transformers import Encoder  # ty: ignore[import-not-found]

    network = Encoder(
        dim=reasoner.dim, depth=reasoner.num_layers, heads=reasoner.num_heads, attn_flash=True, use_rmsnorm=True,
        attn_dim_head=reasoner.dim // reasoner.num_heads, rotary_pos_emb=True, ff_glu=True, ff_swish=True,
        ff_mult=reasoner.intermediate_size / reasoner.dim,
    )  # fmt: skip
    model = TinyRecursiveModel(
        dim=reasoner.dim,
        num_tokens=16,
        network=network,
        num_refinement_blocks=reasoner.num_cycles,
        num_latent_refinements=reasoner.num_latent_passes,
    ).to(device)
    sequence, dtype = torch.randint(16, (batch_size, seq_len), device=device), native_dtype(device)
    latents = model.get_initial()
    step = _optimizer_step(model)

    def update() -> None:
        nonlocal latents
        # No cache: copies of weights made in the cycles without gradient would be used in the one with it.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            loss, _, outputs, scratch, *_ = model(sequence, *latents, labels=sequence)
        (loss / batch_size).backward()
        latents = outputs, scratch
        step()

    return update


def _optimizer_step(model: nn.Module) -> Callable[[], None]:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    average = [parameter.detach().clone() for parameter in parameters]

    def step() -> None:
        assert all(parameter.grad is not None for parameter in parameters if parameter.ndim > 1), "weights left out"
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 0.001)

    return step


# -- answering --------------------------------------------------------------------------------------------------------


def bench_answers(bench: Bench, model: HybridModel, embedded: EmbeddedExamples, folder: str) -> list[Row]:
    """Early exit in a large batch, one question at a time, and a cold start, with a trained head."""
    rows = list(range(min(256, len(embedded))))
    hidden_states, mask, fields, labels = embedded.batch(model, rows)
    results: dict[str, Any] = {}

    def run(halting: str) -> Callable[[], None]:
        def call() -> None:
            results[halting] = refine(model, hidden_states, mask, fields, max_steps=16, halting=halting)

        return call

    modes = ["never", "learned", "convergence"]
    run("learned")()
    off, *times = bench.medians(*(run(mode) for mode in modes))
    table = []
    for mode, seconds in zip(modes[1:], times, strict=True):
        loop = f"answering {len(rows)} questions, at most 16 steps, halting `{mode}`"
        accuracies = f"accuracy {_accuracy(results[mode], labels)} against {_accuracy(results['never'], labels)}"
        note = f"{accuracies}, {results[mode].steps.float().mean():.1f} steps on average"
        table.append(Row(loop, "halting off", f"{seconds:.2f} s", f"{off:.2f} s", off / seconds, "≥ 2", note))
    return [*table, _one_question(bench, model, embedded), _cold_start(folder, embedded.examples[0], bench.device)]


def _accuracy(refined: Refined, labels: Tensor) -> str:
    num_right = int(all_fields_right(refined.scores, labels.cpu()).sum())
    low, high = wilson_interval(num_right, len(labels))
    return f"{num_right / len(labels):.3f} ({low:.3f}–{high:.3f})"


def _one_question(bench: Bench, model: HybridModel, embedded: EmbeddedExamples) -> Row:
    generator: Any = bench.backbone.model
    plain = bench.backbone.with_settings([0], "plain")
    ours, theirs = [], []
    for example in embedded.examples[:21]:
        prompt = torch.tensor([plain.prompt(example.context, example.question).token_ids], device=bench.device)
        settings = dict(attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0)
        settings |= dict(max_new_tokens=32, min_new_tokens=32)
        asked = dict(context=example.context, fields=example.fields)
        ours.append(bench.seconds(partial(model.answer, example.question, **asked)))
        theirs.append(bench.seconds(partial(generator.generate, prompt, **settings)))
    mine, other = statistics.median(ours[1:]), statistics.median(theirs[1:])  # the first of each warms up
    return Row("answering one question, warm (median of 20)", "the frozen LLM generating 32 tokens",
               f"{mine * 1e3:.0f} ms", f"{other * 1e3:.0f} ms", other / mine, "≥ 5")  # fmt: skip


def _cold_start(folder: str, example: Example, device: torch.device) -> Row:
    command = [sys.executable, "-m", "hybrid", "ask", folder, example.question, "--verbose"]
    command += ["--context", example.context] if example.context else []
    command += ["--fields", json.dumps({field.name: list(field.options) for field in example.fields})]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})
    times, note = [], ""
    for _ in range(REPEATS):
        start = time.perf_counter()
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        times.append(time.perf_counter() - start)
        note = output.strip().splitlines()[-1]
    return Row("`hybrid ask`, cold start", "–", f"{statistics.median(times):.1f} s", "–", None, "< 8 s", note)


# -- the table --------------------------------------------------------------------------------------------------------


def run_bench(
    backbone: Backbone,
    config: RunConfig,
    texts: Mapping[str, Sequence[Example]],
    head: tuple[str, list[Example]] | None = None,
    trm_path: str | None = None,
) -> dict[str, Any]:
    """Measure every row.

    Args:
        backbone: The frozen model.
        config: A run whose data and sizes are those of the training step.
        texts: Examples for the embedder, by the name of their source.
        head: Folder of a trained head and questions for it, for the rows on answering; without, they are left out.
        trm_path: A checkout of the TRM reference code.
    """
    device = backbone.device
    bench = Bench(backbone, device, matrix_rate(device))
    _say(f"matrix products: {bench.matrix_rate / 1e9:,.0f} GFLOP/s in {backbone.dtype}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = replace(config, features=replace(config.features, folder=str(folder / "features")))
        for name, examples in texts.items():
            rows += _told(bench_embedding(bench, name, examples))
        rows += _told(bench_training(bench, config, trm_path, folder))
        if head is None:
            _say("answering: left out, give a trained head (`hybrid bench HEAD`)")
        else:
            name, questions = head
            model = HybridModel.from_pretrained(name, backbone, device=device)
            embedded = embed_examples(config.features, model.backbone, {"valid": questions}, progress=False)["valid"]
            rows += _told(bench_answers(bench, model, embedded, name))
    return {"rows": [asdict(row) for row in rows], "matrix_gflops": round(bench.matrix_rate / 1e9, 1)}


def _told(rows: list[Row]) -> list[Row]:
    for row in rows:
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else "–"
        _say(f"{row.loop} / {row.against}: {row.ours}, {row.other}, ratio {ratio} ({row.reach}) {row.note}")
    return rows


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def markdown_table(results: dict[str, Any]) -> str:
    """The rows of a result file as Markdown."""
    lines = ["| loop | against | ours | other | ratio | aim | note |", "|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] is not None else "–"
        cells = [row["loop"], row["against"], row["ours"], row["other"], ratio, row["reach"], row["note"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
