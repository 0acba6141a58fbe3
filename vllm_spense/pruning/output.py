"""The files of a pruned model: packed layers, untouched tensors, config, provenance, model card."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vllm_spense.format import (
    FP8_DTYPE,
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    Layout,
    ModuleSpec,
    SpenseCheckpointConfig,
    pack_linear,
)
from vllm_spense.pruning.calibration import CalibrationText
from vllm_spense.pruning.card import model_card
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.layer import PrunedLayer


@dataclass(frozen=True)
class Written:
    """Facts about a finished checkpoint."""

    mlp_sparsity: float
    tensor_parallel_sizes: list[int]


class OutputBuilder:
    """Collects pruned layers into a writer, then adds everything else of the source."""

    def __init__(self, writer: CheckpointWriter, source: Checkpoint, config: PruneConfig) -> None:
        self.writer = writer
        self.source = source
        self.config = config
        self.dtype = FP8_DTYPE if config.weight_dtype == "fp8" else torch.bfloat16
        self.modules: dict[str, ModuleSpec] = {}
        self._mlp_weights = 0
        self._mlp_zeros = 0

    def add_layer(self, layer: PrunedLayer) -> None:
        """Pack and queue the linears of one layer."""
        for name, layout in layer.layouts.items():
            weight = layer.weights[name].cpu()
            self._require(f"{name}.weight", tuple(weight.shape))
            bias = self._bias(name, layout, layer)
            tensors = pack_linear(weight, layout, weight_dtype=self.dtype, bias=bias)
            for short, tensor in tensors.items():
                self.writer.add(f"{name}.{short}", tensor)
            self.modules[name] = ModuleSpec.of(layout, bias is not None)
            if name in layer.losses:
                self._mlp_weights += weight.numel()
                self._mlp_zeros += layout.sparse_shape[0] * layout.sparse_shape[1] // 2

    def finish(
        self,
        base_model: str,
        text: CalibrationText | None,
        losses: dict[str, float],
        damping: dict[str, float],
    ) -> Written:
        """Add the remaining tensors and all files."""
        self._copy_rest()
        sizes = tensor_parallel_sizes([spec.layout() for spec in self.modules.values()], self.config.max_tp)
        fp8 = self.config.weight_dtype == "fp8"
        provenance = self._provenance(base_model, text, losses, damping)
        quantization = SpenseCheckpointConfig(
            weight_dtype="float8_e4m3fn" if fp8 else "bfloat16",
            activation_scheme="dynamic_per_token" if fp8 else "none",
            tensor_parallel_sizes=sizes,
            ignore=self._ignored(),
            modules=self.modules,
            provenance=provenance,
        )
        dumped = quantization.model_dump(mode="json")
        self.writer.write_config(self.source.config | {"quantization_config": dumped})
        self.writer.copy_side_files(self.source.directory)
        sparsity = self._mlp_zeros / self._mlp_weights if self._mlp_weights else 0.0
        card = model_card(base_model, self.config, sparsity, sizes, losses, provenance)
        self.writer.write_text("README.md", card)
        return Written(sparsity, sizes)

    def _bias(self, name: str, layout: Layout, layer: PrunedLayer) -> torch.Tensor | None:
        full = f"{name}.bias"
        if full not in self.source.tensors:
            return None
        bias = self.source.load(full)
        order = layer.row_order.get(name)
        return bias if order is None else bias[order]

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        info = self.source.tensors.get(name)
        if info is None or info.shape != shape:
            found = "is not there" if info is None else f"has shape {list(info.shape)}"
            raise CheckpointError(
                f"the model needs this tensor with shape {list(shape)}, and in the file it {found}",
                file=self.source.directory,
                tensor=name,
                fix="convert the model with transformers' save_pretrained first",
            )

    def _copy_rest(self) -> None:
        packed = {f"{name}.{short}" for name in self.modules for short in ("weight", "bias")}
        for name in sorted(set(self.source.tensors) - packed):
            self.writer.add(name, self.source.load(name))

    def _ignored(self) -> list[str]:
        """Modules with a matrix that stay as they are: the head, and attention of bf16 checkpoints."""
        weights = (n for n, info in self.source.tensors.items() if len(info.shape) == 2)
        names = {n.removesuffix(".weight") for n in weights if n.endswith(".weight")}
        embeddings = {n for n in names if "embed" in n}
        return sorted((names | {"lm_head"}) - embeddings - set(self.modules))

    def _provenance(
        self,
        base_model: str,
        text: CalibrationText | None,
        losses: dict[str, float],
        damping: dict[str, float],
    ) -> dict[str, Any]:
        options = self.config.model_dump(exclude={"overwrite", "calibration"})
        return {
            "base_model": base_model,
            "options": options,
            "calibration": None if text is None else {"source": text.source, "sha256": text.sha256},
            "versions": _versions(),
            "losses": {name: float(f"{loss:.6g}") for name, loss in losses.items()},
            "raised_damping": damping,
        }


def tensor_parallel_sizes(layouts: list[Layout], max_tp: int) -> list[int]:
    """Powers of two up to ``max_tp`` into which every layer with a 2:4 region can be cut."""
    hybrid = [layout for layout in layouts if layout.sparse]
    sizes = [1]
    while sizes[-1] * 2 <= max_tp and all(layout.shardable(layout.split, sizes[-1] * 2) for layout in hybrid):
        sizes.append(sizes[-1] * 2)
    return sizes


def _versions() -> dict[str, str]:
    found = {}
    for package in ("vllm-spense", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
