"""Fused linears of a source model as their parts, on disk and in the model.

Both sides speak of ``mlp.gate_proj`` afterwards, so that nothing behind them knows about fusing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from vllm_spense.format import Checkpoint
from vllm_spense.format.checkpoint import TensorInfo
from vllm_spense.models.families import FUSED, family_of
from vllm_spense.models.fused import part_rows
from vllm_spense.sources import load_config


class SourceCheckpoint(Checkpoint):
    """A dense directory whose fused tensors appear as their parts (``tensors``, ``load``).

    Raises :class:`CheckpointError` as :class:`Checkpoint` does.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self._rows: dict[str, tuple[str, int, int]] = {}
        config: dict[str, Any] = {}
        for name, info in list(self.tensors.items()):
            module, _, kind = name.rpartition(".")
            parent, _, last = module.rpartition(".")
            if last not in family_of(self.config.get("model_type", "")).fused:
                continue
            del self.tensors[name]
            config = config or load_config(self.directory).to_dict()  # config.json may leave heads out
            for part, (start, stop) in part_rows(last, info.shape[0], config).items():
                full = f"{parent}.{part}.{kind}"
                self.tensors[full] = TensorInfo(info.file, info.dtype, (stop - start, *info.shape[1:]))
                self._rows[full] = name, start, stop

    def load(self, name: str) -> torch.Tensor:
        """One tensor on the CPU; of a fused one only the part's rows are read."""
        if name not in self._rows:
            return super().load(name)
        fused, start, stop = self._rows[name]
        with safe_open(self.tensors[name].file, framework="pt") as stream:
            return stream.get_slice(fused)[start:stop]


class SplitLinear(nn.Module):
    """A fused linear as one ``nn.Linear`` per part; its output is theirs side by side."""

    def __init__(self, linear: nn.Linear, rows: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        for part, (start, stop) in rows.items():
            child = nn.Linear(linear.in_features, stop - start, linear.bias is not None, device="meta")
            for kind, parameter in linear.named_parameters():
                setattr(child, kind, nn.Parameter(parameter.detach()[start:stop], requires_grad=False))
            self.add_module(part, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``."""
        return torch.cat([child(x) for child in self.children()], dim=-1)


def split_fused(model: nn.Module) -> None:
    """Replace every fused linear of a transformers ``model`` (on any device, meta too) by its parts."""
    config: Any = getattr(model, "config", None)
    fused = family_of(getattr(config, "model_type", "")).fused
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in fused and type(module) is nn.Linear:
            rows = part_rows(last, module.out_features, config.to_dict())
            setattr(model.get_submodule(parent), last, SplitLinear(module, rows))


def checkpoint_name(name: str) -> str:
    """Checkpoint name of a module or parameter of a split model: without the name of the fused linear."""
    path = name.split(".")
    return ".".join(
        step
        for step, following in zip(path, [*path[1:], ""], strict=True)
        if following not in FUSED.get(step, ())
    )
