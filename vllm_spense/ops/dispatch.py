"""Which back end runs a layer: a frozen spec, one legality predicate each, first legal one wins."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_spense.ops.backend import Backend, Tensors, activations, scale_only
from vllm_spense.ops.cpu_backend import CpuBackend, CpuDenseBackend
from vllm_spense.ops.cuda_backend import CudaBackend
from vllm_spense.ops.linear import linear
from vllm_spense.ops.spec import LinearSpec
from vllm_spense.ops.triton_backend import TritonBackend


class ReferenceBackend:
    """The definition: keeps the weights compressed and decompresses them in every call. Runs anywhere."""

    name = "reference"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        return None

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        kept = {name: tensors[name] for name in ("sparse_values", "sparse_meta")}
        return kept | {"weight_packed": tensors["dense_weight"]} | scale_only(tensors)

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        xq, xs = activations(spec, x)
        return linear(
            xq,
            xs,
            tensors["sparse_values"],
            tensors["sparse_meta"],
            tensors["weight_packed"],
            tensors.get("weight_scale"),
            bias,
            list(spec.sparse_sizes),
            list(spec.dense_sizes),
            spec.split == "output",
            x.dtype,
        )


_BACKENDS: list[Backend] = [
    CudaBackend(),
    TritonBackend(),
    CpuBackend(),
    CpuDenseBackend(),
    ReferenceBackend(),
]
"""Best first."""


def available_backends() -> list[Backend]:
    """All back ends of this installation, best first."""
    return list(_BACKENDS)


def preferred_backend(device: torch.device) -> Backend:
    """What a layer with a 2:4 region should run on: the compiled kernels for its device.

    Its ``why_not`` is the reason why a layer on this device fell back to another one.
    """
    name = CpuBackend.name if device.type == "cpu" else CudaBackend.name
    return next(backend for backend in _BACKENDS if backend.name == name)


def select_backend(spec: LinearSpec, device: torch.device, name: str | None = None) -> Backend:
    """The first legal back end, or the named one; ``ValueError`` says why a named one cannot run."""
    for backend in _BACKENDS:
        reason = backend.why_not(spec, device)
        if name is None and reason is None:
            return backend
        if name == backend.name:
            if reason is not None:
                raise ValueError(f"back end {name!r} cannot run this layer: {reason}")
            return backend
    known = ", ".join(b.name for b in _BACKENDS)
    raise ValueError(f"unknown back end {name!r} (known: {known})")
