"""vllm-spense: 2:4 sparse + dense (Spense) FP8 linear layers for vLLM.

Most commands of the ``spense`` tool are one function here; the others are ``recovery.recover``,
``planning.plan`` and ``ops.tune.tune``. They are imported on first use, so that ``import vllm_spense`` needs
neither transformers nor vLLM. From then on ``from_pretrained`` of transformers reads Spense checkpoints
(:mod:`vllm_spense.hf`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm_spense.hf import announce

if TYPE_CHECKING:
    from vllm_spense.cli.demo import demo
    from vllm_spense.cli.doctor import doctor
    from vllm_spense.evaluation import evaluate
    from vllm_spense.format.report import inspect
    from vllm_spense.models.export import export
    from vllm_spense.pruning import PruneConfig, prune
    from vllm_spense.verification import verify

__version__ = "0.1.0"
__all__ = ["PruneConfig", "demo", "doctor", "evaluate", "export", "inspect", "prune", "verify"]

_HOME = {
    "PruneConfig": "vllm_spense.pruning",
    "prune": "vllm_spense.pruning",
    "evaluate": "vllm_spense.evaluation",
    "verify": "vllm_spense.verification",
    "export": "vllm_spense.models.export",
    "inspect": "vllm_spense.format.report",
    "doctor": "vllm_spense.cli.doctor",
    "demo": "vllm_spense.cli.demo",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


announce()
