"""Every released head answers, on the real backbone, as it did when it was released."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybrid.backbone import Backbone
from hybrid.hub import recorded_call
from hybrid.release import differences

ADAPTERS = sorted(path.parent for path in (Path(__file__).parent.parent / "adapters").glob("*/config.json"))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_released_head_reproduces_its_stored_answers(folder, capsys):
    backbone = Backbone.from_pretrained("smollm2")
    assert differences(folder, backbone) == []
    card = (folder / "README.md").read_text()
    assert recorded_call(folder)[1] in card
    exec(card.split("```python\n")[1].split("```")[0].replace(f"adapters/{folder.name}", str(folder)), {})
    recorded = json.loads((folder / "expected.json").read_text())[0]
    said = f"{recorded['value']} {recorded['text']}" if "text" in recorded else str(recorded["value"])
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_there_are_released_heads():
    assert ADAPTERS
    for folder in ADAPTERS:
        names = {path.name for path in folder.iterdir()}
        assert {"README.md", "model.safetensors", "run.yaml", "log.jsonl", "results.json", "expected.json"} <= names
