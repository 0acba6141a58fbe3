"""Gate and up fitted together, to the MLP's intermediate values instead of to their own outputs.

One intermediate value is ``h = act(g·x) · (u·x)`` of its rows g of gate and u of up (``act(w·x)`` of a plain
MLP). What matters of an error of u is its size where the gate is open, and the other way round; and up can
make up for what gate lost. So each row is fitted by least squares weighted over tokens with the slope of h
(a Gauss-Newton step): up with the pruned gate, then gate with that up. Rows share no Hessian any more, but
are still independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vllm_spense.pruning.solvers.refit import conjugate_gradients
from vllm_spense.pruning.solvers.rows import ROWS

JOINT_TOKENS, TOKENS_PER_FEATURE = 65536, 32
"""Most tokens used, in all and per feature: there is a term of tokens x rows x features per iteration."""
CHUNK = 2048
"""Tokens at a time: what lies between two matrix products stays in a CPU's cache, and is small on a GPU."""
RIDGE = 60.0
"""Weight of staying where the rows are, relative to each weight's own curvature, times features per token: a
gate opens for few tokens, and the fewer there are the more do rows fit what these have by chance."""
JUDGED = 16
"""One token for so many fitted ones is kept back, and judges whether the fit does any good."""
SHARED_ITERATIONS = 8
"""Of conjugate gradients with the Hessian that rows would share: it has no term in tokens."""
_TINY = 1e-30

Activation = Callable[[torch.Tensor], torch.Tensor]
Offsets = Sequence[torch.Tensor | float]


