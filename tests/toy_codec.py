"""A codec that no product has: int8 stored as is, one scale per row. One class and a registration."""

from __future__ import annotations

import torch

from vllm_spense.format.codecs import RowCodec, codec, codec_names, register


class ToyInt8(RowCodec):
    """No kernel knows it: a server spells it out and runs it as vLLM's unquantized layers."""

    name = "toy-int8"
    title = "toy INT8"
    dtype = torch.int8
    bits = 8
    companions = ("weight_scale",)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = weight.float()
        largest = wide.abs().amax(dim=1)
        if not torch.isfinite(largest).all():
            raise ValueError("weight holds NaN or infinity")
        scale = torch.where(largest > 0, (largest / 127).clamp_min(2.0**-100), 1.0)
        return (wide / scale[:, None]).round().to(torch.int8), scale

    def illegal_values(self, values: torch.Tensor) -> tuple[torch.Tensor, str]:
        return values == -128, "-128, which no scale of ours gives"


if ToyInt8.name not in codec_names():
    register(ToyInt8())

CUT_ANYWHERE = [name for name in codec_names() if codec(name).granule == 1]
"""Codecs whose rows can be parted at any value: small layers have no whole blocks of the others."""
