"""Keys of config.json that say how and where somebody ran the model, not what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
EXPERTS = ("_experts_implementation", "experts_implementation", "_experts_implementation_internal")
OUTPUTS = {
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "torchscript": False,
}
"""What calls of a model return, as our own calls expect it."""


def portable(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """``config`` without what a copy of the model cannot keep, and the keys that are left out.

    These are ``auto_map``, for code is never copied, and kernels (flash attention) that another machine
    may lack, in parts like ``text_config`` too.
    """
    kept, dropped = _without(config, (*ATTENTION, *EXPERTS), "")
    if "auto_map" in kept:
        del kept["auto_map"]
        dropped.append("auto_map")
    return kept, dropped


def _without(node: Mapping[str, Any], keys: tuple[str, ...], path: str) -> tuple[dict[str, Any], list[str]]:
    kept: dict[str, Any] = {}
    dropped = []
    for key, value in node.items():
        if key in keys:
            dropped.append(path + key)
        elif key.endswith("_config") and isinstance(value, dict) and key != "quantization_config":
            kept[key], inside = _without(value, keys, f"{path}{key}.")
            dropped += inside
        else:
            kept[key] = value
    return kept, dropped
