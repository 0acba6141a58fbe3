"""All that the plugin takes from vLLM, and what versions do differently. Tested range: 0.24 to 0.33.

Nothing else in the package imports vLLM, except the plugin's entry point. What a quantization config needs is
imported here at once. The rest pulls in vLLM's layers and kernels, which a process that serves another model
must not pay for, so each name is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

__all__ = [
    "QuantizationConfig",
    "QuantizeMethodBase",
    "init_fp8_linear_kernel",
    "init_logger",
    "load_format",
    "quantization_methods",
    "renamed",
    "request_amx",
    "safetensors_headers",
]

_LATE = {
    "vllm.distributed.communication_op": ("tensor_model_parallel_all_reduce",),
    "vllm.model_executor.layers.layernorm": ("RMSNorm",),
    "vllm.model_executor.layers.linear": (
        "ColumnParallelLinear",
        "LinearBase",
        "LinearMethodBase",
        "QKVParallelLinear",
        "ReplicatedLinear",
        "UnquantizedLinearMethod",
    ),
    "vllm.model_executor.layers.quantization.utils.quant_utils": (
        "kFp8DynamicTokenSym",
        "kFp8StaticChannelSym",
    ),
    "vllm.model_executor.model_loader.reload.layerwise": ("initialize_online_processing",),
    "vllm.model_executor.model_loader.weight_utils": ("default_weight_loader",),
    "vllm.model_executor.models.llama": ("LlamaAttention", "LlamaDecoderLayer", "LlamaForCausalLM"),
    "vllm.model_executor.models.utils": ("is_pp_missing_parameter",),
    "vllm.model_executor.parameter": ("BasevLLMParameter",),
}
"""vLLM's modules, and the names that this module has from each on first use."""


def __getattr__(name: str) -> Any:
    for module, names in _LATE.items():
        if name in names:
            found = globals()[name] = getattr(import_module(module), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def quantization_methods() -> list[str]:
    """Names of all methods that this vLLM knows, those of plugins among them."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return list(QUANTIZATION_METHODS)


def safetensors_headers(model: str, revision: str | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype (as safetensors spells it) and shape of every tensor of a directory or a repository, by name."""
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    found = get_safetensors_params_metadata(model, revision=revision)
    return {
        name: (str(info["dtype"]), tuple(info["shape"])) for name, info in found.items() if "dtype" in info
    }


def renamed(suffixes: dict[str, str]) -> Any:
    """vLLM's mapper that gives tensors of a checkpoint other endings while they are loaded."""
    from vllm.model_executor.models.utils import WeightsMapper

    return WeightsMapper(orig_to_new_suffix=suffixes)


def load_format() -> str:
    """``--load-format`` of the engine under construction, ``auto`` outside of one."""
    from vllm.config import get_current_vllm_config_or_none

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


def init_fp8_linear_kernel(**arguments: Any) -> Any:
    """vLLM's own FP8 kernel for dense layers (imported late: it pulls in every kernel package)."""
    from vllm.model_executor.kernels.linear import init_fp8_linear_kernel as init

    return init(**arguments)
