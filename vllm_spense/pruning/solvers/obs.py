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
DROPPED = ((2, 3), (1, 3), (1, 2), (0, 3), (0, 2), (0, 1))
"""Pairs of a group that may go; of equal losses the first one goes, so that the earlier positions stay."""


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

    Output split: only rows of S change. Input split: columns of S are pruned, and the dense columns,
    which stand to the right of them, absorb the compensation. Returns a new tensor.
    """
    result = weight.clone()
    if layout.sparse:
        rows, cols = layout.sparse_shape
        result[:rows] = obs_rows(weight[:rows], cols, factor.upper, factor.dead, block_size)
    return result


def obs_rows(
    weight: torch.Tensor, cols: int, upper: torch.Tensor, dead: torch.Tensor, block_size: int = 128
) -> torch.Tensor:
    """Prune the first ``cols`` columns of ``weight [N, K]``; ``upper``, ``dead``: see :class:`Factor`.

    SparseGPT (arXiv 2301.00774, algorithm 1) with the error measure |w| / U_jj, a group of four at a time:
    which two go is decided at the group's start, so that their errors are a linear function of its weights,
    one of six. On a GPU the launches are what takes time; a group has eight. Returns a new tensor.
    """
    w = weight.clone()
    w[:, :cols].masked_fill_(dead[:cols], 0.0)
    tables = _error_tables(upper, cols)
    pairs = torch.zeros(len(DROPPED), GROUP, device=w.device)
    pairs.scatter_(1, torch.tensor(DROPPED, device=w.device), 1.0)
    gone = pairs.t().bool()
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        block = w[:, start:stop].t().contiguous()  # a column of w is a row here: contiguous updates
        u = upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(0, stop - start, GROUP):
            group, error = block[j : j + GROUP], errors[j : j + GROUP]
            tried = (tables[(start + j) // GROUP] @ group).view(-1, GROUP, len(w))
            choice = (pairs @ tried[0].abs()).argmin(0)
            torch.gather(tried[1:], 0, choice.expand(1, GROUP, -1), out=error[None])
            block[j:].addmm_(u[j : j + GROUP, j:].t(), error, alpha=-1)
            group.masked_fill_(gone[:, choice], 0.0)  # exact where the update leaves rounding
        w[:, start:stop] = block.t()
        w[:, stop:].addmm_(errors.t(), upper[start:stop, stop:], alpha=-1)
    return w


def _error_tables(upper: torch.Tensor, cols: int) -> torch.Tensor:
    """Matrices ``[cols / 4, 7 · 4, 4]`` that turn a group's four weights into the errors e of dropping them.

    Compensation takes eᵀU from the row. First e of each weight dropped alone, w / U_jj; then for each of
    :data:`DROPPED` that of the pair, the second of which feels the first: U'ᵀ e = w with U' their part of U.
    """
    index = torch.arange(cols, device=upper.device).view(-1, GROUP)
    u = upper[index[:, :, None], index[:, None, :]]
    inverse = 1 / u.diagonal(dim1=1, dim2=2)
    tables = upper.new_zeros(len(u), 1 + len(DROPPED), GROUP, GROUP)
    tables[:, 0] = torch.diag_embed(inverse)
    for table, (p, q) in zip(tables[:, 1:].unbind(1), DROPPED, strict=True):
        table[:, p, p], table[:, q, q] = inverse[:, p], inverse[:, q]
        table[:, q, p] = -u[:, p, q] * inverse[:, p] * inverse[:, q]
    return tables.flatten(1, 2)


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
