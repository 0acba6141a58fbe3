"""How a loaded layer runs inside vLLM: a Spense back end, or a dense kernel of vLLM's own.

Preference, per layer: a kernel of ours for the device; else vLLM's dense kernel on the decompressed
matrix (never slower than the dense model, no memory saved), which there is for FP8; else what runs anywhere.
``SPENSE_BACKEND`` names one for the layers with a 2:4 region instead: a back end of ``ops/linear/select.py``,
or ``vllm-fp8``. bf16 checkpoints always run as vLLM's unquantized layers, so they give exactly the tokens of
the exported dense checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.ops.backend import Backend, Tensors
from vllm_spense.ops.linear.select import any_backend, preferred_backend, select_backend
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.serving import compat
from vllm_spense.serving.dense import DenseFp8, DenseUnquantized

NOT_HERE = ("triton", "reference")
"""Back ends that no FP8 layer gets unasked, but vLLM's dense FP8: they are right everywhere, yet the
reference decompresses in every call, and Triton was never measured to win."""


class Runtime(Protocol):
    """What the linear method calls after loading; ``fallback``: why not the device's preferred back end."""

    name: str
    fallback: str | None

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> Tensors: ...

    def finish(self, layer: Any) -> None: ...

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...


def make_runtime(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], layer: Any) -> Runtime:
    """Choose how a layer runs on the device that its tensors are on."""
    device = next(iter(tensors.values())).device
    if device.type == "cpu":
        compat.request_amx()
    chosen, reason = choose(spec, device)
    if isinstance(chosen, type):
        return chosen(spec, layer.orig_dtype, reason)
    return SpenseRuntime(spec, chosen, reason)


def choose(
    spec: LinearSpec, device: torch.device
) -> tuple[Backend[LinearSpec] | type[DenseFp8] | type[DenseUnquantized], str | None]:
    """What runs a layer, and why it is not the device's preferred back end (None: it is).

    ``ValueError`` if ``SPENSE_BACKEND`` names something that cannot.
    """
    if spec.activation_dtype is None and spec.one_by_one:  # first, so that SPENSE_BACKEND does not reach it
        return DenseUnquantized, f"{spec.codecs.name} weights run as vLLM's unquantized layers"
    wanted = os.environ.get("SPENSE_BACKEND") if spec.hybrid or not spec.one_by_one else None
    if not spec.one_by_one:
        return _choose_for_blocks(spec, device, wanted)
    preferred = preferred_backend(device)
    fp8 = spec.codecs == UNIFORM_FP8
    if wanted:
        if wanted == DenseFp8.name and not fp8:
            raise ValueError(f"back end {wanted!r} cannot run this layer: it takes FP8 weights")
        reason = None if wanted == preferred.name else f"SPENSE_BACKEND={wanted} asks for it"
        return DenseFp8 if wanted == DenseFp8.name else select_backend(spec, device, wanted), reason
    backend = select_backend(spec, device)
    if backend is preferred:
        return backend, None
    dense = fp8 and backend.name in NOT_HERE
    return DenseFp8 if dense else backend, preferred.why_not(spec, device)


def _choose_for_blocks(
    spec: LinearSpec, device: torch.device, wanted: str | None
) -> tuple[Backend[LinearSpec] | type[DenseUnquantized], str | None]:
    """:func:`choose` for weights in 4 bits: a kernel on the codes, or the values written out at load."""
    if wanted == DenseUnquantized.name:
        return DenseUnquantized, f"SPENSE_BACKEND={wanted} asks for it"
    if wanted:
        return select_backend(spec, device, wanted), f"SPENSE_BACKEND={wanted} asks for it"
    backend = any_backend(spec, device)
    if backend is None:
        return (
            DenseUnquantized,
            f"no kernel for {spec.codecs.title} takes the layer: written out in bf16 at load",
        )
    return backend, None


class SpenseRuntime:
    """Runs a back end of ours on the layer's own parameters."""

    def __init__(self, spec: LinearSpec, backend: Backend[LinearSpec], fallback: str | None = None) -> None:
        self.spec = spec
        self.backend = backend
        self.name = backend.name
        self.fallback = fallback
        self._names: tuple[str, ...] = ()

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        prepared = self.backend.prepare(self.spec, tensors)
        self._names = tuple(prepared)
        return prepared

    def finish(self, layer: Any) -> None:
        pass

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tensors = {name: getattr(layer, name) for name in self._names}
        flat = x.reshape(-1, x.shape[-1])
        y = self.backend.apply(self.spec, tensors, flat, bias)
        return y.view(*x.shape[:-1], y.shape[-1])
