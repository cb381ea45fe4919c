"""What a saved head is, beside its weights: the folder check, the model card, the upload."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

CARD = """---
library_name: hybrid-reasoner
{base_model_line}{license_line}{datasets_line}tags: [recursive-reasoning, frozen-backbone]
---

# {name}

A {num_parameters:,}-parameter recursive reasoner on top of the frozen `{backbone}` (layers {layers}, template
`{template}`, memory of {memory}). Only the reasoner, its adapter and its decoder are in this folder; the language
model is loaded from where it is published.{trained_on}

```python
from hybrid import {imports}

model = HybridModel.from_pretrained("{where}")
{call}
```

Cycles in a refinement step: {num_cycles}, of {num_latent_passes} + 1 passes each. Steps at most: {max_steps}, halting
`{halting}`. It answers whatever it is asked, worded as in training or not, and can be sure of a wrong answer: see what
was measured. Written by hybrid {version}.

{results}
"""
WIDTH = 115  # of the card's prose
MAX_SHOWN = 8  # fields of an answer that the card shows


def holds_lora(folder: Path) -> bool:
    """Whether a folder is an adapter of `peft`, and no head."""
    return (folder / "adapter_config.json").exists()


def check_head_folder(folder: Path) -> None:
    """Refuse a folder that is no saved head, before anything is loaded.

    Raises:
        ValueError: A file is missing, or the folder holds pickled weights (they can run code when loaded).
    """
    if (folder / "best" / "config.json").exists():
        raise ValueError(f"{folder} is the folder of a run: its head is {folder / 'best'}")
    if holds_lora(folder):
        raise ValueError(f"{folder} holds a LoRA adapter, not a head: `hybrid eval` takes it, and `hybrid harness`")
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise ValueError(f"{folder} holds {pickles[0]}: pickled weights are refused, keep model.safetensors only")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} has no {name}: it is not a saved head (train one with `hybrid train`)")


def results_table(folder: Path) -> str:
    """Markdown table of the result files of a head: accuracy by depth with its 95% interval and n."""
    measured = []
    if (path := folder / "results.json").exists():
        results = json.loads(path.read_text())
        measured.append((results["split"], results["accuracy_by_depth"]))
    if (path := folder / "written.json").exists():  # of a head with a text decoder: exact match of greedy text
        results = json.loads(path.read_text())
        systems = {system["name"]: system["accuracy_by_depth"] for system in results["exact_match"]}
        measured.append((f"{results['split']}, in words", systems["steered LLM"]))
    if not measured:
        return "Not evaluated yet."
    lines = ["| set | depth | accuracy | 95% interval | n |", "|---|---|---|---|---|"]
    for name, rows in measured:
        for row in rows:
            low, high = row["interval"]
            lines.append(f"| {name} | {row['depth']} | {row['accuracy']:.3f} | {low:.3f}–{high:.3f} | {row['n']} |")
    return "\n".join(lines)


def recorded_call(folder: Path) -> tuple[str, str] | None:
    """What to import, and the call that asks the first question of a release, with its answer; `None` without one.

    Wording and layout matter to a head, so that its card shows a question as it was asked.
    """
    path = folder / "expected.json"
    if not path.exists():
        return None
    first = json.loads(path.read_text())[0]
    value, fields = first["value"], first.get("fields")
    if isinstance(value, dict) and len(value) > MAX_SHOWN:
        value = {**dict(list(value.items())[:MAX_SHOWN]), "…": f"{len(value)} fields"}
    call = ["answer = model.answer(", f"    {_literal(first['question'])},"]
    call += [f"    {name}={_literal(first[name])}," for name in ("context", "choices") if first.get(name)]
    if fields:
        if isinstance(fields, dict):
            fields = [{"name": name, "options": options} for name, options in fields.items()]
        options = [_literal(field["options"]) for field in fields]
        if len(set(options)) == 1:
            call.insert(0, f"options = {options[0]}")
            options = ["options"] * len(fields)
        places = ["" if field.get("at") is None else f", at={field['at']}" for field in fields]
        named = zip(fields, options, places, strict=True)
        shown = [f"        Field({_literal(field['name'])}, {text}{place})," for field, text, place in named]
        call += ["    fields=[", *shown, "    ],"]
    printed, said = "answer.value", str(value)
    if (written := first.get("text")) is not None:
        call.append("    explain=True,  # the language model writes it, too")
        printed, said = "answer.value, answer.text", f"{value} {written}"
    imports = "Field, HybridModel" if fields else "HybridModel"
    return imports, "\n".join([*call, ")", f"print({printed})", f"# {' '.join(said.split())}"])


def _literal(value: Any) -> str:
    """Texts, and lists and mappings of them, as Python that is also JSON."""
    return json.dumps(value, ensure_ascii=False)


def trained_on(run: Mapping[str, Any]) -> str:
    """What a run's configuration says of the rows it trained on, in one sentence; empty if nothing."""
    data, start = run.get("data", {}), run.get("training", {}).get("start_from")
    path, generator, hub_id = (data.get(name) for name in ("path", "reasoning_gym", "hub_id"))
    source = f"`{hub_id}`" if hub_id else f"reasoning-gym's `{generator}`" if generator else ""
    file = f"`{Path(path).name}`" if path else ""
    if not (source or file):
        return ""
    parts = [f"rows of {file}, in place of {source}" if source and file else source or file]
    if depths := data.get("train_depths"):
        reached = ", as far as its curriculum came" if run.get("training", {}).get("curriculum") else ""
        parts.append(f"depths {', '.join(map(str, depths))}{reached}")
    if most := data.get("max_train_examples"):
        parts.append(f"{most:,} rows at most")
    went_on = f"; it went on from the weights of `{'/'.join(Path(start).parts[-2:])}`" if start else ""
    said = f"Trained on {', '.join(parts)}{went_on}. Its configuration is `run.yaml`."
    return "\n" + textwrap.fill(said, WIDTH, break_long_words=False, break_on_hyphens=False)


