"""The OBS solver against a slow reference in fp64, one row and one weight at a time."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.format import Layout
from vllm_spense.format.sparse24 import magnitude_mask
from vllm_spense.pruning.solvers.hessian import Hessian, output_error
from vllm_spense.pruning.solvers.obs import (
    SolverError,
    factorize,
    prune_magnitude,
    prune_obs,
    prune_wanda,
)


def obs_reference(weight: torch.Tensor, h: torch.Tensor, layout: Layout, damping: float):
    """Eliminate inputs left to right with explicit inverses of the remaining Hessian (fp64).

    For input j, [H_{j:,j:}]⁻¹ gives both the error measure w²/[·]_00 and the compensation of the columns
    to the right; groups of four choose their two victims by the measure as it stands at the group's start.
    """
    w = weight.double().clone()
    h = h.double().clone()
    dead = h.diagonal() == 0
    live_mean = h.diagonal()[~dead].mean()
    h[dead, dead] = 1.0
    h += damping * live_mean * torch.eye(len(h), dtype=torch.float64)
    rows, cols = layout.sparse_shape
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(len(h))]
    for r in range(rows):
        w[r, :cols][dead[:cols]] = 0
        for j in range(cols):
            if j % 4 == 0:
                measure = [(float(w[r, i] ** 2 / inverses[i][0, 0]), -i) for i in range(j, j + 4)]
                victims = {-i for _, i in sorted(measure)[:2]}
            if j in victims:
                inverse = inverses[j]
                w[r, j:] -= w[r, j] / inverse[0, 0] * inverse[0]
                w[r, j] = 0
    return w


def hessian(features: int, tokens: int = 300, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    h = Hessian(features)
    h.add(torch.randn(tokens, features, generator=generator) @ mix)
    return h.matrix("test")


def is_24(region: torch.Tensor) -> bool:
    groups = region.reshape(region.shape[0], -1, 4)
    return bool(((groups != 0).sum(-1) <= 2).all())


LAYOUTS = [
    Layout("output", 12, 48, 8),
    Layout("output", 12, 48, 12),
    Layout("input", 12, 48, 24),
    Layout("input", 12, 48, 48),
    Layout("input", 7, 40, 16),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("block_size", [4, 16, 128])
def test_obs_equals_reference(layout: Layout, block_size: int) -> None:
    torch.manual_seed(1)
    weight = torch.randn(layout.out_features, layout.in_features)
    h = hessian(layout.in_features)
    factor = factorize(h, 0.01, name="test")
    pruned = prune_obs(weight, layout, factor, block_size)
    expected = obs_reference(weight, h, layout, 0.01)
    assert torch.equal(pruned == 0, expected == 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=2e-4, atol=2e-4)
    rows, cols = layout.sparse_shape
    assert is_24(pruned[:rows, :cols])


def test_dense_rows_stay_and_dense_columns_compensate() -> None:
    torch.manual_seed(2)
    weight, h = torch.randn(16, 48), hessian(48)
    factor = factorize(h, 0.01, name="test")
    rows = prune_obs(weight, Layout("output", 16, 48, 8), factor)
    assert torch.equal(rows[8:], weight[8:])
    layout = Layout("input", 16, 48, 24)
    cols = prune_obs(weight, layout, factor)
    assert (cols[:, 24:] != weight[:, 24:]).all()
    frozen = torch.cat([cols[:, :24], weight[:, 24:]], 1)  # the same without the dense columns' help
    assert output_error(cols - weight, weight, h) < 0.9 * output_error(frozen - weight, weight, h)


def test_obs_beats_wanda_beats_magnitude() -> None:
    torch.manual_seed(3)
    weight, h = torch.randn(32, 64), hessian(64)
    h = h * torch.outer(s := torch.logspace(-1, 1, 64), s)  # inputs of very different size
    layout = Layout("output", 32, 64, 32)
    solved = {
        "obs": prune_obs(weight, layout, factorize(h, 0.01, name="test")),
        "wanda": prune_wanda(weight, layout, h),
        "magnitude": prune_magnitude(weight, layout),
    }
    losses = {name: output_error(w - weight, weight, h) for name, w in solved.items()}
    assert losses["obs"] < losses["wanda"] < losses["magnitude"]


@pytest.mark.parametrize("method", ["obs", "wanda", "magnitude"])
def test_ties_keep_the_earlier_position(method: str) -> None:
    weight, h = torch.ones(3, 16), torch.eye(16)
    layout = Layout("output", 3, 16, 2)
    if method == "obs":
        pruned = prune_obs(weight, layout, factorize(h, 0.01, name="test"))
    else:
        pruned = prune_wanda(weight, layout, h) if method == "wanda" else prune_magnitude(weight, layout)
    expected = torch.tensor([1.0, 1, 0, 0]).repeat(2, 4)
    assert torch.equal(pruned[:2], expected)
    assert torch.equal(pruned[2], weight[2])


def test_ties_of_every_kind_keep_the_earlier_positions() -> None:
    weight = torch.cartesian_prod(*[torch.arange(-1.0, 3.0)] * 4).repeat(1, 2)
    pruned = prune_obs(weight, Layout("input", 256, 8, 8), factorize(torch.eye(8), 0.01, name="test"))
    assert torch.equal(pruned, weight * magnitude_mask(weight.abs()))


def test_zero_groups_and_dead_columns() -> None:
    torch.manual_seed(4)
    weight = torch.randn(8, 32)
    weight[:, 4:8] = 0
    x = torch.randn(200, 32)
    x[:, [0, 9, 30]] = 0
    h = Hessian(32)
    h.add(x)
    matrix = h.matrix("test")
    layout = Layout("input", 8, 32, 16)
    factor = factorize(matrix, 0.01, name="test")
    pruned = prune_obs(weight, layout, factor)
    assert factor.dead.nonzero().flatten().tolist() == [0, 9, 30]
    assert torch.isfinite(pruned).all()
    assert (pruned[:, [0, 9]] == 0).all()
    assert torch.equal(pruned[:, 30], weight[:, 30])  # a dead input of the dense region is left alone
    assert is_24(pruned[:, :16])
    expected = obs_reference(weight, matrix, layout, 0.01)
    torch.testing.assert_close(pruned.double(), expected, rtol=2e-4, atol=2e-4)


def test_all_inputs_dead() -> None:
    weight = torch.randn(4, 16)
    pruned = prune_obs(weight, Layout("output", 4, 16, 2), factorize(torch.zeros(16, 16), 0.01, name="test"))
    assert (pruned[:2] == 0).all()
    assert torch.equal(pruned[2:], weight[2:])


def test_empty_sparse_region_changes_nothing() -> None:
    weight = torch.randn(4, 16)
    factor = factorize(hessian(16), 0.01, name="test")
    assert torch.equal(prune_obs(weight, Layout("output", 4, 16, 0), factor), weight)


def test_damping_escalates_and_strict_refuses() -> None:
    h = torch.eye(16)
    h[0, 1] = h[1, 0] = 1.02  # not positive definite until 2 % are added
    factor = factorize(h, 0.01, name="test")
    assert (factor.escalations, factor.damping) == (1, pytest.approx(0.1))
    with pytest.raises(SolverError, match=r"layers\.3.*not positive definite"):
        factorize(h, 0.01, name="layers.3", strict=True)
    h[0, 1] = h[1, 0] = 1e6
    with pytest.raises(SolverError, match="damping 100"):
        factorize(h, 0.01, name="test")


def test_output_error_is_the_error_of_the_outputs() -> None:
    torch.manual_seed(5)
    x, w, d = torch.randn(100, 16), torch.randn(8, 16), torch.randn(8, 16)
    h = Hessian(16)
    h.add(x[:30])
    h.add(x[30:].view(7, 10, 16))
    expected = float((x @ d.t()).square().sum() / (x @ w.t()).square().sum())
    assert output_error(d, w, h.matrix("test")) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(h.matrix("test"), 2 / 100 * x.t() @ x)


def test_hessian_over_several_blocks_is_symmetric() -> None:
    x = torch.randn(3, 1100)
    h = Hessian(1100)
    h.add(x)
    matrix = h.matrix("test")
    torch.testing.assert_close(matrix, 2 / 3 * x.t() @ x)
    assert torch.equal(matrix, matrix.t())


def test_hessian_names_the_module_with_nan() -> None:
    h = Hessian(8)
    h.add(torch.tensor([[1.0] * 7 + [float("nan")]]))
    with pytest.raises(ValueError, match=r"module layers\.1\.mlp\.up_proj.*NaN"):
        h.matrix("layers.1.mlp.up_proj")
