"""What a checkpoint contains, in numbers: for ``spense inspect``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spense.format.bitsandbytes import open_checkpoint
from vllm_spense.format.linear import UNIFORM_FP8, Codecs, LinearFormat
from vllm_spense.format.schema import ModuleSpec


@dataclass(frozen=True)
class ModuleReport:
    """One linear layer: extents, sparsity (share of weights that are zero) and bytes on disk."""

    name: str
    spec: ModuleSpec
    sparsity: float
    stored_bytes: int
    dense_bytes: int
    loss: float | None
    codecs: Codecs = UNIFORM_FP8

    @property
    def dense_ratio(self) -> float:
        """Share of the weights that lie in the dense region."""
        return 1 - 2 * self.sparsity

    @property
    def attention(self) -> bool:
        return ".self_attn." in self.name or ".linear_attn." in self.name


@dataclass(frozen=True)
class CheckpointReport:
    """All linear layers of a checkpoint; ``dense_bytes`` are those of the same layers unpruned."""

    directory: Path
    weight_dtype: str
    tensor_parallel_sizes: list[int]
    modules: list[ModuleReport]
    total_bytes: int
    provenance: dict[str, Any]

    @property
    def title(self) -> str:
        """What people call the codecs."""
        return " and ".join(sorted({m.codecs.title for m in self.modules}))

    @property
    def hybrid(self) -> list[ModuleReport]:
        return [m for m in self.modules if m.spec.sparse]

    @property
    def stored_bytes(self) -> int:
        return sum(m.stored_bytes for m in self.modules)

    @property
    def dense_bytes(self) -> int:
        return sum(m.dense_bytes for m in self.modules)

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of the layers that have a 2:4 region."""
        return sparsity(self.hybrid)

    @property
    def mlp_sparsity(self) -> float:
        """The same without attention."""
        return sparsity([m for m in self.hybrid if not m.attention])

    @property
    def dense_ratio(self) -> float:
        """Dense share of the MLP weights that have a 2:4 region; 1 when there are none."""
        return 1 - 2 * self.mlp_sparsity


def sparsity(modules: list[ModuleReport]) -> float:
    """Share of zeros among the weights of ``modules``; 0 when there are none."""
    weights = sum(m.spec.out_features * m.spec.in_features for m in modules)
    zeros = sum(m.sparsity * m.spec.out_features * m.spec.in_features for m in modules)
    return zeros / weights if weights else 0.0


def inspect(directory: str | Path) -> CheckpointReport:
    """Read config and headers of a Spense or bitsandbytes checkpoint; raises :class:`CheckpointError`."""
    checkpoint = open_checkpoint(directory)
    config = checkpoint.require_spense()
    losses = config.provenance.get("losses", {})
    modules = []
    for name, spec in config.modules.items():
        linear = checkpoint.linear(name)
        layout = linear.layout
        weights = spec.out_features * spec.in_features
        pruned = layout.sparse_shape[0] * layout.sparse_shape[1]
        stored = checkpoint.stored_bytes(name)
        dense = LinearFormat(layout.without_sparsity, linear.codecs).nbytes() if layout.sparse else stored
        loss = losses.get(name) if isinstance(losses, dict) else None
        modules.append(ModuleReport(name, spec, pruned / 2 / weights, stored, dense, loss, linear.codecs))
    total = sum(f.stat().st_size for f in {t.file for t in checkpoint.tensors.values()})
    return CheckpointReport(
        checkpoint.directory,
        config.weight_dtype if config.version == 1 else " and ".join(c.name for c in config.all_codecs()),
        config.tensor_parallel_sizes,
        modules,
        total,
        config.provenance,
    )
