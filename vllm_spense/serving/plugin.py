"""Entry point ``vllm.general_plugins``: makes ``quant_method: spense`` known to vLLM."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.spense")
METHOD = "spense"
failure: str | None = None
"""Why the last :func:`register` failed; ``spense doctor`` shows it."""
_registered = False


def register() -> None:
    """Register the quantization method; vLLM calls this once in each of its processes.

    Idempotent and lazy. Never raises: a failing plugin would stop vLLM for every model, so problems
    are logged here and explained by ``spense doctor``.
    """
    global _registered, failure
    if _registered:
        return
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from vllm_spense.serving.config import SpenseConfig

        register_quantization_config(METHOD)(SpenseConfig)
        _registered = True
        failure = None
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        logger.exception(
            "vllm-spense could not register with this vLLM; Spense checkpoints will not load. "
            "Run `spense doctor` for the reason"
        )
        _withdraw()


def _withdraw() -> None:
    """Take our name back out of vLLM's list: it asks every listed method about every quantized model."""
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

        if METHOD in QUANTIZATION_METHODS:
            QUANTIZATION_METHODS.remove(METHOD)
    except Exception:
        logger.debug("nothing to withdraw", exc_info=True)
