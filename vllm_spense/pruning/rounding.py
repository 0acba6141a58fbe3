"""FP8 rounding that the rest of the row makes up for, as OBS does for the weights that it drops.

GPTQ (arXiv 2210.17323) rounds column by column and compensates in closed form. Here most rows have zeros
that must stay zero, so the compensation is :func:`~.refit.refit` of the weights that are kept and not rounded
yet, after each block of columns.
"""

from __future__ import annotations

import torch

from vllm_spense.format import FP8_DTYPE, quantize_per_channel
from vllm_spense.format.codecs.fp8 import FP8_MAX
from vllm_spense.pruning.refit import refit

BLOCKS = 8
ITERATIONS = 3


def round_and_refit(weight: torch.Tensor, sparse: int, h: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Values on each row's FP8 grid for ``weight [N, K]`` fp32, zeros of the first ``sparse`` columns kept.

    The grid is that of :func:`~vllm_spense.format.quantize_per_channel` for the given weight, which finds it
    again when the result is stored. ``h [K, K]`` positive definite and ``target [N, K]``: see
    :func:`~.refit.refit`. Blocks are rounded in the order of the columns. Returns a new tensor.
    """
    _, scale = quantize_per_channel(weight)
    free = torch.ones_like(weight)
    free[:, :sparse] = (weight[:, :sparse] != 0).float()
    weight = weight.clone()
    columns = weight.shape[1]
    for i in range(BLOCKS):
        block = slice(columns * i // BLOCKS, columns * (i + 1) // BLOCKS)
        units = (weight[:, block] / scale[:, None]).clamp(-FP8_MAX, FP8_MAX)
        weight[:, block] = units.to(FP8_DTYPE).float() * scale[:, None]
        free[:, block] = 0
        weight = refit(weight, free, h, target, ITERATIONS)
    return weight
