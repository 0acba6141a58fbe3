"""Few tokens or many: up to where up and down are read by the row, and the same MLP by whole matrices.

A token reads the rows of its own neurons, and what several tokens have in common comes from a cache. Beside
the gate, which is always read, that is ``1/3 + 2/3 · union`` of what the dense MLP reads, where
``union = 1 - (1 - density)^tokens`` if tokens choose independently; real ones agree more often than that.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import linear

from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.twell import SHARES, TILES, TwellShape

UNKNOWN = 0.1
"""Density where nobody has measured it."""
GATHERED, AGAIN = 1.1, 0.3
"""What a row costs that is read by itself, and one that another token has read, in rows of a matrix that is
read as a whole. Guesses, until a GPU has measured them."""
MOST_TOKENS = 256
"""Of the sparse way at any density: lists of neurons take 8 bytes each, and tensor cores have enough to
do."""
DEVIATIONS = 4.0
"""Of a tile's count that its capacity leaves room for, if neurons are chosen independently."""


def relative_cost(density: float, tokens: int) -> float:
    """Time of up and down by the row in times of the whole matrices, by the bytes that are read."""
    union = 1 - (1 - density) ** tokens
    return GATHERED * (union + AGAIN * (tokens * density - union))


@functools.lru_cache(maxsize=1024)
def most_tokens(density: float | None) -> int:
    """Up to so many tokens rows are read one by one; 0: never. ``density``: share of neurons that a token
    uses, None: :data:`UNKNOWN`."""
    assumed = UNKNOWN if density is None else density
    return next((m for m in range(MOST_TOKENS) if relative_cost(assumed, m + 1) >= 1), MOST_TOKENS)


def shape_for(hidden: int, density: float | None) -> TwellShape:
    """The smallest words in which hardly a tile of this density overflows."""
    assumed, tile = UNKNOWN if density is None else density, TILES[-1]
    mean = tile * assumed
    wanted = mean + DEVIATIONS * (mean * (1 - assumed)) ** 0.5
    shares = (share for share in SHARES if TwellShape(0, tile, share).capacity >= wanted)
    return TwellShape(hidden, tile, next(shares, SHARES[-1]))


def dense_mlp(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    up_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """:func:`.sparse_mlp.sparse_mlp_definition` by two matrix products in x's dtype: what is between them is
    rounded to it."""
    upper = linear(x, up, None if up_bias is None else up_bias.to(x.dtype))
    return times(activation.hidden(gate, upper).to(x.dtype), down_t, bias)


def dense_input(
    x: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """:func:`.sparse_input.sparse_input_definition` by one matrix product in x's dtype."""
    return times(torch.where(x.abs() <= threshold, 0.0, x), weight_t, bias)


def times(x: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x [M, I] · weight_t [I, N]``, and the bias."""
    return x @ weight_t if bias is None else torch.addmm(bias.to(x.dtype), x, weight_t)
