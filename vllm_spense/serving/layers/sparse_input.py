"""The linear method of layers that skip inputs that are zero, or not above a threshold."""

from __future__ import annotations

from typing import Any

import torch

from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.mlp.select import select_sparse_input
from vllm_spense.ops.mlp.sparse_input import SparseInputBackend, SparseInputSpec
from vllm_spense.serving import compat
from vllm_spense.serving.layers.prepared import PreparedMethod, make_loader, wanted_backend
from vllm_spense.serving.summary import SparsitySummary


class SparseInputLinearMethod(PreparedMethod, compat.LinearMethodBase):
    """A layer of one module; inputs with ``|x| <= threshold`` are taken as zero."""

    spec: SparseInputSpec
    backend: SparseInputBackend

    def __init__(
        self, prefix: str, threshold: float, density: float | None, summary: SparsitySummary
    ) -> None:
        super().__init__(prefix, summary)
        self.threshold = threshold
        self.density = density

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """``weight [N, K]``, this rank's part of it."""
        outputs = sum(output_partition_sizes)
        self.spec = SparseInputSpec(
            input_size_per_partition, outputs, self.threshold, params_dtype, self.density
        )
        rank, size = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        axis = 1 if input_size_per_partition < input_size else 0
        split = input_size_per_partition < input_size or outputs < output_size
        cut = (axis, rank, size) if split else None
        self.parameter(layer, "weight", "weight", (output_size, input_size), params_dtype, cut)
        # vLLM registers a bias after this call with `layer.weight_loader`, and counts no arrivals.
        cut = (0, rank, size) if split and axis == 0 else None
        layer.weight_loader = make_loader(self.loaded, "bias", f"{self.prefix}.bias", (output_size,), cut)
        layer.orig_dtype = params_dtype
        assert self.summary is not None
        self.summary.expect(layer)

    def prepare(self, tensors: Tensors, device: torch.device) -> Tensors:
        self.backend = select_sparse_input(self.spec, device, wanted_backend())
        return self.backend.prepare(self.spec, tensors["weight"])

    @property
    def backend_name(self) -> str:
        return self.backend.name

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., K]`` to ``y [..., N]`` in x's dtype."""
        y = self.backend.apply(self.spec, self.tensors(layer), x.reshape(-1, x.shape[-1]), bias)
        return y.view(*x.shape[:-1], y.shape[-1])
