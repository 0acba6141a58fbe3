"""How a model is quantised already, from config.json, files that quantisers leave, and tensor names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of transformers, of older compressed-tensors and of MLX."""
_TENSORS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8 in blocks",
    ".weight.absmax": "bitsandbytes",
    ".weight.quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "_proj_blocks": "MXFP4",
}


def quantisation_of(config: Mapping[str, Any], directory: Path) -> str | None:
    """A method with its bits, as ``gptq, 4 bits``; None for models that are not quantised, and for Spense."""
    texts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for text in texts:  # multimodal models may have it inside text_config
        for key in _KEYS:
            found = text.get(key)
            if found is not None and (key != "quantization" or isinstance(found, dict)):
                return None if _is_spense(found) else _described(found, key)
    if config.get("_load_in_4bit") is True or config.get("_load_in_8bit") is True:
        return "bitsandbytes"
    return next((method for name, method in _FILES.items() if (directory / name).exists()), None)


def quantised_tensor(names: Iterable[str]) -> tuple[str, str] | None:
    """The first tensor that only quantised models have, and the method that leaves it; else None."""
    for name in names:
        for ending, method in _TENSORS.items():
            if name.endswith(ending):
                return name, method
    return None


def _is_spense(found: object) -> bool:
    return isinstance(found, dict) and found.get("quant_method") == "spense"


def _described(found: object, key: str) -> str:
    if not isinstance(found, dict):
        return f"{key} is {str(found)[:60]!r}"
    method = found.get("quant_method") or found.get("quant_algo") or found.get("format")
    if not isinstance(method, str):
        loads = found.get("load_in_4bit") or found.get("load_in_8bit")
        method = "bitsandbytes" if loads else "MLX" if key == "quantization" else "an unnamed method"
    bits = found.get("bits") or found.get("w_bit")
    return f"{method}, {bits} bits" if type(bits) is int else method
