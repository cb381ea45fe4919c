"""A small recursive reasoner on top of any frozen Hugging Face language model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid.backbone import Backbone
    from hybrid.config import HybridConfig, RunConfig
    from hybrid.decoder import Field
    from hybrid.inference import Answer, answer_batch
    from hybrid.model import HybridModel
    from hybrid.training import train

__version__ = "0.1.0.dev0"
__all__ = ["Answer", "Backbone", "Field", "HybridConfig", "HybridModel", "RunConfig", "answer_batch", "train"]

_MODULES = {
    "Answer": "inference",
    "Backbone": "backbone",
    "Field": "decoder",
    "HybridConfig": "config",
    "HybridModel": "model",
    "RunConfig": "config",
    "answer_batch": "inference",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import hybrid` and `hybrid --help` stay quick."""
    if name not in _MODULES:
        raise AttributeError(f"module 'hybrid' has no attribute {name!r}")
    return getattr(import_module(f"hybrid.{_MODULES[name]}"), name)
