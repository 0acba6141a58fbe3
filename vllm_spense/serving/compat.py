"""What vLLM versions have in different places or do differently, in one place. Tested range: 0.24 to 0.33.

Names that all of them have in one place are imported where they are used.
"""

from __future__ import annotations

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
)
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import BasevLLMParameter

__all__ = [
    "BasevLLMParameter",
    "LinearBase",
    "LinearMethodBase",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "UnquantizedLinearMethod",
    "init_fp8_linear_kernel",
    "initialize_online_processing",
    "kFp8DynamicTokenSym",
    "kFp8StaticChannelSym",
    "load_format",
    "request_amx",
]


def load_format() -> str:
    """``--load-format`` of the engine under construction, ``auto`` outside of one."""
    config = get_current_vllm_config_or_none()
    return "auto" if config is None else str(config.load_config.load_format)


def request_amx() -> None:
    """Ask the kernel for AMX tiles in this process, where the CPU has them.

    vLLM's attention and small GEMMs use tiles on such CPUs and count on an earlier oneDNN product to have
    asked. Spense layers replace those products, and an instruction that was not asked for kills the process.
    """
    request = getattr(torch.cpu, "_init_amx", None)  # torch's own way has no public name
    if request is not None:
        request()


def init_fp8_linear_kernel(**arguments):
    """vLLM's own FP8 kernel for dense layers (imported late: it pulls in every kernel package)."""
    from vllm.model_executor.kernels.linear import init_fp8_linear_kernel as init

    return init(**arguments)
