"""Entry point ``vllm.general_plugins``: makes our quantization methods and architectures known to vLLM."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.spense")
METHOD = "spense"
METHODS = (METHOD, "twell")
MODEL = "vllm_spense.serving.models.sparse_llama:SparseLlamaForCausalLM"
"""Imported by vLLM when it serves such a model."""
failure: str | None = None
"""Why the last :func:`register` failed; ``spense doctor`` shows it."""
_registered = False


def register() -> None:
    """Register methods and architectures; vLLM calls this once in each of its processes.

    Idempotent and lazy. Never raises: a failing plugin would stop vLLM for every model, so problems
    are logged here and explained by ``spense doctor``.
    """
    global _registered, failure
    if _registered:
        return
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.models.registry import ModelRegistry

        from vllm_spense.models.families import ACTIVATION_SPARSE
        from vllm_spense.serving.config import SpenseConfig
        from vllm_spense.serving.models.configs import register_configs
        from vllm_spense.serving.twell import TwellConfig

        for method, config in zip(METHODS, (SpenseConfig, TwellConfig), strict=True):
            register_quantization_config(method)(config)
        register_configs()
        for architecture in ACTIVATION_SPARSE:
            ModelRegistry.register_model(architecture, MODEL)
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
    """Take our names back out of vLLM's list: it asks every listed method about every quantized model."""
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

        for method in METHODS:
            if method in QUANTIZATION_METHODS:
                QUANTIZATION_METHODS.remove(method)
    except Exception:
        logger.debug("nothing to withdraw", exc_info=True)
