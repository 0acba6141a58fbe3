"""FP8 e4m3 weights with one fp32 scale per output channel."""

from __future__ import annotations

import torch

from vllm_spense.format.codecs.base import RowCodec
from vllm_spense.format.codecs.scales import quantize_rows

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
TOP_CODES = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
"""What a row's largest weight may become: one factor of two holds every alignment to the e4m3 grid."""
_CACHED_BYTES = 1 << 19
"""Looked at in one go on a CPU: stays in the cache."""


class Fp8(RowCodec):
    """e4m3 with one scale per row, for kernels that round their inputs to e4m3 per token."""

    name = "fp8"
    title = "FP8"
    details = "e4m3, one scale per output channel"
    dtype = FP8_DTYPE
    bits = 8
    companions = ("weight_scale",)
    activation_dtype = FP8_DTYPE

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_per_channel(weight)

    def illegal(self, name: str, tensor: torch.Tensor) -> tuple[int, str] | None:
        """In a tenth of the time where all bytes are legal: seven low bits that are all ones are NaN."""
        if name == "weight_scale" or not tensor.is_contiguous():
            return super().illegal(name, tensor)
        flat = tensor.view(-1).view(torch.uint8)
        # on a CPU in parts that stay in its cache, elsewhere in one reduction with one host sync
        parts = flat.split(_CACHED_BYTES) if tensor.device.type == "cpu" else [flat]
        return super().illegal(name, tensor) if any(map(_has_nan, parts)) else None

    def illegal_values(self, values: torch.Tensor) -> tuple[torch.Tensor, str]:
        return (values.view(torch.uint8) & 0x7F) == 0x7F, "an FP8 NaN"


def _has_nan(e4m3: torch.Tensor) -> bool:
    return int((e4m3 & 0x7F).amax()) == 0x7F


def quantize_per_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``weight [N, K]`` to e4m3 with one scale per row.

    The scale maps the row's largest magnitude exactly to that one of :data:`TOP_CODES` that gives the
    least squared error of the row (8 to 14 % less than always 448, on SmolLM2). Returns ``(fp8 [N, K],
    scale [N] fp32)``. All-zero rows get scale 1; -0 becomes +0. Raises ``ValueError`` on NaN or infinity.
    """
    values, scale = quantize_rows(weight, TOP_CODES, _rounded)
    bits = values.view(torch.uint8)
    return bits.masked_fill_(bits == 0x80, 0).view(FP8_DTYPE), scale


def _rounded(wide: torch.Tensor) -> torch.Tensor:
    return wide.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
