"""From a dense Hugging Face model to a Spense checkpoint. Needs transformers, but for the options alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_spense.pruning.config import PruneConfig
    from vllm_spense.pruning.pipeline import PruneReport, prune
    from vllm_spense.pruning.progress import PruneProgress

__all__ = ["PruneConfig", "PruneProgress", "PruneReport", "prune"]

_HOME = {"PruneConfig": "config", "PruneProgress": "progress", "PruneReport": "pipeline", "prune": "pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
