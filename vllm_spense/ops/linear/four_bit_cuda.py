"""The back end for dense 4-bit layers on GPUs, which bitsandbytes' checkpoints have: compiled kernels."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch.library import custom_op
from torch.nn import functional

from vllm_spense.format.codecs import FourBit
from vllm_spense.ops import extension
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear import four_bit
from vllm_spense.ops.linear.arguments import PACKED
from vllm_spense.ops.linear.spec import LinearSpec

OLDEST = (8, 0)
SMALLEST_BLOCK = 16
COLUMNS = 32
"""in_features is a multiple of it: what one thread reads at a time (kChunk of the kernels)."""
MOST_TOKENS = 32
"""For more tokens the matrix is written out and multiplied by torch. A guess, until a GPU has measured it."""


@custom_op("spense::cuda_linear_4bit", mutates_args=(), device_types="cuda")
def cuda_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    block: int,
    shuffle: bool = True,
) -> torch.Tensor:
    """``y [M, N] = x Wᵀ`` in x's dtype, ``W [N, K]`` in ``codes [N, K / 2]``, ``absmax [N, blocks]`` fp32 and
    ``table [16]`` fp32, each weight rounded once to that dtype.

    ``shuffle``: codes are looked up in registers, else in shared memory; the results are the same.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if x.shape[0] > MOST_TOKENS or x.dtype == torch.float32:
        weight = dequantised(codes, absmax, table, block, x.dtype, shuffle)
        return functional.linear(x, weight, bias)
    y = x.new_empty((x.shape[0], codes.shape[0]))
    torch.ops.spense.linear_four_bit(x.contiguous(), codes, absmax, table, bias, block, shuffle, y)
    return y


@cuda_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    block: int,
    shuffle: bool = True,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


def dequantised(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    block: int,
    dtype: torch.dtype,
    shuffle: bool = True,
) -> torch.Tensor:
    """``W [N, K]``: the definition's, rounded once to bf16, fp16 or fp32."""
    weight = absmax.new_empty((codes.shape[0], 2 * codes.shape[1]), dtype=dtype)
    torch.ops.spense.dequantize_four_bit(codes, absmax, table, block, shuffle, weight)
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
        if spec.hybrid:
            return "the kernels take dense layers, and there is a 2:4 region"
        if (reason := four_bit.why_not(spec)) is not None:
            return reason
        codec = spec.codecs.dense
        assert isinstance(codec, FourBit)
        if codec.block < SMALLEST_BLOCK:
            return f"blocks of {codec.block} values are smaller than {SMALLEST_BLOCK}"
        if spec.in_features % COLUMNS:
            return f"in_features {spec.in_features} must be a multiple of {COLUMNS}"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
        return extension.why_not_loaded() or _why_not_on(device.index or 0)

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        ready = four_bit.prepared(spec, tensors)
        return {PACKED: ready[PACKED], "absmax": ready["dense_absmax"], "table": ready["tables"][1].clone()}

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        codec = spec.codecs.dense
        assert isinstance(codec, FourBit)
        layer = tensors[PACKED], tensors["absmax"], tensors["table"]
        return cuda_linear(x, *layer, bias, codec.block, self.shuffle)
