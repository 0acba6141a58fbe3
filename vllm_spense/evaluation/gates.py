"""Gates of published activation-sparse models that transformers knows by code of theirs alone, which is never
run: SparseLM, ProSparse, Bamboo and TurboSparse-Mistral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.published import BAMBOO, PLAIN_LLAMA, PROSPARSE, SPARSELM, activation_sparse

_UNKNOWN = ("fatrelu", "drelu")
"""Values of ``hidden_act`` that transformers lacks."""


class Gate(nn.Module):
    """An ``act_fn``: what ``activation`` lets through of a gate, in its dtype."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return self.activation.of_gate(gate).to(gate.dtype)


def own_activation(config: Mapping[str, Any], file: object) -> Activation | None:
    """The activation that config.json means; None where transformers' class for it computes that.

    Raises :class:`~vllm_spense.format.CheckpointError` for a published model whose fields are none of its.
    """
    kind, name = config.get("model_type"), config.get("hidden_act")
    if kind in (SPARSELM, PROSPARSE, BAMBOO) or (kind in PLAIN_LLAMA and name in _UNKNOWN):
        return activation_sparse(config, file).activation
    return None


def use(activation: Activation, model: nn.Module) -> None:
    """Let every gated MLP of a transformers model, Llama or Mistral, compute ``activation``."""
    mlps: list[Any] = [module for module in model.modules() if hasattr(module, "act_fn")]
    for mlp in mlps:
        mlp.act_fn = Gate(activation)
        if activation.kind == "drelu":
            mlp.up_proj.register_forward_hook(lambda module, inputs, up: up.clamp_min(0))
