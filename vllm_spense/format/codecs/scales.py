"""Rounding a matrix with one scale per row: the scale is searched for, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_MIN_SCALE = 2.0**-100
"""Keeps ``weight / scale`` finite for rows of denormals."""
_CHUNK = 1 << 24
"""Weights rounded at a time: bounds the fp32 temporaries to some 64 MiB each."""

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""fp32 multiples of the scale to stored values of one byte, clamped to the range."""


def quantize_rows(
    weight: torch.Tensor, top_codes: Sequence[float], rounded: Rounding
) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight [N, K]`` as ``(values [N, K] in the dtype of ``rounded``, scale [N] fp32)``.

    The scale maps the row's largest magnitude to that one of ``top_codes`` that gives the least squared error
    of the row. All-zero rows get scale 1. Raises ``ValueError`` on NaN or infinity.
    """
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    parts = [_quantize(part.float(), top_codes, rounded) for part in weight.split(rows)]
    dtype = parts[0][0].dtype  # joined as bytes: not every torch build joins every fp8 dtype on every device
    values = torch.cat([values.view(torch.uint8) for values, _ in parts]).view(dtype)
    return values, torch.cat([scale for _, scale in parts])


def _quantize(
    wide: torch.Tensor, top_codes: Sequence[float], rounded: Rounding
) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    if not torch.isfinite(absmax).all():
        raise ValueError("weight holds NaN or infinity")
    best = rounded(torch.zeros_like(wide))
    best_scale = torch.ones_like(absmax)
    best_error = torch.full_like(absmax, torch.inf)
    for code in top_codes:
        scale = torch.where(absmax > 0, (absmax / code).clamp_min(_MIN_SCALE), 1.0)
        values = rounded(wide / scale[:, None])
        error = (values.float() - wide / scale[:, None]).square().sum(dim=1) * scale.square()
        better = error < best_error  # of equal errors the first, the smallest scale
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        bits = torch.where(better[:, None], values.view(torch.uint8), best.view(torch.uint8))
        best = bits.view(values.dtype)
    return best, best_scale
