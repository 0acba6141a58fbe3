"""2:4 pruning of one weight's sparse region: OBS (SparseGPT), Wanda, magnitude.

All solvers share one rule for ties: of equal scores in a group of four the earlier position is kept,
so a mask depends on neither device nor batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_spense.format.layout import GROUP, Layout
from vllm_spense.format.sparse24 import magnitude_mask

MAX_ESCALATIONS = 4


class SolverError(RuntimeError):
    """A Hessian could not be factored, even with more damping (or at all, when strict)."""


@dataclass(frozen=True)
class Factor:
    """What OBS needs of a Hessian: ``upper [K, K]`` with upperᵀ·upper = (H + λI)⁻¹, and dead inputs [K].

    ``escalations`` counts how often λ had to be raised tenfold.
    """

    upper: torch.Tensor
    dead: torch.Tensor
    damping: float
    escalations: int


def factorize(h: torch.Tensor, damping: float, *, name: str, strict: bool = False) -> Factor:
    """Factor ``h [K, K]`` fp32 with λ = damping · mean(diag), ten times more after each failure.

    Inputs that are always zero get a one on the diagonal. Raises :class:`SolverError` naming ``name``
    when the last attempt fails, or the first one under ``strict``.
    """
    diagonal = h.diagonal()
    dead = diagonal == 0
    live = diagonal[~dead]
    mean = float(live.mean()) if live.numel() else 1.0
    for escalation in range(MAX_ESCALATIONS + 1):
        ratio = damping * 10**escalation
        damped = h.clone()
        damped.diagonal()[dead] = 1.0
        damped.diagonal().add_(ratio * mean)
        upper = _inverse_cholesky(damped)
        if upper is not None:
            return Factor(upper, dead, ratio, escalation)
        if strict:
            break
    raise SolverError(
        f"{name}: the input Hessian is not positive definite with damping {ratio:g}. Use more or "
        "more varied calibration text, or a larger damping"
    )


def _inverse_cholesky(h: torch.Tensor) -> torch.Tensor | None:
    lower, info = torch.linalg.cholesky_ex(h)
    if int(info):
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(info) or not bool(torch.isfinite(upper).all()) else upper


def prune_obs(weight: torch.Tensor, layout: Layout, factor: Factor, block_size: int = 128) -> torch.Tensor:
    """Prune the 2:4 region of ``weight [N, K]`` fp32 and let the columns to its right make up for it.

    SparseGPT (arXiv 2301.00774, algorithm 1) with the error measure w² / U_jj². Output split: only
    rows of S change. Input split: columns of S are pruned, and the dense columns, which stand to the
    right of them, absorb the compensation. Returns a new tensor.
    """
    result = weight.clone()
    rows, cols = layout.sparse_shape
    if not layout.sparse:
        return result
    w = result[:rows]
    upper = factor.upper
    w[:, :cols].masked_fill_(factor.dead[:cols], 0.0)
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        block = w[:, start:stop].t().contiguous()  # a column of w is a row here: contiguous updates
        u = upper[start:stop, start:stop]
        errors = torch.zeros_like(block)
        spread = u.diagonal()[:, None] ** 2
        for j in range(stop - start):
            if j % GROUP == 0:
                score = (block[j : j + GROUP] ** 2 / spread[j : j + GROUP]).t()
                drop = ~magnitude_mask(score).t()
            gone = block[j] * drop[j % GROUP]
            errors[j] = gone / u[j, j]
            block[j:] -= u[j, j:, None] * errors[j]
            # Exact where the update would leave rounding: pruned is 0, kept is untouched by itself.
            block[j].masked_fill_(drop[j % GROUP], 0.0)
        w[:, start:stop] = block.t()
        w[:, stop:] -= errors.t() @ upper[start:stop, stop:]
    return result


def prune_by_score(weight: torch.Tensor, layout: Layout, score: torch.Tensor) -> torch.Tensor:
    """Zero the two lowest ``score [N, K]`` of every group in the 2:4 region; nothing else changes."""
    result = weight.clone()
    if layout.sparse:
        rows, cols = layout.sparse_shape
        result[:rows, :cols].masked_fill_(~magnitude_mask(score[:rows, :cols]), 0.0)
    return result


def prune_wanda(weight: torch.Tensor, layout: Layout, h: torch.Tensor) -> torch.Tensor:
    """Score |w| · ‖x_j‖ with ‖x_j‖ ∝ sqrt(H_jj) (Wanda, arXiv 2306.11695, equation 1)."""
    return prune_by_score(weight, layout, element_scores(weight, h))


def prune_magnitude(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Score |w|."""
    return prune_by_score(weight, layout, weight.abs())


def element_scores(weight: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """``|W_ij| · sqrt(H_jj)`` [N, K]; ``h`` is the Hessian [K, K] or its diagonal [K]."""
    diagonal = h.diagonal() if h.dim() == 2 else h
    return weight.abs() * diagonal.sqrt()
