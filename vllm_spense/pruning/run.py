"""What the stages of one pruning run share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_spense.pruning.activations import LayerInputs, in_memory, on_disk
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.progress import Clock
from vllm_spense.pruning.resume import WorkDirectory
from vllm_spense.pruning.source import SourceModel
from vllm_spense.pruning.targets import LayerTargets
from vllm_spense.sources import BaseModel


@dataclass(frozen=True)
class Run:
    """One run: the dense model and its name, what is pruned of its layers, where unfinished work lies, and
    the clock that tells how far it is."""

    source: SourceModel
    base: BaseModel
    config: PruneConfig
    targets: list[LayerTargets]
    work: WorkDirectory
    clock: Clock

    def embed(self, windows: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> LayerInputs:
        """``windows [samples, seq]`` in front of the first layer, kept in ``dtype`` where the config says."""
        source = self.source
        allocate = on_disk(self.work.path) if self.config.cache_activations == "disk" else in_memory
        with source.resident(*source.embedding()):
            return LayerInputs(source.network, windows, source.device, dtype=dtype, allocate=allocate)
