"""How a loaded layer runs inside vLLM: a Spense back end, or a dense kernel of vLLM's own.

Preference, per layer: a kernel of ours for the device; else vLLM's dense kernel on the decompressed
matrix (never slower than the dense model, no memory saved). ``SPENSE_BACKEND`` names one for the layers
with a 2:4 region instead: a back end of the dispatcher, or ``vllm-fp8``. bf16 checkpoints always run as
vLLM's unquantized layers, so they give exactly the tokens of the exported dense checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from vllm_spense.ops.backend import decompressed
from vllm_spense.ops.dispatch import LinearSpec, Tensors, preferred_backend, select_backend
from vllm_spense.serving import compat


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
    name, reason = choose(spec, device)
    runtime: Runtime
    if not spec.quantize_activations:  # not by its name: SPENSE_BACKEND must not reach it
        runtime = DenseUnquantized(spec, layer.orig_dtype)
    elif name == DenseFp8.name:
        runtime = DenseFp8(spec, layer.orig_dtype)
    else:
        runtime = SpenseRuntime(spec, device, name)
    runtime.fallback = reason
    return runtime


def choose(spec: LinearSpec, device: torch.device) -> tuple[str, str | None]:
    """Name of what runs a layer, and why it is not the device's preferred back end (None: it is)."""
    if not spec.quantize_activations:
        return DenseUnquantized.name, "bf16 weights run as vLLM's unquantized layers"
    preferred = preferred_backend(device)
    wanted = os.environ.get("SPENSE_BACKEND") if spec.hybrid else None
    if wanted:
        return wanted, None if wanted == preferred.name else f"SPENSE_BACKEND={wanted} asks for it"
    name = select_backend(spec, device).name
    # Right everywhere, but the reference decompresses in every call, and Triton was never measured to win.
    if name in ("triton", "reference"):
        name = DenseFp8.name
    return name, None if name == preferred.name else preferred.why_not(spec, device)


class SpenseRuntime:
    """Runs the dispatcher's back end on the layer's own parameters."""

    fallback: str | None = None

    def __init__(self, spec: LinearSpec, device: torch.device, backend: str | None = None) -> None:
        self.spec = spec
        self.backend = select_backend(spec, device, backend)
        self.name = self.backend.name
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


class DenseUnquantized:
    """bf16 weights: the decompressed matrix in vLLM's unquantized linear method."""

    name = "vllm-unquantized"
    fallback: str | None = None

    def __init__(self, spec: LinearSpec, dtype: torch.dtype) -> None:
        self.spec = spec
        self.dtype = dtype
        self.method = compat.UnquantizedLinearMethod()

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return {"weight": decompressed(self.spec, tensors).to(self.dtype)}

    def finish(self, layer: Any) -> None:
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.method.apply(layer, x, bias)


class DenseFp8:
    """FP8 weights on a device without a kernel of ours: vLLM's dense FP8 kernel (per token, per channel)."""

    name = "vllm-fp8"
    fallback: str | None = None

    def __init__(self, spec: LinearSpec, dtype: torch.dtype) -> None:
        self.spec = spec
        self.kernel = compat.init_fp8_linear_kernel(
            activation_quant_key=compat.kFp8DynamicTokenSym,
            weight_quant_key=compat.kFp8StaticChannelSym,
            weight_shape=(spec.out_features, spec.in_features),
            input_dtype=dtype,
            out_dtype=dtype,
            module_name="SpenseLinearMethod",
        )

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return {
            "weight": decompressed(self.spec, tensors).t(),
            "weight_scale": tensors["weight_scale"][:, None],
        }

    def finish(self, layer: Any) -> None:
        layer.input_scale = None
        layer.input_scale_ub = None
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.kernel.apply_weights(layer, x, bias)
