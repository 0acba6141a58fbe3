"""The order in which OBS visits the columns, against a permuted sweep."""

from __future__ import annotations

import pytest
import torch

from tests.pruning.problems import LAYOUTS, hessian, inputs, is_24, loss, options, random_weight
from vllm_spense.format import Layout
from vllm_spense.pruning.solvers.obs import factorize, obs_rows
from vllm_spense.pruning.solvers.solver import Solver


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_energy_order_is_a_permuted_sweep(layout: Layout) -> None:
    rows, cols = layout.sparse_shape
    weight, h = random_weight(12, 48), hessian(inputs(48)).matrix("test")
    energies = [float(h.diagonal()[g : g + 4].sum()) for g in range(0, cols, 4)]
    groups = sorted(range(cols // 4), key=lambda g: -energies[g])
    order = torch.tensor([4 * g + i for g in groups for i in range(4)] + list(range(cols, 48)))
    factor = factorize(h[order][:, order], 0.01, name="test")
    expected = weight.clone()
    expected[:rows, order] = obs_rows(weight[:rows, order], cols, factor.upper, factor.dead)
    alone = {"refit": 0, "refine": 0}
    found = Solver(options(order="energy", **alone), h, "test").prune(weight, layout)
    assert torch.equal(found, expected)
    assert is_24(found[:rows, :cols])
    assert torch.equal(found[rows:], weight[rows:])
    natural = Solver(options(order="natural", **alone), h, "test").prune(weight, layout)
    assert not torch.equal(found, natural)


def test_the_next_linear_has_the_same_order() -> None:
    """Gate and up share a solver, least squares and all."""
    layout, h = LAYOUTS[0], hessian(inputs(48)).matrix("test")
    both = Solver(options(order="energy"), h, "test")
    both.prune(random_weight(12, 48), layout)
    second = random_weight(12, 48, seed=1)
    alone = Solver(options(order="energy"), h, "test").prune(second, layout)
    assert torch.equal(both.prune(second, layout), alone)
    assert loss(alone, second, h) < 0.9 * loss(
        Solver(options(order="energy", refit=0, refine=0), h, "test").prune(second, layout), second, h
    )
