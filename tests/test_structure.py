"""The house rules: import order, small start-up, no pickles, configs that parse."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hybrid"
# Each module may import only from those before it.
ORDER = [
    "config", "layers", "parallel", "backbone", "soft_prompt", "features", "adapter", "reasoner", "decoder", "schema",
    "losses", "hub", "model", "data", "batches", "refinement", "asking", "generation", "inference", "trace", "release",
    "evaluation", "baselines", "lora", "documents", "harness", "comparison", "stream", "weights", "preparation",
    "training", "quickstart", "bench", "cli",
]  # fmt: skip


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports when it is imported (not inside functions, not for types)."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hybrid."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "hybrid":
            names |= {alias.name for alias in node.names} - {"__version__"}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hybrid.")}
    return names


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_modules_import_only_from_above(name):
    assert imported(PACKAGE / f"{name}.py") <= set(ORDER[: ORDER.index(name)])


def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys; from hybrid.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert "quickstart" in run.stdout
    assert min(seconds) < 0.3


def test_public_names_are_lazy_and_there():
    code = (
        "import sys, hybrid; assert 'torch' not in sys.modules; "
        "print([getattr(hybrid, name) for name in hybrid.__all__])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_readme_says_what_the_result_files_say():
    run = subprocess.run(
        [sys.executable, str(PACKAGE.parent / "results" / "render.py"), "--check"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
