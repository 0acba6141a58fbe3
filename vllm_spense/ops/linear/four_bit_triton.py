"""The back end for 4-bit layers on GPUs, whatever their regions: Triton, sm_80 and later.

Triton itself is imported by the first call, so that this module can be imported without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.library import custom_op

from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear import four_bit
from vllm_spense.ops.linear.four_bit import FourBitLayer
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.ops.linear.triton import why_no_triton


@custom_op(
    "spense::triton_linear_4bit",
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema=f"(Tensor x, {four_bit.SCHEMA}) -> Tensor",
)
def _triton_linear(x: torch.Tensor, *layer: Any) -> torch.Tensor:
    from vllm_spense.ops.linear.four_bit_triton_kernel import multiply

    return multiply(x, FourBitLayer.unflat(*layer))


@_triton_linear.register_fake
def _(x: torch.Tensor, *layer: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], FourBitLayer.unflat(*layer).out_features))


def triton_linear(x: torch.Tensor, layer: FourBitLayer) -> torch.Tensor:
    """``y [M, N]`` by the kernel of :mod:`vllm_spense.ops.linear.four_bit_triton_kernel`.

    On CPUs it runs only in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is first imported).
    """
    return _triton_linear(x, *layer.flat())


class FourBitTritonBackend:
    """Weights as they are in the checkpoint, their scales joined; the dense region may be in FP8."""

    name = "triton-4bit"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        return four_bit.why_not(spec) or why_no_triton(device)

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return four_bit.prepared(spec, tensors)

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return triton_linear(x, FourBitLayer.of(spec, tensors, bias))
