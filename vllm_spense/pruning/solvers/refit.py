"""Better 2:4 weights than one OBS sweep leaves: least squares on the kept weights, and better pairs.

Both minimise the layer's squared output error, row by row, with H the input Hessian:
``tr((W - W*) H (W - W*)ᵀ)`` over weights that are 2:4 in the sparse region. OBS (SparseGPT) decides from
left to right and never comes back; here every kept weight answers to every other one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_spense.format.layout import GROUP

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""What may be kept of a group of four."""
_TINY = 1e-30


def refit(
    weight: torch.Tensor, kept: torch.Tensor, h: torch.Tensor, target: torch.Tensor, iterations: int
) -> torch.Tensor:
    """Move the ``kept [N, K]`` (0 or 1) entries of ``weight [N, K]`` fp32 towards their least squares.

    Conjugate gradients on ``W H = target`` restricted to kept entries, preconditioned by the diagonal, all
    rows at once (each with its own step). ``h [K, K]`` is positive definite, ``target [N, K]`` = W* H.
    Returns a new tensor; entries that are not kept stay what they are.
    """
    residual = (target - weight @ h) * kept
    diagonal = h.diagonal()
    return conjugate_gradients(lambda p: (p @ h) * kept, weight, residual, lambda r: r / diagonal, iterations)


Map = Callable[[torch.Tensor], torch.Tensor]


def conjugate_gradients(
    apply: Map,
    start: torch.Tensor,
    residual: torch.Tensor,
    precondition: Map,
    iterations: int,
    form: Map | None = None,
) -> torch.Tensor:
    """``start [N, K]`` moved towards the solution of N systems, one per row and each with its own steps.

    ``apply`` maps directions [N, K] by the systems' positive definite matrices A, ``precondition`` about
    back; ``residual [N, K]`` is what ``start`` leaves. ``form``: dᵀAd [N, 1] of directions, where that is
    cheaper than ``apply``: the last step needs no more.
    """
    direction = torch.zeros_like(residual)
    before = torch.full_like(residual[:, :1], torch.inf)
    for left in reversed(range(iterations)):
        scaled = precondition(residual)
        energy = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + energy / (before + _TINY) * direction
        if form is not None and not left:
            return start + energy / (form(direction) + _TINY) * direction
        image = apply(direction)
        step = energy / ((direction * image).sum(1, keepdim=True) + _TINY)
        start = start + step * direction
        residual = residual - step * image
        before = energy
    return start


def refine(
    weight: torch.Tensor,
    sparse: int,
    h: torch.Tensor,
    target: torch.Tensor,
    upper: torch.Tensor,
    *,
    rounds: int,
    iterations: int = 8,
    compensation: float = 0.5,
    fraction: float = 0.5,
    seed: int = 0,
) -> torch.Tensor:
    """Refit ``weight [N, K]``, then ``rounds`` times choose better pairs in the first ``sparse`` columns.

    A round compares the six pairs of each group by the loss that they would leave. How far the other
    weights would make up for a change lies between not at all (curvature H_gg) and perfectly
    (([H⁻¹]_gg)⁻¹); the curvature used is the ``compensation``-weighted harmonic mean of both.
    Half of the groups that could gain (``fraction``, at random) change per round, for neighbours that change
    together make up for the same thing twice; then :func:`refit`. ``upper``: upperᵀ·upper = H⁻¹.
    """
    groups = torch.arange(sparse, device=h.device).view(-1, GROUP)
    inverse = torch.einsum("kgi,kgj->gij", *[upper[:, :sparse].unflatten(1, (-1, GROUP))] * 2)
    own = torch.linalg.inv(h[groups[:, :, None], groups[:, None, :]])
    curvature = torch.linalg.inv((1 - compensation) * own + compensation * inverse)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.ones_like(weight)
    kept[:, :sparse] = (weight[:, :sparse] != 0).float()
    pairs = kept[:, :sparse].unflatten(1, (-1, GROUP))  # a view
    weight = refit(weight, kept, h, target, iterations)
    for _ in range(rounds):
        gradient = (target - weight @ h)[:, :sparse].unflatten(1, (-1, GROUP))
        better = _best_pairs(weight[:, :sparse].unflatten(1, (-1, GROUP)), gradient, curvature)
        changing = torch.rand(better.shape[:2], generator=generator).to(h.device) < fraction
        pairs.copy_(torch.where(changing[..., None], better, pairs))
        weight = refit(weight * kept, kept, h, target, iterations)
    return weight


def _best_pairs(weight: torch.Tensor, gradient: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """The two of four to keep in each group [N, G, 4] (0 or 1), with curvature [G, 4, 4].

    Around the present weights the loss of a group is quadratic, with its unconstrained minimum where
    ``curvature · w = gradient + curvature · weight``; a pair's gain is what its own minimum leaves of it.
    """
    pull = gradient + torch.einsum("ngi,gij->ngj", weight, curvature)
    best = torch.full(weight.shape[:2], -torch.inf, device=weight.device)
    kept = torch.zeros_like(weight)
    for p, q in PAIRS:
        gain = pair_energy(pull, curvature, p, q)
        better = gain > best
        best = torch.where(better, gain, best)
        pair = torch.zeros(GROUP, device=weight.device)
        pair[[p, q]] = 1
        kept = torch.where(better[..., None], pair, kept)
    return kept


def pair_energy(vectors: torch.Tensor, matrices: torch.Tensor, p: int, q: int) -> torch.Tensor:
    """``v_pqᵀ (M_pq)⁻¹ v_pq`` [N, G] of entries p and q of ``vectors [N, G, n]``, ``matrices [G, n, n]``."""
    a, b, c = matrices[:, p, p], matrices[:, p, q], matrices[:, q, q]
    x, y = vectors[..., p], vectors[..., q]
    return (c * x * x - 2 * b * x * y + a * y * y) / (a * c - b * b)
