"""Which intermediate indices of an MLP stay dense.

One set D serves gate (rows), up (rows) and down (columns), or fc1 and fc2 of a plain MLP. The MLP's
function does not depend on the order of the intermediate dimension (SpenseGPT, arXiv 2606.10445,
equation 4), so D moves to the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm_spense.format.layout import META_GROUP
from vllm_spense.pruning.solvers.obs import element_scores

_EPSILON = 1e-12


@dataclass(frozen=True)
class DenseChoice:
    """A choice made for the whole model at once: per layer the size of D and, where the dense indices are
    those that would cost the most loss, what each index costs [I]."""

    counts: list[int]
    costs: list[torch.Tensor] | None


def dense_count(intermediate: int, dense_ratio: float, alignment: int) -> int:
    """Size of D: the multiple of ``alignment`` nearest to ``dense_ratio`` · intermediate (half: up).

    Raises ``ValueError`` when the 2:4 rest is no multiple of 8, the granularity of its metadata.
    """
    if dense_ratio in (0, 1):
        count = intermediate if dense_ratio else 0
    else:
        nearest = math.floor(dense_ratio * intermediate / alignment + 0.5) * alignment
        count = min(nearest, intermediate)
    sparse = intermediate - count
    if sparse % META_GROUP:
        raise ValueError(
            f"intermediate size {intermediate} with {count} dense indices leaves {sparse} for 2:4, "
            f"which is no multiple of {META_GROUP}; choose another --dense-ratio or alignment"
        )
    return count


def index_scores(
    inner: Sequence[torch.Tensor],
    down: torch.Tensor,
    h_in: torch.Tensor,
    h_down: torch.Tensor,
    units: int | None = None,
) -> torch.Tensor:
    """SpenseGPT+ score [I] of each intermediate index (arXiv 2606.10445, section on SpenseGPT+).

    Per projection the mean of |W_ij| · sqrt(H_jj) over the index's row (``inner``: gate and up, or the one
    before the activation, ``[I, K]``) or column (down ``[K, I]``), divided by that vector's mean; then
    summed. ``h_in``, ``h_down``: Hessians of the inputs of inner and of down, or their diagonals.
    ``units``: score that many runs of neighbouring indices, each projection by the mean over a run (groups
    of heads: ``inner`` are q, k and v then, ``down`` is o).
    """
    vectors = [element_scores(weight, h_in).mean(1) for weight in inner]
    vectors.append(element_scores(down, h_down).mean(0))
    if units is not None:
        vectors = [vector.view(units, -1).mean(1) for vector in vectors]
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total += vector / (vector.mean() + _EPSILON)
    return total


def permute_rows(linear: nn.Linear, order: torch.Tensor) -> None:
    """Put the outputs of ``linear``, rows and bias, into ``order [N]``, in place."""
    here = order.to(linear.weight.device)
    linear.weight.copy_(linear.weight[here])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias[here])


def permute_columns(linear: nn.Linear, order: torch.Tensor) -> None:
    """Put the inputs of ``linear`` into ``order [K]``, in place."""
    linear.weight.copy_(linear.weight[:, order.to(linear.weight.device)])


def permutation(scores: torch.Tensor | None, intermediate: int, dense: int) -> torch.Tensor:
    """New order [I] of the intermediate indices: S, then D, each in its original order.

    D holds the ``dense`` highest scores (of equal ones the later index), or without scores the last
    indices, which is the identity (SpenseGPT).
    """
    order = torch.arange(intermediate)
    if scores is None or dense in (0, intermediate):
        return order
    ranked = torch.argsort(scores.cpu(), stable=True)
    is_dense = torch.zeros(intermediate, dtype=torch.bool)
    is_dense[ranked[intermediate - dense :]] = True
    return torch.cat([order[~is_dense], order[is_dense]])
