"""Which back end runs a linear layer: the first one that can, best first."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_spense.ops.activations import quantized
from vllm_spense.ops.backend import Backend, Tensors, select
from vllm_spense.ops.linear.arguments import LinearArguments
from vllm_spense.ops.linear.cpu import CpuBackend, CpuDenseBackend
from vllm_spense.ops.linear.cuda import CudaBackend
from vllm_spense.ops.linear.four_bit_cpu import FourBitCpuBackend
from vllm_spense.ops.linear.four_bit_cuda import FourBitCudaBackend
from vllm_spense.ops.linear.four_bit_triton import FourBitTritonBackend
from vllm_spense.ops.linear.op import linear
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.ops.linear.triton import TritonBackend


class ReferenceBackend:
    """The definition: keeps the weights compressed and decompresses them in every call. Runs anywhere."""

    name = "reference"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        return None if spec.one_by_one else f"it does not know {spec.codecs.title} weights"

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return LinearArguments.of(spec, tensors).prepared()

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        xq, xs = quantized(x, spec.activation_dtype)
        return linear(xq, xs, LinearArguments.of(spec, tensors, bias), x.dtype)


_BACKENDS: tuple[Backend[LinearSpec], ...] = (
    CudaBackend(),
    TritonBackend(),
    FourBitCudaBackend(),
    FourBitTritonBackend(),
    CpuBackend(),
    FourBitCpuBackend(),
    CpuDenseBackend(),
    ReferenceBackend(),
)
"""Best first."""


def available_backends() -> list[Backend[LinearSpec]]:
    """All back ends of this installation, best first."""
    return list(_BACKENDS)


def preferred_backend(device: torch.device) -> Backend[LinearSpec]:
    """What a layer with a 2:4 region should run on: the compiled kernels for its device.

    Its ``why_not`` is the reason why a layer on this device fell back to another one.
    """
    name = CpuBackend.name if device.type == "cpu" else CudaBackend.name
    return next(backend for backend in _BACKENDS if backend.name == name)


def any_backend(spec: LinearSpec, device: torch.device) -> Backend[LinearSpec] | None:
    """The first back end that can run a layer, if there is one."""
    return next((backend for backend in _BACKENDS if backend.why_not(spec, device) is None), None)


def select_backend(spec: LinearSpec, device: torch.device, name: str | None = None) -> Backend[LinearSpec]:
    """The first legal back end, or the named one; ``ValueError`` says why a named one cannot run."""
    return select(_BACKENDS, spec, device, name)
