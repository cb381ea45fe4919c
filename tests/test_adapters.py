"""Every released head answers, on the real backbone, as it did when it was released."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybrid.backbone import Backbone
from hybrid.release import differences

ADAPTERS = sorted(path.parent for path in (Path(__file__).parent.parent / "adapters").glob("*/config.json"))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_released_head_reproduces_its_stored_answers(folder, capsys):
    backbone = Backbone.from_pretrained("smollm2")
    assert differences(folder, backbone) == []
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]  # of the card, as it stands
    exec(code.partition("print(model.generate_text")[0].replace(f"path/to/{folder.name}", str(folder)), {})
    recorded = json.loads((folder / "expected.json").read_text())[0]["value"]
    assert capsys.readouterr().out.splitlines()[-1] == str(recorded)


def test_there_are_released_heads():
    assert ADAPTERS
    for folder in ADAPTERS:
        names = {path.name for path in folder.iterdir()}
        assert {"README.md", "model.safetensors", "run.yaml", "log.jsonl", "results.json", "expected.json"} <= names
