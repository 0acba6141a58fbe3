"""Least squares on kept weights and the choice of pairs, against dense solves and brute force."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from vllm_spense.format import Layout
from vllm_spense.pruning import PruneConfig
from vllm_spense.pruning.solvers.hessian import Hessian
from vllm_spense.pruning.solvers.obs import SolverError, factorize, prune_obs
from vllm_spense.pruning.solvers.refit import _best_pairs, refine, refit
from vllm_spense.pruning.solvers.solver import REFIT_DAMPING, Solver

SIZES = [(1, 8, 8), (5, 16, 16), (12, 48, 24), (7, 40, 16), (16, 64, 64)]
"""N, K, 2:4 columns: one row, one group of metadata, dense columns at the right."""


def correlated(features: int, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    """The Hessian of inputs that share a few directions, of sizes from 0.1 to 10."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 4, generator=generator) @ torch.randn(4, features, generator=generator)
    x = (shared + torch.randn(tokens, features, generator=generator)) * torch.logspace(-1, 1, features)
    h = Hessian(features)
    h.add(x)
    return h.matrix("test")


def problem(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator), correlated(k, seed=seed)


def loss(weight: torch.Tensor, original: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Squared output error per row [N], in fp64."""
    change = (weight - original).double()
    return ((change @ h.double()) * change).sum(1)


def least_squares(kept: torch.Tensor, h: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Row by row: the kept entries that minimise the loss, by a dense solve in fp64."""
    best = torch.zeros_like(original, dtype=torch.float64)
    for row, mask in enumerate(kept.bool()):
        h64, target = h.double(), (h.double() @ original[row].double())
        best[row, mask] = torch.linalg.solve(h64[mask][:, mask], target[mask])
    return best


def pruned_by_obs(weight: torch.Tensor, h: torch.Tensor, sparse: int) -> tuple[torch.Tensor, torch.Tensor]:
    """OBS on the first ``sparse`` columns of all rows, and its factor."""
    n, k = weight.shape
    layout = Layout("input", n, k, sparse) if sparse < k else Layout("output", n, k, n)
    factor = factorize(h, 0.01, name="test")
    result = weight.clone()
    if sparse == k and n % 4:  # an output split wants whole groups of rows; here only the columns matter
        padded = torch.cat([weight, weight.new_zeros(-n % 4, k)])
        result = prune_obs(padded, Layout("output", len(padded), k, len(padded)), factor)[:n]
    else:
        result = prune_obs(weight, layout, factor)
    return result, factor.upper


def is_24(region: torch.Tensor) -> bool:
    return bool(((region.reshape(region.shape[0], -1, 4) != 0).sum(-1) <= 2).all())


@pytest.mark.parametrize(("n", "k", "sparse"), SIZES)
def test_refit_is_the_dense_least_squares(n: int, k: int, sparse: int) -> None:
    weight, h = problem(n, k)
    pruned, _ = pruned_by_obs(weight, h, sparse)
    kept = torch.ones_like(weight)
    kept[:, :sparse] = (pruned[:, :sparse] != 0).float()
    fitted = refit(pruned, kept, h, weight @ h, 4 * k)
    expected = least_squares(kept, h, weight)
    assert (fitted[kept == 0] == 0).all()
    torch.testing.assert_close(fitted.double(), expected, rtol=2e-3, atol=2e-3)
    best = loss(expected, weight, h)
    assert (loss(fitted, weight, h) <= best * 1.0001).all()
    assert (best < loss(pruned, weight, h)).all()


@pytest.mark.parametrize(("n", "k", "sparse"), SIZES)
def test_more_iterations_never_lose(n: int, k: int, sparse: int) -> None:
    weight, h = problem(n, k, seed=1)
    pruned, _ = pruned_by_obs(weight, h, sparse)
    kept = (pruned != 0).float()
    losses = [loss(refit(pruned, kept, h, weight @ h, i), weight, h) for i in range(9)]
    torch.testing.assert_close(losses[0], loss(pruned, weight, h))
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-5)).all()
    assert losses[-1].sum() < losses[0].sum()


def test_refit_of_the_answer_stays() -> None:
    """No direction is left: steps of 0 / 0 must not become NaN."""
    weight, h = problem(4, 16)
    kept = torch.ones_like(weight)
    torch.testing.assert_close(refit(weight, kept, h, weight @ h, 20), weight, rtol=1e-4, atol=1e-4)
    nothing = torch.zeros_like(weight)
    assert torch.equal(refit(nothing, nothing, h, weight @ h, 5), nothing)