def stride(samples: int, tokens: int, features: int) -> int:
    """Of ``samples`` with so many ``tokens`` each, every how many-th token is fitted to."""
    return -(-samples * tokens // min(JOINT_TOKENS, TOKENS_PER_FEATURE * features))


def tokens_used(samples: int, tokens: int, features: int) -> int:
    """How many tokens that leaves in all."""
    return samples * -(-tokens // stride(samples, tokens, features))


def split(x: torch.Tensor, every: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a sample's inputs ``x [T, K]`` those to fit to, and some of the others, that judge the fit."""
    if every > 1:
        return x[::every], x[every // 2 :: every * JUDGED]
    kept_back = torch.arange(len(x), device=x.device) % JUDGED == JUDGED - 1
    return x[~kept_back], x[kept_back]


def fit_jointly(
    activation: Activation,
    pruned: Sequence[torch.Tensor],
    originals: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    h: torch.Tensor,
    iterations: int,
) -> list[torch.Tensor]:
    """New values for the nonzero weights of ``pruned``: gate and up, or the one of a plain MLP, each [R, K].

    ``originals``: the dense weights, ``biases`` [R] of both, ``x [T, K]`` the MLP's inputs, ``h [K, K]``
    their Hessian (``2/T Σ x xᵀ`` of these tokens or of more), all fp32 on one device. ``iterations`` of
    conjugate gradients for each. Zeros stay zero.
    """
    shared = h * (len(x) / 2)
    chunks = x.split(CHUNK)
    fitted = []
    for start in range(0, len(pruned[0]), ROWS):
        rows = slice(start, start + ROWS)
        offsets = [0.0 if bias is None else bias[rows] for bias in biases]
        dense, weights = [w[rows] for w in originals], [w[rows] for w in pruned]
        wanted = [_value(activation, _outputs(dense, offsets, chunk)) for chunk in chunks]
        # Gate moves last, so that both steps see the same outputs of it.
        gates = [_outputs(weights[:1], offsets[:1], chunk)[0] for chunk in chunks]
        for which in reversed(range(len(weights))):
            squares, pull = [], torch.zeros_like(weights[which])
            for chunk, gate, values in zip(chunks, gates, wanted, strict=True):
                inner = [gate, *_outputs(weights[1:], offsets[1:], chunk)]
                slope = _slope(activation, inner, which)
                pull += (slope * (values - _value(activation, inner))).t() @ chunk
                squares.append(slope.square_())
            weights[which] = _step(weights[which], x, squares, pull, shared, iterations)
        fitted.append(weights)
    return [torch.cat(parts) for parts in zip(*fitted, strict=True)]


def output_losses(
    activation: Activation,
    candidates: Sequence[Sequence[torch.Tensor]],
    originals: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    down: torch.Tensor,
    x: torch.Tensor,
) -> list[float]:
    """Summed squared error of the MLP's output on ``x [T, K]`` with each of the ``candidates`` for gate and
    up (the one linear of a plain MLP) in place of ``originals``, all [R, K]; ``down [N, R]`` as it was."""
    losses = [0.0] * len(candidates)
    for chunk in x.split(CHUNK):
        errors = [torch.zeros(len(chunk), len(down), device=x.device) for _ in candidates]
        for start in range(0, len(originals[0]), ROWS):
            rows = slice(start, start + ROWS)
            offsets = [0.0 if bias is None else bias[rows] for bias in biases]

            def values(weights: Sequence[torch.Tensor]) -> torch.Tensor:
                return _value(activation, _outputs([w[rows] for w in weights], offsets, chunk))  # noqa: B023

            wanted = values(originals)
            for error, candidate in zip(errors, candidates, strict=True):
                error += (values(candidate) - wanted) @ down[:, rows].t()
        losses = [loss + float(error.square().sum()) for loss, error in zip(losses, errors, strict=True)]
    return losses


def _outputs(weights: Sequence[torch.Tensor], offsets: Offsets, x: torch.Tensor) -> list[torch.Tensor]:
    return [x @ w.t() + offset for w, offset in zip(weights, offsets, strict=True)]


def _value(activation: Activation, inner: Sequence[torch.Tensor]) -> torch.Tensor:
    return activation(inner[0]) * inner[1] if len(inner) == 2 else activation(inner[0])


def _slope(activation: Activation, inner: Sequence[torch.Tensor], which: int) -> torch.Tensor:
    """Of the intermediate values [T, R] by the outputs of the inner linear ``which``."""
    with torch.enable_grad():
        leaf = inner[which].detach().requires_grad_()
        value = _value(activation, [*inner[:which], leaf, *inner[which + 1 :]])
        return torch.autograd.grad(value.sum(), leaf)[0]


def _step(
    weight: torch.Tensor,
    x: torch.Tensor,
    squares: Sequence[torch.Tensor],
    pull: torch.Tensor,
    shared: torch.Tensor,
    iterations: int,
) -> torch.Tensor:
    """``weight [R, K]`` moved by the D that minimises, row by row over kept entries,
    ``Σ_t (missing_t - slope_t · D x_t)² + ridge · Σ_j c_j D_j²``, c the mean squared slope times the diagonal
    of ``shared`` = Σ_t x_t x_tᵀ. Conjugate gradients, preconditioned by the same with slopes alike for all t.

    ``squares``: chunks [tokens, R] of squared slopes; ``pull [R, K]`` = Σ_t slope_t missing_t x_t.
    """
    kept = (weight != 0).float()
    chunks = x.split(CHUNK)
    scale = torch.stack([s.sum(0) for s in squares]).sum(0)[:, None] / len(x)
    curvature = scale * shared.diagonal() + _TINY
    ridge = RIDGE * x.shape[1] / len(x)

    def apply(direction: torch.Tensor) -> torch.Tensor:
        image = torch.zeros_like(direction)
        for chunk, s in zip(chunks, squares, strict=True):
            image += (s * (chunk @ direction.t())).t() @ chunk
        return image * kept + ridge * curvature * direction

    def form(direction: torch.Tensor) -> torch.Tensor:
        bend = (ridge * curvature * direction.square()).sum(1)
        for chunk, s in zip(chunks, squares, strict=True):
            bend += ((chunk @ direction.t()).square_() * s).sum(0)
        return bend[:, None]

    def apply_shared(direction: torch.Tensor) -> torch.Tensor:
        return scale * (direction @ shared) * kept + ridge * curvature * direction

    def precondition(residual: torch.Tensor) -> torch.Tensor:
        start = torch.zeros_like(residual)
        diagonal = (1 + ridge) * curvature
        return conjugate_gradients(apply_shared, start, residual, lambda r: r / diagonal, SHARED_ITERATIONS)

    start = torch.zeros_like(weight)
    return weight + conjugate_gradients(apply, start, pull * kept, precondition, iterations, form)
