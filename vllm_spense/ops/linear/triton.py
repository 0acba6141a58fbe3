"""The back end for GPUs that the compiled kernels do not serve: one Triton kernel, sm_80 and later.

Triton itself is imported by the first call, so that this module can be imported without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch

from vllm_spense.format.codecs.fp8 import FP8_DTYPE
from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.ops.activations import quantized
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.arguments import LinearArguments
from vllm_spense.ops.linear.op import empty_output, operator
from vllm_spense.ops.linear.spec import LinearSpec

OLDEST = (8, 0)
FP8_TENSOR_CORES = (8, 9)
"""First compute capability that multiplies e4m3; below, activations keep their dtype (W8A16)."""


def _compute(
    x: torch.Tensor, x_scale: torch.Tensor | None, layer: LinearArguments, out_dtype: torch.dtype
) -> torch.Tensor:
    from vllm_spense.ops.linear.triton_kernel import multiply

    return multiply(x, x_scale, layer, out_dtype)


_triton_linear = operator("triton_linear", "Tensor", cpu=_compute, cuda=_compute, fake=empty_output)


def triton_linear(
    x: torch.Tensor, x_scale: torch.Tensor | None, layer: LinearArguments, out_dtype: torch.dtype
) -> torch.Tensor:
    """``spense::linear`` by the kernel of :mod:`vllm_spense.ops.linear.triton_kernel`.

    On CPUs it runs only in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is first imported).
    """
    return _triton_linear(x, x_scale, *layer.flat(), out_dtype)


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; a constant to ``torch.compile`` once a layer is prepared."""
    return torch.cuda.get_device_capability(device)


def why_no_triton(device: torch.device) -> str | None:
    """None where Triton runs our kernels, else the reason in one line."""
    if device.type != "cuda" or torch.version.hip:
        return f"runs on NVIDIA GPUs, not on {'ROCm' if torch.version.hip else device.type}"
    capability = _capability(device)
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
    try:
        import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


class TritonBackend:
    """Compressed weights as they are in the checkpoint, decompressed in registers; FP8 weights only."""

    name = "triton"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        if spec.codecs != UNIFORM_FP8:
            return f"the kernel takes FP8 weights, not {spec.codecs.title}"
        return why_no_triton(device)

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        torch.compiler.assume_constant_result(_capability)  # imports Dynamo (and Triton): not at import
        layer = LinearArguments.of(spec, tensors)
        return {name: tensor.contiguous() for name, tensor in layer.prepared().items()}

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        xq, xs = quantized(x, FP8_DTYPE if _capability(x.device) >= FP8_TENSOR_CORES else None)
        return triton_linear(xq, xs, LinearArguments.of(spec, tensors, bias), x.dtype)
