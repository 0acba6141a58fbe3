"""Dynamic quantisation of activations to e4m3 or int8, one scale per token.

Plain torch code and no opaque operators, so that Inductor can fuse it with what stands in front. The
arithmetic is vLLM's, which divides by the scale for e4m3 and multiplies by its reciprocal for int8 (on CPUs;
its CUDA kernel multiplies by ``127 / absmax``).
"""

from __future__ import annotations

import torch

from vllm_spense.format.codecs.fp8 import FP8_DTYPE, FP8_MAX
from vllm_spense.format.codecs.int8 import INT8_MAX

MIN_SCALE = 1.0 / (FP8_MAX * 512.0)
"""vLLM's own lower bound for dynamic FP8 scales; an all-zero token gets this scale."""
MIN_SCALE_INT8 = 2.0**-100
"""The same for int8, where vLLM has none and a reciprocal of its tiniest scales is infinite."""


def quantize_per_token(x: torch.Tensor, dtype: torch.dtype = FP8_DTYPE) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``x [M, K]`` (bf16, fp16 or fp32) to ``dtype``, e4m3 or int8, with a scale of each row.

    Returns ``(values [M, K], scale [M, 1] fp32)``: e4m3 with the scale ``absmax / 448``, or int8 with
    ``absmax / 127``, ties to even, never -128. A token with NaN or infinity becomes int8 zeros with the scale
    NaN, so that all its outputs are NaN.
    """
    if not x.shape[-1]:  # a region that is empty on this rank
        least = MIN_SCALE if dtype == FP8_DTYPE else MIN_SCALE_INT8
        return x.to(dtype), x.new_full((x.shape[0], 1), least, dtype=torch.float32)
    amax = x.float().abs().amax(dim=-1, keepdim=True)
    return quantize_with_amax(x, amax) if dtype == FP8_DTYPE else _to_int8(x, amax)


def quantize_with_amax(x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_per_token` to e4m3 where the largest absolute value ``amax [M, 1]`` of each token is
    known."""
    scale = (amax / FP8_MAX).clamp_min(MIN_SCALE)
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE), scale


def _to_int8(x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.where(amax < torch.inf, (amax / INT8_MAX).clamp_min(MIN_SCALE_INT8), torch.nan)
    values = (x.float() * (1 / scale)).round().clamp(-INT8_MAX, INT8_MAX)
    return values.nan_to_num().to(torch.int8), scale  # no platform agrees with another on NaN as an integer


def quantized(x: torch.Tensor, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`quantize_per_token` to ``dtype``; None: x as it is and no scale."""
    return (x, None) if dtype is None else quantize_per_token(x, dtype)
