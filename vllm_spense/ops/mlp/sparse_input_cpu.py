"""CPUs: rows of a transposed weight for the inputs that are not small, in compiled kernels on bf16 weights.

``spense::sparse_input_linear_cpu`` is the second half of ``spense::sparse_mlp_cpu`` (sparse_mlp_cpu.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.mlp.sparse_input import SparseInputSpec
from vllm_spense.ops.mlp.sparse_mlp_cpu import rows_apart, why_not_here, with_rows


class SparseInputCpuBackend:
    """The compiled kernels; x may have rows that lie apart."""

    name = "cpu"

    def why_not(self, spec: SparseInputSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on CPUs, not on {device.type}"
        if spec.dtype != torch.bfloat16:
            return f"the kernels take bf16 weights, not {spec.dtype}"
        return why_not_here()

    def prepare(self, spec: SparseInputSpec, weight: torch.Tensor) -> Tensors:
        return {"weight_packed": rows_apart(weight.t())}

    def apply(
        self,
        spec: SparseInputSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.ops.spense.sparse_input_linear_cpu(
            with_rows(x), tensors["weight_packed"], bias, spec.threshold
        )
