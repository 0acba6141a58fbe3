"""The back ends for CPUs: compiled kernels on compressed weights, and dense fp32 where they cannot run."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.ops import cpu_linear
from vllm_spense.ops.backend import Tensors, activations, decompressed, regions, scale_only
from vllm_spense.ops.linear import dense_linear
from vllm_spense.ops.spec import LinearSpec
from vllm_spense.ops.widen import widened_weight


class CpuBackend:
    """Compressed weights, widened in registers: less memory to read per token than any dense matrix.

    Quantises activations itself, as :func:`vllm_spense.ops.quantize_per_token` does.
    """

    name = "cpu"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on CPUs, not on {device.type}"
        if spec.codecs != UNIFORM_FP8:
            return "the kernels take FP8 weights"
        return cpu_linear.why_not_here()

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        values, meta, dense = cpu_linear.interleave(spec, *regions(spec, tensors)[:3])
        return {
            "sparse_values": values,
            "sparse_meta": meta,
            "weight_packed": dense,
            "weight_scale": tensors["weight_scale"],
        }

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.ops.spense.linear_cpu(
            *(x.contiguous(), tensors["sparse_values"], tensors["sparse_meta"], tensors["weight_packed"]),
            *(tensors["weight_scale"], bias, list(spec.sparse_sizes), list(spec.dense_sizes)),
            spec.split == "output",
        )


class CpuDenseBackend:
    """Decompressed once at load to fp32, in which e4m3 is exact: for CPUs and weights without kernels."""

    name = "cpu-fp32"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"runs on CPUs, not on {device.type}"

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        e4m3 = spec.codecs == UNIFORM_FP8
        weight = widened_weight(*regions(spec, tensors)) if e4m3 else decompressed(spec, tensors).float()
        return {"weight_packed": weight} | scale_only(tensors)

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        xq, xs = activations(spec, x)
        return dense_linear(xq, xs, tensors["weight_packed"], tensors.get("weight_scale"), bias, x.dtype)
