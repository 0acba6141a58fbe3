"""INT8 weights with one fp32 scale per output channel."""

from __future__ import annotations

import torch

from vllm_spense.format.codecs.base import RowCodec
from vllm_spense.format.codecs.scales import quantize_rows

INT8_MAX = 127
TOP_CODES = (127, 126, 125, 124, 123, 122, 121, 120)
"""What a row's largest weight may become. Scales below ``largest / 127``, which clip it, gained nothing."""


class Int8(RowCodec):
    """Symmetric int8 with one scale per row, for kernels that round their inputs to int8 per token.

    Values lie in -127 … 127, so that kernels can take their magnitudes in one byte.
    """

    name = "int8"
    title = "INT8"
    details = "symmetric, one scale per output channel"
    dtype = torch.int8
    bits = 8
    companions = ("weight_scale",)
    activation_dtype = torch.int8

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_rows(weight, TOP_CODES, _rounded)

    def illegal_values(self, values: torch.Tensor) -> tuple[torch.Tensor, str]:
        return values == -128, "-128, whose magnitude is no int8"


def _rounded(wide: torch.Tensor) -> torch.Tensor:
    return wide.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