def write_card(folder: Path, facts: dict[str, Any], license: str | None) -> None:
    """Write `README.md` from what lies in the same folder, nothing by hand.

    Accuracy comes from `results.json` and `written.json`, what the head was trained on from `run.yaml`.

    Args:
        folder: The saved head.
        facts: Values for the card's placeholders, from `HybridModel.card_facts`.
        license: Licence identifier of the head, left out if unknown: the training data may restrict it.
    """
    run = yaml.safe_load(path.read_text()) if (path := folder / "run.yaml").exists() else {}
    data = run.get("data", {})
    hub_id = facts["base_model"]
    lines = {
        "base_model_line": f"base_model: {hub_id}\n" if hub_id else "",
        "license_line": f"license: {license}\n" if license else "",
        "datasets_line": f"datasets: [{data['hub_id']}]\n" if data.get("hub_id") and not data.get("path") else "",
        "trained_on": trained_on(run),
    }
    general = f'print(model.answer("..."{facts["arguments"]}).value)'
    if facts["writes"]:
        general += '\nprint(model.generate_text("..."))  # the language model, steered'
    imports, call = recorded_call(folder) or (facts["imports"], general)
    shown = {"results": results_table(folder), "imports": imports, "call": call}
    where = folder.resolve()
    where = where.relative_to(Path.cwd()) if where.is_relative_to(Path.cwd()) else Path("path/to") / folder.name
    text = CARD.format(name=folder.name, where=where.as_posix(), **lines, **(facts | shown))
    (folder / "README.md").write_text(text)


def upload_folder(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a saved head as it is, its card included, and return its address.

    `push_to_hub` of transformers would overwrite the card, hence this function.
    """
    from huggingface_hub import HfApi

    check_head_folder(Path(folder))
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
