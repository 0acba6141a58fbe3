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

from vllm_spense.pruning.refit import conjugate_gradients
from vllm_spense.pruning.rows import ROWS

JOINT_TOKENS = 32768
"""Most tokens used: there is a term of tokens x rows x features per iteration."""
RIDGE = 0.3
"""Weight of staying where the rows are, relative to each weight's own curvature: a gate opens for few tokens,
and without it rows fit these alone."""
_TINY = 1e-30

Activation = Callable[[torch.Tensor], torch.Tensor]


def fit_jointly(
    activation: Activation,
    pruned: Sequence[torch.Tensor],
    originals: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    iterations: int,
) -> list[torch.Tensor]:
    """New values for the nonzero weights of ``pruned``: gate and up, or the one of a plain MLP, each [R, K].

    ``originals``: the dense weights, ``biases`` [R] of both, ``x [T, K]`` the MLP's inputs, all fp32 on one
    device. ``iterations`` of conjugate gradients for each. Zeros stay zero.
    """
    fitted = []
    for start in range(0, len(pruned[0]), ROWS):
        rows = slice(start, start + ROWS)
        offsets = [0.0 if bias is None else bias[rows] for bias in biases]
        parts = [w[rows] for w in pruned], [w[rows] for w in originals]
        fitted.append(_fit_rows(activation, *parts, offsets, x, iterations))
    return [torch.cat(parts) for parts in zip(*fitted, strict=True)]


def _fit_rows(
    activation: Activation,
    weights: list[torch.Tensor],
    originals: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor | float],
    x: torch.Tensor,
    iterations: int,
) -> list[torch.Tensor]:
    wanted = _value(activation, [x @ w.t() + b for w, b in zip(originals, offsets, strict=True)])
    for which in reversed(range(len(weights))):
        inner = [x @ w.t() + b for w, b in zip(weights, offsets, strict=True)]
        missing = wanted - _value(activation, inner)
        weights[which] = _step(weights[which], x, _slope(activation, inner, which), missing, iterations)
    return weights


def _value(activation: Activation, inner: Sequence[torch.Tensor]) -> torch.Tensor:
    return activation(inner[0]) * inner[1] if len(inner) == 2 else activation(inner[0])


def _slope(activation: Activation, inner: Sequence[torch.Tensor], which: int) -> torch.Tensor:
    """Of the intermediate values [T, R] by the outputs of the inner linear ``which``."""
    with torch.enable_grad():
        leaf = inner[which].detach().requires_grad_()
        value = _value(activation, [*inner[:which], leaf, *inner[which + 1 :]])
        return torch.autograd.grad(value.sum(), leaf)[0]


def _step(
    weight: torch.Tensor, x: torch.Tensor, slope: torch.Tensor, missing: torch.Tensor, iterations: int
) -> torch.Tensor:
    """``weight [R, K]`` moved by the D that minimises, row by row over kept entries,
    ``Σ_t (missing_t - slope_t · D x_t)² + RIDGE Σ_j c_j D_j²`` with the curvature c; conjugate gradients."""
    kept = (weight != 0).float()
    squared = slope.square()
    curvature = squared.t() @ x.square() + _TINY
    residual = ((slope * missing).t() @ x) * kept

    def apply(direction: torch.Tensor) -> torch.Tensor:
        return ((squared * (x @ direction.t())).t() @ x) * kept + RIDGE * curvature * direction

    start = torch.zeros_like(weight)
    return weight + conjugate_gradients(apply, start, residual, curvature, iterations)
