"""Relufication: a model with ReLU in place of its gates' SiLU (ReLU Strikes Back, arXiv 2310.04564)."""

from __future__ import annotations

from typing import Any

from torch import nn

from vllm_spense.format import Checkpoint, CheckpointError
from vllm_spense.format.checkpoint import CONFIG_NAME

ARCHITECTURE = "SparseLlamaForCausalLM"
"""Under which the plugin serves the result; transformers goes by ``model_type`` and builds a Llama."""
_ACTIVATIONS = ("silu", "swish", "relu")


def check_gates(checkpoint: Checkpoint) -> None:
    """:class:`CheckpointError` unless it is a Llama whose gates are SiLU, or ReLU already."""
    kind, activation = (checkpoint.config.get(key) for key in ("model_type", "hidden_act"))
    if kind != "llama" or activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"model_type {str(kind)[:80]!r} with hidden_act {str(activation)[:80]!r}: --activation relu "
            f"takes Llama models (model_type 'llama') with {' or '.join(map(repr, _ACTIVATIONS))}",
            file=checkpoint.directory / CONFIG_NAME,
            fix="train without --activation, or give a Llama model",
        )


def open_with_relu(model: nn.Module) -> None:
    """Let every MLP of a transformers Llama have ReLU gates."""
    mlps: list[Any] = [module for module in model.modules() if hasattr(module, "act_fn")]
    for mlp in mlps:
        mlp.act_fn = nn.ReLU()


def relu_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the result."""
    return config | {"hidden_act": "relu", "architectures": [ARCHITECTURE]}
