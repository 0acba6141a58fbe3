"""Train a pruned checkpoint for a few minutes towards its dense original. Needs transformers, but for the
options alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_spense.recovery.config import RecoveryConfig
    from vllm_spense.recovery.pipeline import RecoveryReport, recover
    from vllm_spense.recovery.training import RecoveryError, RecoveryProgress

__all__ = ["RecoveryConfig", "RecoveryError", "RecoveryProgress", "RecoveryReport", "recover"]

_HOME = {
    "RecoveryConfig": "config",
    "RecoveryError": "training",
    "RecoveryProgress": "training",
    "RecoveryReport": "pipeline",
    "recover": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
