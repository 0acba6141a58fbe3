"""Entry point ``vllm.general_plugins``: makes ``quant_method: spense`` known to vLLM."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.spense")
METHOD = "spense"
_registered = False


def register() -> None:
    """Register the quantization method; vLLM calls this once in each of its processes.

    Idempotent and lazy. Never raises: a failing plugin would stop vLLM for every model, so problems
    are logged here and explained by ``spense doctor``.
    """
    global _registered
    if _registered:
        return
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from vllm_spense.serving.config import SpenseConfig

        register_quantization_config(METHOD)(SpenseConfig)
        _registered = True
    except Exception:
        logger.exception(
            "vllm-spense could not register with this vLLM; Spense checkpoints will not load. "
            "Run `spense doctor` for the reason"
        )
