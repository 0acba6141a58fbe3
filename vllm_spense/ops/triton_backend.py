"""The back end for GPUs that the compiled kernels do not serve: one Triton kernel, sm_80 and later.

Triton itself is imported by the first call, so that this module can be imported without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch

from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.ops.backend import Tensors, scale_only
from vllm_spense.ops.quantize import quantize_per_token
from vllm_spense.ops.spec import LinearSpec

OLDEST = (8, 0)
FP8_TENSOR_CORES = (8, 9)
"""First compute capability that multiplies e4m3; below, activations keep their dtype (W8A16)."""


@torch.library.custom_op("spense::triton_linear", mutates_args=(), device_types=("cpu", "cuda"))
def triton_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    sparse_values: torch.Tensor,
    sparse_meta: torch.Tensor,
    dense_weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    sparse_sizes: list[int],
    dense_sizes: list[int],
    output_split: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``spense::linear`` by the kernel of :mod:`vllm_spense.ops.triton_linear`, opaque to compilers.

    On CPUs it runs only in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is first imported).
    """
    from vllm_spense.ops import triton_linear as kernel

    return kernel.triton_linear(
        *(x, x_scale, sparse_values, sparse_meta, dense_weight, weight_scale, bias),
        *(sparse_sizes, dense_sizes, output_split, out_dtype),
    )


@triton_linear.register_fake
def _(
    x,
    x_scale,
    sparse_values,
    sparse_meta,
    dense_weight,
    weight_scale,
    bias,
    sparse_sizes,
    dense_sizes,
    output_split,
    out_dtype,
):
    rows = sum(sparse_sizes) + sum(dense_sizes) if output_split else dense_weight.shape[0]
    return x.new_empty((x.shape[0], rows), dtype=out_dtype)


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; a constant to ``torch.compile`` once a layer is prepared."""
    return torch.cuda.get_device_capability(device)


class TritonBackend:
    """Compressed weights as they are in the checkpoint, decompressed in registers; FP8 weights only."""

    name = "triton"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip:
            return f"runs on NVIDIA GPUs, not on {'ROCm' if torch.version.hip else device.type}"
        if spec.codecs != UNIFORM_FP8:
            return "the kernel takes FP8 weights"
        capability = _capability(device)
        if capability < OLDEST:
            return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
        try:
            import_module("triton")
        except ImportError as error:
            return f"Triton cannot be imported: {error}"
        return None

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        torch.compiler.assume_constant_result(_capability)  # imports Dynamo (and Triton): not at import
        kept = {name: tensors[name].contiguous() for name in ("sparse_values", "sparse_meta")}
        return kept | {"weight_packed": tensors["dense_weight"].contiguous()} | scale_only(tensors)

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        quantised = _capability(x.device) >= FP8_TENSOR_CORES
        xq, xs = quantize_per_token(x) if quantised else (x, None)
        return triton_linear(
            *(xq, xs, tensors["sparse_values"], tensors["sparse_meta"], tensors["weight_packed"]),
            *(tensors.get("weight_scale"), bias, list(spec.sparse_sizes), list(spec.dense_sizes)),
            *(spec.split == "output", x.dtype),
        )
