"""Dynamic FP8 quantisation of activations, one scale per token."""

from __future__ import annotations

import torch

from vllm_spense.format.codecs.fp8 import FP8_DTYPE, FP8_MAX

MIN_SCALE = 1.0 / (FP8_MAX * 512.0)
"""vLLM's own lower bound for dynamic FP8 scales; an all-zero token gets this scale."""


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``x [M, K]`` (bf16, fp16 or fp32) to e4m3 with the scale ``absmax / 448`` of each row.

    Returns ``(x_fp8 [M, K], scale [M, 1] fp32)``. Plain torch code and no opaque operator, so that
    Inductor can fuse it with the normalisation or activation in front.
    """
    if not x.shape[-1]:  # a region that is empty on this rank
        return x.to(FP8_DTYPE), x.new_full((x.shape[0], 1), MIN_SCALE, dtype=torch.float32)
    return quantize_with_amax(x, x.float().abs().amax(dim=-1, keepdim=True))


def quantize_with_amax(x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_per_token` where the largest absolute value ``amax [M, 1]`` of each token is known."""
    scale = (amax / FP8_MAX).clamp_min(MIN_SCALE)
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE), scale
