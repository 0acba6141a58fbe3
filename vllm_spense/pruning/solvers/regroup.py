"""Which columns of down form the groups of four: the order of the intermediate indices inside S is free.

Rows of the inner linears may stand in any order, and with them the columns of down. OBS can drop two of four
at the least loss where the weights to keep of a row are spread evenly over the groups (channel permutations:
Pool and Yu, NeurIPS 2021; here with the loss of OBS instead of magnitudes).
"""

from __future__ import annotations

from itertools import combinations

import torch

from vllm_spense.format.layout import GROUP
from vllm_spense.pruning.solvers.refit import pair_energy

_TWO = 2 * GROUP
_PAIRS = tuple(combinations(range(_TWO), 2))
_SPLITS = tuple(s for s in combinations(range(_TWO), GROUP) if 0 in s)
"""The 35 ways to make two groups of eight columns, by the first column's group; the first changes nothing."""
_ROWS = 1024


def regroup(weight: torch.Tensor, h_inverse: torch.Tensor, rounds: int, seed: int = 0) -> torch.Tensor:
    """Order [K] of the columns of ``weight [N, K]`` fp32 whose groups of four lose little when two go.

    A round pairs the groups at random and deals the eight columns of each pair anew, the best of 35 ways.
    The loss of dropping p and q from a row is ``w_pqᵀ ([H⁻¹]_pq)⁻¹ w_pq``, as if all other weights of the row
    made up for it. ``h_inverse [K, K]`` is the damped H⁻¹; K is a multiple of four. At most 1024 rows, evenly
    spaced, are looked at. A round never makes that loss larger.
    """
    if len(weight) > _ROWS:
        weight = weight[:: -(-len(weight) // _ROWS)]
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(weight.shape[1], device=weight.device).view(-1, GROUP)
    ways = torch.tensor([[*s, *(set(range(_TWO)) - set(s))] for s in _SPLITS], device=weight.device)
    for _ in range(rounds if len(groups) > 1 else 0):
        shuffled = torch.randperm(len(groups), generator=generator).to(weight.device)
        left, right = shuffled[: len(groups) // 2 * 2].view(2, -1)
        columns = torch.cat([groups[left], groups[right]], 1)
        best = _losses(weight, h_inverse, columns).argmin(0)
        dealt = columns.gather(1, ways[best])
        groups[left], groups[right] = dealt[:, :GROUP], dealt[:, GROUP:]
    return groups.flatten()


def _losses(weight: torch.Tensor, h_inverse: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Loss [35, P], summed over rows, of each of the ways to deal the ``columns [P, 8]``."""
    w = weight[:, columns]
    inverse = h_inverse[columns[:, :, None], columns[:, None, :]]
    drop = {(p, q): pair_energy(w, inverse, p, q) for p, q in _PAIRS}

    def group(members: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([drop[pair] for pair in combinations(members, 2)]).amin(0).sum(0)

    others = [tuple(i for i in range(_TWO) if i not in s) for s in _SPLITS]
    return torch.stack([group(s) + group(o) for s, o in zip(_SPLITS, others, strict=True)])
