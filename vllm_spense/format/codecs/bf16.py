"""bf16 values as they are, without scales: pruned only."""

from __future__ import annotations

import torch

from vllm_spense.format.codecs.base import RowCodec


class Bf16(RowCodec):
    """Layers that are not pruned stay as the model has them."""

    name = title = "bf16"
    dtype = torch.bfloat16
    bits = 16
    everywhere = False

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, None]:
        stored = weight.to(torch.bfloat16)
        if not torch.isfinite(stored).all():  # after rounding: a large fp32 value overflows bf16
            raise ValueError("weight holds NaN or infinity")
        return torch.where(stored == 0, torch.zeros_like(stored), stored), None

    def illegal_values(self, values: torch.Tensor) -> tuple[torch.Tensor, str]:
        return ~torch.isfinite(values), "NaN or infinity"
