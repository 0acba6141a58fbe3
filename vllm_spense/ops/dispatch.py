"""Which back end runs a layer: a frozen spec, one legality predicate each, first legal one wins.

A back end turns the loaded checkpoint tensors into the tensors it computes on, once (``prepare``), and
runs one operator on them per forward (``apply``). Prepared shapes and dtypes depend on the spec
alone, so reloading weights can copy into the old storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_spense.ops.linear import dense_linear, full_weight, linear
from vllm_spense.ops.quantize import quantize_per_token

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LinearSpec:
    """Static facts of one layer as it lies on one rank.

    ``sparse_sizes``/``dense_sizes``: extents per fused shard along the split axis.
    """

    split: str
    out_features: int
    in_features: int
    sparse_sizes: tuple[int, ...]
    dense_sizes: tuple[int, ...]
    weight_dtype: torch.dtype

    @property
    def quantize_activations(self) -> bool:
        return self.weight_dtype == torch.float8_e4m3fn

    @property
    def hybrid(self) -> bool:
        """Whether there is a 2:4 region at all."""
        return sum(self.sparse_sizes) > 0


class Backend(Protocol):
    """One way to run a layer; stateless."""

    name: str

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        """None when this back end can run the layer there, else the reason in one line."""

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """From checkpoint tensors (all five names, empty regions included) to run-time tensors.

        The tensor ``weight_packed`` must be among them: vLLM's LoRA code looks for it.
        """

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """``x [M, K]`` to ``y [M, N]`` in x's dtype."""


def decompressed(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """fp32 ``[N, K]`` of a layer's checkpoint tensors: stored values, zeros written out, no scale."""
    return full_weight(
        tensors["sparse_values"],
        tensors["sparse_meta"],
        tensors["dense_weight"],
        list(spec.sparse_sizes),
        list(spec.dense_sizes),
        spec.split == "output",
    )


def _activations(spec: LinearSpec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    return quantize_per_token(x) if spec.quantize_activations else (x, None)


class CpuBackend:
    """Decompresses once at load to fp32 and multiplies densely: exact, and the fastest way on CPUs.

    Measured (docs/architecture.md): fp32 GEMM beats bf16 GEMM three to four times from 32 tokens on where the
    CPU has no bf16 instructions, and every decompression in the loop costs more than it saves.
    """

    name = "cpu"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"runs on CPUs, not on {device.type}"

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return {"weight_packed": decompressed(spec, tensors)} | _scale(tensors)

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        xq, xs = _activations(spec, x)
        return dense_linear(xq, xs, tensors["weight_packed"], tensors.get("weight_scale"), bias, x.dtype)


class ReferenceBackend:
    """The definition: keeps the weights compressed and decompresses them in every call. Runs anywhere."""

    name = "reference"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        return None

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        kept = {name: tensors[name] for name in ("sparse_values", "sparse_meta")}
        return kept | {"weight_packed": tensors["dense_weight"]} | _scale(tensors)

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        xq, xs = _activations(spec, x)
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


def _scale(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {"weight_scale": tensors["weight_scale"]} if "weight_scale" in tensors else {}


_BACKENDS: list[Backend] = [CpuBackend(), ReferenceBackend()]
"""Best first. ``cuda`` and ``triton`` will stand before these."""


def available_backends() -> list[Backend]:
    """All back ends of this installation, best first."""
    return list(_BACKENDS)


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
