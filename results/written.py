"""Answers in words: the frozen language model, LoRA and the steered model, and what steering does to other texts.

    python results/written.py HEAD --data FILE --lora FOLDER --output results/NAME/written.json

The first lines of greedy text, as many as the answer has, must be the answer, word for word. All have the same
prompts. The other texts are Python's own reference manual (`pydoc_data.topics`), read up to the middle of a passage.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from hybrid.backbone import Backbone
from hybrid.cli import config_of_head
from hybrid.data import Example, load_examples
from hybrid.evaluation import accuracy_lines, by_depth, provenance, training_cost, write_results
from hybrid.generation import (
    answer_text,
    answer_token_ids,
    generate_texts,
    greedy_texts,
    is_answer,
    text_log_likelihoods,
    text_prompts,
)
from hybrid.lora import load_lora
from hybrid.model import HybridModel

PASSAGE = 400  # characters of a passage: half is read, half is predicted
NUM_PASSAGES = 300


def main(arguments: Sequence[str]) -> None:
    """Write the result file after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("head", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--split", default="valid", help="valid, test, or the name of another split of the data")
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--max_examples", type=int)
    parser.add_argument("--output", type=Path, required=True)
    parsed = parser.parse_args(arguments)
    config, role = config_of_head(parsed.head, parsed)
    examples, model = load_examples(config.data, role), HybridModel.from_pretrained(parsed.head)
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "split": parsed.split,
        "exact_match": [],
        **provenance(shlex.join(["python", "results/written.py", *arguments]), config.training.seed),
    }
    decoder = model.parameter_groups().get("text_decoder")
    costs = {"steered LLM": {"num_parameters": decoder, **training_cost(parsed.head)}}
    tuned = None
    if parsed.lora:
        tuned, num_parameters = load_lora(parsed.lora, model.config.backbone)
        costs["LoRA"] = {"num_parameters": num_parameters, **training_cost(parsed.lora)}
    results["unrelated"] = unrelated(model, tuned)
    write_results(parsed.output, results)
    for name, texts in written(model, examples, tuned):
        right = torch.tensor(
            [is_answer(text, answer_text(model.config.text, e)) for text, e in zip(texts, examples, strict=True)]
        )
        shown = [
            {"answer": answer_text(model.config.text, e), "text": t} for t, e in zip(texts[:8], examples, strict=False)
        ]
        results["exact_match"].append(
            {"name": name, **costs.get(name, {}), "accuracy_by_depth": by_depth(right, examples), "examples": shown}
        )
        write_results(parsed.output, results)
    print(table(results))


def written(model: HybridModel, examples: Sequence[Example], tuned: Backbone | None) -> Any:
    """What each writes after the same prompts: its name and the texts."""
    length = max(map(len, answer_token_ids(model.backbone.tokenizer, model.config.text, examples)))
    texts = [(example.context, example.question) for example in examples]
    prompts = [prompt.token_ids for prompt in text_prompts(model, texts)]
    yield "frozen LLM", greedy_texts(model.backbone, prompts, length)
    steered: list[str] = [""] * len(examples)
    for fields in {example.fields for example in examples}:
        rows = [row for row, example in enumerate(examples) if example.fields == fields]
        questions, contexts = [examples[row].question for row in rows], [examples[row].context for row in rows]
        found = generate_texts(
            model, questions, contexts=contexts, fields=fields, max_new_tokens=length, do_sample=False
        )
        for row, text in zip(rows, found, strict=True):
            steered[row] = text
    yield "steered LLM", steered
    if tuned is not None:
        yield "LoRA", greedy_texts(tuned, prompts, length)


def unrelated(model: HybridModel, tuned: Backbone | None) -> dict[str, Any]:
    """Perplexity of passages that have nothing to do with logic, with and without soft tokens, and with LoRA."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    starts = range(0, len(text) - PASSAGE, (len(text) - PASSAGE) // NUM_PASSAGES)
    passages = [text[start : start + PASSAGE] for start in starts][:NUM_PASSAGES]
    cuts = [passage.index(" ", PASSAGE // 2) for passage in passages]
    prompts = [(None, passage[:cut]) for passage, cut in zip(passages, cuts, strict=True)]
    rest = [passage[cut:] for passage, cut in zip(passages, cuts, strict=True)]
    num_tokens = sum(map(len, model.backbone.tokenizer(rest, add_special_tokens=False)["input_ids"]))
    steered = text_log_likelihoods(model, prompts, rest, suffix="")
    with silent(model):
        frozen = text_log_likelihoods(model, prompts, rest, suffix="")
        systems = {"frozen": frozen, "steered": steered}
        if tuned is not None:
            own = model.backbone
            model.attach_backbone(tuned)
            systems["lora"] = text_log_likelihoods(model, prompts, rest, suffix="")
            model.attach_backbone(own)
    perplexities = {
        name: math.exp(-sum(value for value, _ in values) / num_tokens) for name, values in systems.items()
    }
    changes = [(f - s) for (f, _), (s, _) in zip(frozen, steered, strict=True)]
    return {
        "n": len(passages),
        "num_tokens": num_tokens,
        **{f"perplexity_{name}": value for name, value in perplexities.items()},
        "change": perplexities["steered"] / perplexities["frozen"] - 1,
        "stderr_of_log": statistics.stdev(changes) * math.sqrt(len(changes)) / num_tokens,
    }


@contextmanager
def silent(model: HybridModel) -> Any:
    """The head with its gate shut: the frozen language model."""
    gate: Any = model.text_decoder.gate  # ty: ignore[unresolved-attribute]
    kept = {name: value.clone() for name, value in gate.state_dict().items()}
    gate.load_state_dict({name: torch.zeros_like(value) for name, value in kept.items()})
    try:
        yield
    finally:
        gate.load_state_dict(kept)


def table(results: dict[str, Any]) -> str:
    """Markdown table of exact match by depth, and a line on the other texts."""
    other, exact = results["unrelated"], accuracy_lines(*results["exact_match"])
    frozen = other["perplexity_frozen"]
    line = f"Perplexity of {other['n']} unrelated passages: {frozen:.2f} frozen"
    for name, told in (("steered", "steered"), ("lora", "LoRA")):
        if (value := other.get(f"perplexity_{name}")) is not None:
            line += f", {value:.2f} {told} ({100 * (value / frozen - 1):+.2f} %)"
    return f"{exact}\n\n{line}."


if __name__ == "__main__":
    main(sys.argv[1:])
