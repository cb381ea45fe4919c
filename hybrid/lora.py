"""LoRA on the same language model: what one would do instead of a head.

Nothing here is ours: `peft` adapts the model, the trainer of `transformers` trains it. Questions are asked as in
`baselines.zero_shot`, or with `text.enabled` as a head's text decoder is asked, and the loss is that of the answer's
tokens (Hu et al. 2021, arXiv:2106.09685).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from accelerate import PartialState
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from hybrid.backbone import Backbone, load_backbone
from hybrid.baselines import answer_prompt, zero_shot
from hybrid.batches import common_options
from hybrid.config import BackboneConfig, RunConfig, TextConfig, to_plain
from hybrid.data import Example, load_examples
from hybrid.evaluation import by_depth, device_name, training_cost
from hybrid.generation import answer_text, answer_token_ids, greedy_texts, is_answer
from hybrid.hub import holds_lora
from hybrid.losses import IGNORED

RANK = 16
TOKENS_AT_ONCE = 8192  # logits of a batch are large: tokens × vocabulary
ROWS_AT_ONCE = 16
DECAYS: dict[str, dict[str, Any]] = {  # as in the training of heads
    "constant": {"lr_scheduler_type": "constant_with_warmup"},
    "cosine": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
}


def train_lora(config: RunConfig, resume: bool = False) -> Path:
    """Fine-tune the run's backbone with LoRA on all its linear layers; returns the folder of the adapter.

    Of the run, `data`, `backbone`, `text`, and of `training` the folder, updates, batch size, learning rate, decay,
    warm-up, seed, and intervals of saving and logging are used. Each field of a question is a training row, or with
    `text.enabled` each question with its whole answer in words.

    Args:
        config: The run.
        resume: Go on from the last checkpoint in `training.output_folder`.

    Raises:
        ValueError: The folder holds a run already, or none to go on with, or there are several processes.
    """
    settings, folder = config.training, Path(config.training.output_folder)
    if (num_processes := PartialState().num_processes) > 1:
        raise ValueError(f"{num_processes} processes: `--baseline lora` trains in one, start it without a launcher")
    has_checkpoint = any(folder.glob("checkpoint-*"))
    if has_checkpoint != resume:
        raise ValueError(
            f"--resume: {folder} holds no checkpoint; start without --resume"
            if resume
            else f"{folder} holds a run already: go on with --resume, or give another training.output_folder"
        )
    examples = load_examples(config.data, "train")
    backbone = load_backbone(config.backbone)
    rows = _rows(backbone, examples, config.text)
    rows_at_once = _rows_at_once(settings.batch_size, max(len(row["input_ids"]) for row in rows))
    torch.manual_seed(settings.seed)
    adapters = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(backbone.model, adapters)
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.num_updates,
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=settings.batch_size // rows_at_once,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.warmup_updates,
            **DECAYS[settings.decay],
            max_grad_norm=settings.max_grad_norm,
            bf16=backbone.dtype == torch.bfloat16,
            use_cpu=backbone.device.type == "cpu",
            train_sampling_strategy="group_by_length",
            logging_steps=settings.log_every,
            save_steps=settings.save_every,
            save_total_limit=1,
            report_to="none",
            seed=settings.seed,
        ),
        train_dataset=rows,  # ty: ignore[invalid-argument-type]  a list is a map-style data set
        data_collator=DataCollatorForSeq2Seq(_padding(backbone.tokenizer), label_pad_token_id=IGNORED),
        callbacks=[_Log(folder / "log.jsonl")],
    )
    trainer.train(resume_from_checkpoint=resume)
    best = folder / "best"
    model.save_pretrained(str(best))
    data = replace(config.data, choices=config.data.choices or common_options(examples))  # to be asked other rows
    (best / "run.yaml").write_text(yaml.safe_dump(to_plain(replace(config, data=data)), sort_keys=False))
    return best


def evaluate_lora(folder: Path, config: RunConfig, examples: Sequence[Example]) -> dict[str, Any]:
    """Accuracy by depth of an adapter that `train_lora` made.

    It is scored as `zero_shot` scores the frozen model, with the end that training set after an answer; trained in
    words (`text.enabled`), by what it writes greedily (`is_answer`).
    """
    tuned, num_parameters = load_lora(folder, config.backbone)
    if config.text.enabled:
        figures = _written(tuned, config.text, examples)
    else:
        figures = zero_shot(tuned, examples, end=_end(tuned.tokenizer))
    name = "LoRA, in words" if config.text.enabled else "LoRA"
    return {**figures, "name": name, "num_parameters": num_parameters, **training_cost(folder)}


def _written(tuned: Backbone, text: TextConfig, examples: Sequence[Example]) -> dict[str, Any]:
    """Accuracy by depth of answers in words."""
    prompts = tuned.text_prompts([(e.context, e.question) for e in examples], text.suffix, text.chat)
    length = max(map(len, answer_token_ids(tuned.tokenizer, text, examples)))
    found = greedy_texts(tuned, [prompt.token_ids for prompt in prompts], length)
    right = [is_answer(words, answer_text(text, example)) for words, example in zip(found, examples, strict=True)]
    return {"accuracy_by_depth": by_depth(torch.tensor(right), examples)}


def check_lora_folder(folder: Path) -> None:
    """Refuse a folder that holds no adapter.

    Raises:
        ValueError: So it is.
    """
    if not holds_lora(folder):
        raise ValueError(f"{folder} holds no LoRA adapter: train one with `hybrid train CONFIG.yaml --baseline lora`")


def load_lora(folder: Path, config: BackboneConfig, device: str | torch.device | None = None) -> tuple[Backbone, int]:
    """A backbone with an adapter merged into its weights, and the number of the adapter's parameters.

    Raises:
        ValueError: The folder holds no adapter.
    """
    check_lora_folder(folder)
    backbone = load_backbone(config, device)
    model = peft.PeftModel.from_pretrained(backbone.model, folder)
    num_parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    tuned: Any = model.merge_and_unload()
    settings: dict[str, Any] = {
        "layers": backbone.layers, "template": backbone.template, "memory": backbone.memory,
    }  # fmt: skip
    return Backbone(tuned, backbone.tokenizer, name=f"{backbone.name} with LoRA", **settings), num_parameters


def _rows_at_once(batch_size: int, longest: int) -> int:
    """The largest equal part of a batch whose longest rows fit into memory."""
    most = max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // longest))
    return max(size for size in range(1, most + 1) if batch_size % size == 0)


def _rows(backbone: Backbone, examples: Sequence[Example], text: TextConfig) -> list[dict[str, list[int]]]:
    """Prompt and answer as token ids, with labels at the answer only."""
    if text.enabled:
        prompted = backbone.text_prompts([(e.context, e.question) for e in examples], text.suffix, text.chat)
        prompts = [prompt.token_ids for prompt in prompted]
        answers = answer_token_ids(backbone.tokenizer, text, examples)
    else:
        asked = [(example, field, answer) for example in examples for field, answer in example.answered]
        prompts = backbone.tokenizer([answer_prompt(example, field) for example, field, _ in asked])["input_ids"]
        words = [f" {answer}{_end(backbone.tokenizer)}" for *_, answer in asked]
        answers = backbone.tokenizer(words, add_special_tokens=False)["input_ids"]
    return [
        {
            "input_ids": [*prompt, *answer],
            "attention_mask": [1] * (len(prompt) + len(answer)),
            "labels": [*[IGNORED] * len(prompt), *answer],
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _end(tokenizer: Any) -> str:
    """What follows an answer."""
    return tokenizer.eos_token or ""


def _padding(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that pads with any token: rows bring their masks, and padding has no labels."""
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


class _Log(TrainerCallback):
    """Loss and seconds of training as JSON lines, over all its sittings."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the checkpoint, and go on counting from there."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["update"] <= state.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept))
        self.start = time.monotonic() - (json.loads(kept[-1])["seconds"] if kept else 0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line; the last one holds the totals."""
        if state.is_world_process_zero:
            seconds = round(time.monotonic() - self.start, 2)
            line = {"update": state.global_step, **logs, "seconds": seconds, "device": device_name()}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
