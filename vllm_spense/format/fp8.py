"""FP8 e4m3 weights with one fp32 scale per output channel."""

from __future__ import annotations

import torch

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
_MIN_SCALE = 2.0**-100
"""Keeps ``weight / scale`` finite for rows of denormals."""


def quantize_per_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``weight [N, K]`` to e4m3 with the scale ``absmax / 448`` of each row.

    Returns ``(fp8 [N, K], scale [N] fp32)``. All-zero rows get scale 1; -0 becomes +0.
    Raises ``ValueError`` on NaN or infinity.
    """
    wide = weight.float()
    absmax = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    if not torch.isfinite(absmax).all():
        raise ValueError("weight holds NaN or infinity")
    scale = torch.where(absmax > 0, (absmax / FP8_MAX).clamp_min(_MIN_SCALE), 1.0)
    q = (wide / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
    bits = q.view(torch.uint8)
    return torch.where(bits == 0x80, 0, bits).view(FP8_DTYPE), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """fp32 ``[N, K]``: the stored weight times its row's scale (None: weight is unscaled)."""
    wide = weight.float()
    return wide if scale is None else wide * scale[:, None]
