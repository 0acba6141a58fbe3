"""The back end for 4-bit layers on GPUs whose regions are both in 4 bits: compiled kernels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.library import custom_op
from torch.nn import functional

from vllm_spense.format.codecs import FourBit
from vllm_spense.ops import extension
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear import four_bit
from vllm_spense.ops.linear.cuda import MAX_SHARDS
from vllm_spense.ops.linear.four_bit import FourBitLayer
from vllm_spense.ops.linear.spec import LinearSpec

OLDEST = (8, 0)
SMALLEST_BLOCK = 16
COLUMNS = 32
"""A region's columns are a multiple of it: what one thread reads at a time (kChunk of the kernels)."""
MOST_TOKENS = 32
"""For more tokens the matrix is written out and multiplied by torch. A guess, until a GPU has measured it."""


@custom_op(
    "spense::cuda_linear_4bit",
    mutates_args=(),
    device_types="cuda",
    schema=f"(Tensor x, bool shuffle, {four_bit.SCHEMA}) -> Tensor",
)
def _cuda_linear(x: torch.Tensor, shuffle: bool, *flat: Any) -> torch.Tensor:
    layer = FourBitLayer.unflat(*flat)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if x.shape[0] > MOST_TOKENS or x.dtype == torch.float32:
        return functional.linear(x, dequantised(layer, x.shape[1], x.dtype, shuffle), bias)
    y = x.new_empty((x.shape[0], layer.out_features))
    weights, _, *sizes, _ = layer.flat()
    torch.ops.spense.linear_four_bit(x.contiguous(), *weights, bias, *sizes, shuffle, y)
    return y


@_cuda_linear.register_fake
def _(x: torch.Tensor, shuffle: bool, *flat: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], FourBitLayer.unflat(*flat).out_features))


def cuda_linear(x: torch.Tensor, layer: FourBitLayer, shuffle: bool = True) -> torch.Tensor:
    """``y [M, N] = x Wᵀ`` in x's dtype, each weight rounded once to that dtype.

    ``shuffle``: codes are looked up in registers, else in shared memory; the results are the same.
    """
    return _cuda_linear(x, shuffle, *layer.flat())


def dequantised(
    layer: FourBitLayer, in_features: int, dtype: torch.dtype, shuffle: bool = True
) -> torch.Tensor:
    """``W [N, K]``: the definition's, rounded once to bf16, fp16 or fp32."""
    weight = layer.tables.new_empty((layer.out_features, in_features), dtype=dtype)
    weights, _, *sizes, _ = layer.flat()
    torch.ops.spense.dequantize_four_bit(*weights, *sizes, shuffle, weight)
    return weight


@functools.cache
def _why_not_on(index: int) -> str | None:
    """Loads the kernels, so that no launch in a graph capture has to; what the driver says if it cannot."""
    try:
        with torch.cuda.device(index):
            torch.ops.spense.load_four_bit()
    except RuntimeError as error:
        return f"the CUDA kernels do not run under this driver: {str(error).splitlines()[0]}"
    return None


class FourBitCudaBackend:
    """Codes as they are in the checkpoint. ``shuffle``: how they are looked up; no GPU has compared that."""

    name = "cuda-4bit"

    def __init__(self, shuffle: bool = True) -> None:
        self.shuffle = shuffle

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip:
            return f"runs on NVIDIA GPUs, not on {'ROCm' if torch.version.hip else device.type}"
        if (reason := four_bit.why_not(spec)) is not None:
            return reason
        for codec in four_bit.owners(spec):
            if not isinstance(codec, FourBit):
                return f"the kernels take both regions in 4 bits, not {spec.codecs.title}"
            if codec.block < SMALLEST_BLOCK:
                return f"blocks of {codec.block} values are smaller than {SMALLEST_BLOCK}"
        for _, columns in (spec.sparse_shape, spec.dense_shape):
            if columns % COLUMNS:
                return f"{columns} columns of a region must be a multiple of {COLUMNS}"
        if len(spec.sparse_sizes) > MAX_SHARDS:
            return f"{len(spec.sparse_sizes)} fused shards, at most {MAX_SHARDS} are compiled"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
        return extension.why_not_loaded() or _why_not_on(device.index or 0)

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return four_bit.prepared(spec, tensors)

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return cuda_linear(x, FourBitLayer.of(spec, tensors, bias), self.shuffle)
