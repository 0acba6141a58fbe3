"""Rounding that the weights to come make up for (OPTQ, arXiv 2210.17323); what is pruned stays zero."""

from __future__ import annotations

from collections.abc import Callable

import torch

Rounded = Callable[[int, torch.Tensor], torch.Tensor]


def round_columns(
    weight: torch.Tensor, kept: torch.Tensor, upper: torch.Tensor, rounded: Rounded, block_size: int = 128
) -> torch.Tensor:
    """``weight [N, K]`` fp32 rounded from left to right; a new tensor.

    ``kept [N, K]`` bool: all others become zero again, and what they have made up for is handed on
    (SparseGPT, arXiv 2301.00774, section 3.4). ``upper [K, K]``: upperᵀ·upper = H⁻¹. ``rounded``: the values
    ``[N]`` that those of a column, by its number, are stored as.
    """
    w = weight.clone()
    for start in range(0, w.shape[1], block_size):
        stop = min(start + block_size, w.shape[1])
        block = w[:, start:stop].t().contiguous()  # a column of w is a row here: contiguous updates
        u = upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            stored = rounded(start + j, block[j]) * kept[:, start + j]
            torch.div(block[j] - stored, u[j, j], out=errors[j])
            block[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
            block[j] = stored
        w[:, start:stop] = block.t()
        w[:, stop:].addmm_(errors.t(), upper[start:stop, stop:], alpha=-1)
    return w


def settle_columns(
    stored: torch.Tensor,
    target: torch.Tensor,
    kept: torch.Tensor,
    h: torch.Tensor,
    rounded: Rounded,
    sweeps: int,
    block_size: int = 128,
) -> torch.Tensor:
    """``stored [N, K]``, rounded already, with a smaller error against ``target [N, K]``; a new tensor.

    Coordinate descent on tr((stored - target) h (stored - target)ᵀ), ``h [K, K]``: every value in turn
    becomes the one nearest to what is best for it while all others stay (CDQuant, arXiv 2406.17542), so no
    step makes the error larger. ``kept``, ``rounded``: as in :func:`round_columns`.
    """
    w = stored.clone()
    diagonal = h.diagonal()
    for start in [*range(0, w.shape[1], block_size)] * sweeps:
        stop = min(start + block_size, w.shape[1])
        block = w[:, start:stop].t().contiguous()
        inner = h[start:stop, start:stop]
        gradient = (h[start:stop] @ (w - target).t()).contiguous()
        for j in range(stop - start):
            best = block[j] - gradient[j] / diagonal[start + j]
            settled = rounded(start + j, best) * kept[:, start + j]
            gradient.addr_(inner[j], settled - block[j])
            block[j] = settled
        w[:, start:stop] = block.t()
    return w
