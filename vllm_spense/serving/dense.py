"""Dense kernels of vLLM's own, on the decompressed matrix of a layer: never slower than the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.reference import decoded, decompressed
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.serving import compat


class DenseUnquantized:
    """Codecs that no kernel knows, and bf16: the decoded matrix in vLLM's unquantized linear method."""

    name = "vllm-unquantized"

    def __init__(self, spec: LinearSpec, dtype: torch.dtype, fallback: str | None = None) -> None:
        self.spec = spec
        self.dtype = dtype
        self.fallback = fallback
        self.method = compat.UnquantizedLinearMethod()

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return {"weight": decoded(self.spec, tensors).to(self.dtype)}

    def finish(self, layer: Any) -> None:
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.method.apply(layer, x, bias)


class DenseFp8:
    """FP8 weights on a device without a kernel of ours: vLLM's dense FP8 kernel (per token, per channel)."""

    name = "vllm-fp8"

    def __init__(self, spec: LinearSpec, dtype: torch.dtype, fallback: str | None = None) -> None:
        self.spec = spec
        self.fallback = fallback
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