def test_best_pairs_against_brute_force() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, gradient = (torch.randn(6, 9, 4, generator=generator) for _ in range(2))
    root = torch.randn(9, 4, 4, generator=generator)
    curvature = root @ root.mT + 0.1 * torch.eye(4)
    kept = _best_pairs(weight, gradient, curvature)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert (kept.sum(-1) == 2).all()
    for n in range(6):
        for g in range(9):
            left = {}
            for pair in combinations(range(4), 2):
                c, w, pull = curvature[g].double(), weight[n, g].double(), gradient[n, g].double()
                new, index = torch.zeros(4, dtype=torch.float64), list(pair)
                new[index] = torch.linalg.solve(c[index][:, index], (pull + c @ w)[index])
                left[pair] = float((new - w) @ c @ (new - w) - 2 * pull @ (new - w))
            chosen = tuple(kept[n, g].nonzero().flatten().tolist())
            assert left[chosen] == pytest.approx(min(left.values()), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("n", "k", "sparse"), [s for s in SIZES if s[1] > 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_refine_beats_refit_beats_obs(n: int, k: int, sparse: int, seed: int) -> None:
    weight, h = problem(n, k, seed)
    pruned, upper = pruned_by_obs(weight, h, sparse)
    start = pruned.clone()
    refitted, refined = (
        refine(pruned, sparse, h, weight @ h, upper, rounds=rounds, iterations=16) for rounds in (0, 4)
    )
    assert torch.equal(pruned, start), "the argument is left alone"
    by_obs, by_refit, by_refine = (float(loss(w, weight, h).sum()) for w in (pruned, refitted, refined))
    assert by_refine < by_refit < by_obs
    assert is_24(refined[:, :sparse])
    assert (refined[:, sparse:] != 0).all()
    if sparse < k:
        assert (refined[:, sparse:] != weight[:, sparse:]).any(), "dense columns answer, too"


def test_the_seed_decides_and_odd_shapes_work() -> None:
    weight, h = problem(12, 48)
    pruned, upper = pruned_by_obs(weight, h, 48)
    runs = [refine(pruned, 48, h, weight @ h, upper, rounds=3, seed=s) for s in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    weight, h = problem(1, 8)
    pruned, upper = pruned_by_obs(weight, h, 8)
    one = refine(pruned, 8, h, weight @ h, upper, rounds=2)
    assert one.shape == (1, 8)
    assert is_24(one)
    assert loss(one, weight, h) <= loss(pruned, weight, h)


def test_rows_do_not_know_each_other() -> None:
    weight, h = problem(10, 16)
    pruned, upper = pruned_by_obs(weight, h, 8)
    target = weight @ h
    whole = refine(pruned, 8, h, target, upper, rounds=2, fraction=1.0)
    parts = [
        refine(pruned[i], 8, h, target[i], upper, rounds=2, fraction=1.0) for i in torch.arange(10).split(4)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


# -- as the pruner calls it ------------------------------------------------------------------------


def solver(h: torch.Tensor, **changes: object) -> Solver:
    return Solver(PruneConfig(**({"calibration": "x"} | changes)), h, "layers.3.mlp.up_proj")


@pytest.mark.parametrize("layout", [Layout("output", 12, 48, 8), Layout("input", 12, 48, 24)], ids=str)
def test_the_solver_improves_on_the_papers(layout: Layout) -> None:
    weight, h = problem(12, 48)
    original = weight.clone()
    paper = solver(h, preset="spensegpt+").prune(weight, layout)
    guided = solver(h).prune(weight, layout)
    rows, cols = layout.sparse_shape
    assert torch.equal(weight, original)
    assert is_24(guided[:rows, :cols])
    assert torch.equal(guided[rows:], weight[rows:])
    assert loss(guided, weight, h).sum() < 0.95 * loss(paper, weight, h).sum()
    damped = h + REFIT_DAMPING * h.diagonal().mean() * torch.eye(48)
    kept = torch.ones_like(weight)
    kept[:rows, :cols] = (guided[:rows, :cols] != 0).float()
    best = loss(least_squares(kept, damped, weight), weight, damped).sum()
    assert loss(guided, weight, damped).sum() < 1.05 * best, "little is left to gain with these pairs"


def test_dead_inputs_and_groups_of_zeros() -> None:
    weight, _ = problem(8, 32)
    weight[:, 4:8] = 0
    weight[2] = 0
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    x[:, [0, 8, 9, 10, 11, 30]] = 0  # one of a group, a whole group, one dense column
    h = Hessian(32)
    h.add(x)
    layout = Layout("input", 8, 32, 16)
    pruned = solver(h.matrix("test")).prune(weight, layout)
    assert torch.isfinite(pruned).all()
    assert is_24(pruned[:, :16])
    assert (pruned[2] == 0).all()
    torch.testing.assert_close(pruned[:, 30], weight[:, 30])


@pytest.mark.parametrize("preset", ["guided", "spensegpt+"])
def test_all_inputs_dead(preset: str) -> None:
    weight, _ = problem(4, 16)
    pruned = solver(torch.zeros(16, 16), preset=preset).prune(weight, Layout("output", 4, 16, 4))
    assert (pruned == 0).all()


def test_numbers_that_overflow_name_the_layer() -> None:
    weight, h = problem(4, 16)
    with pytest.raises(SolverError, match=r"layers\.3\.mlp\.up_proj.*NaN or infin"):
        solver(h * 1e30).prune(weight * 1e15, Layout("output", 4, 16, 4))
