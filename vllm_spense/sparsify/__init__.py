"""Thresholds for a model whose activation leaves no zeros: small inputs of down are skipped, no training.

Needs transformers, but for the options alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_spense.sparsify.config import SparsifyConfig
    from vllm_spense.sparsify.pipeline import SparsifyReport, sparsify

__all__ = ["SparsifyConfig", "SparsifyReport", "sparsify"]

_HOME = {"SparsifyConfig": "config", "SparsifyReport": "pipeline", "sparsify": "pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
