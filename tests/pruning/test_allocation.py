"""One budget of dense indices for the whole model, against every other way to spend it."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch

from vllm_spense.models.parts import MlpShape
from vllm_spense.pruning import PruneConfig
from vllm_spense.pruning.choice.allocation import allocate, dense_counts, price
from vllm_spense.pruning.choice.selection import dense_count
from vllm_spense.pruning.warnings import PruneWarning

GLU = MlpShape(128, 256, 128, 2)


def shape(intermediate: int, hidden: int = 128, inner: int = 2) -> MlpShape:
    return MlpShape(hidden, intermediate, hidden, inner)


def random_costs(shapes: list[MlpShape], seed: int) -> list[torch.Tensor]:
    """Indices of very different worth, layers of very different worth."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s.intermediate, generator=generator).exp()
        * 4 ** float(torch.randn(1, generator=generator))
        for s in shapes
    ]


def avoided(costs: list[torch.Tensor], counts: list[int]) -> float:
    return sum(
        float(c.double().sort(descending=True).values[:n].sum()) for c, n in zip(costs, counts, strict=True)
    )


def spent(shapes: list[MlpShape], counts: list[int], budget: str = "bytes") -> float:
    return sum(price(s, n, budget) for s, n in zip(shapes, counts, strict=True))


def money(shapes: list[MlpShape], ratio: float, alignment: int, budget: str = "bytes") -> float:
    return spent(shapes, [dense_count(s.intermediate, ratio, alignment) for s in shapes], budget)


def legal(s: MlpShape, alignment: int) -> list[int]:
    return [*range(0, s.intermediate, alignment), s.intermediate]


def brute_force(
    costs: list[torch.Tensor], shapes: list[MlpShape], ratio: float, alignment: int, budget: str
) -> float:
    """The most loss that any affordable choice of counts avoids."""
    limit = money(shapes, ratio, alignment, budget) * (1 + 1e-9)
    choices = product(*(legal(s, alignment) for s in shapes))
    return max(avoided(costs, list(c)) for c in choices if spent(shapes, list(c), budget) <= limit)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_bytes_of_equal_layers_buy_the_dearest_blocks(ratio: float, seed: int) -> None:
    shapes = [GLU] * 3
    costs = random_costs(shapes, seed)
    counts = allocate(costs, shapes, ratio, 64)
    assert avoided(costs, counts) == pytest.approx(brute_force(costs, shapes, ratio, 64, "bytes"))
    blocks = [
        (float(block), i)
        for i, cost in enumerate(costs)
        for block in cost.double().sort(descending=True).values.view(-1, 64).sum(1)
    ]
    bought = sorted(blocks, reverse=True)[: 3 * dense_count(256, ratio, 64) // 64]
    assert counts == [64 * sum(layer == i for _, layer in bought) for i in range(3)]


@pytest.mark.parametrize("budget", ["bytes", "time"])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_different_layers_come_close_to_the_best(budget: str, ratio: float, seed: int) -> None:
    shapes = [shape(256), shape(208), shape(512, hidden=64), shape(320, inner=1)]
    costs = random_costs(shapes, seed)
    counts = allocate(costs, shapes, ratio, 64, budget)
    assert spent(shapes, counts, budget) <= money(shapes, ratio, 64, budget) * (1 + 1e-9)
    assert all(n in legal(s, 64) for n, s in zip(counts, shapes, strict=True))
    everywhere = [dense_count(s.intermediate, ratio, 64) for s in shapes]
    assert avoided(costs, counts) >= avoided(costs, everywhere)
    assert avoided(costs, counts) >= 0.95 * brute_force(costs, shapes, ratio, 64, budget)


@pytest.mark.parametrize("budget", ["bytes", "time"])
def test_all_of_the_budget_is_used(budget: str) -> None:
    """Of large layers, as no block of the 2:4 rest is affordable any more."""
    shapes = [shape(n, hidden=4096) for n in (11008, 14336)]
    costs = random_costs(shapes, 7)
    counts = allocate(costs, shapes, 0.5, 64, budget)
    left = money(shapes, 0.5, 64, budget) - spent(shapes, counts, budget)
    cheapest = min(
        price(s, n + 64, budget) - price(s, n, budget)
        for s, n in zip(shapes, counts, strict=True)
        if n < s.intermediate
    )
    assert 0 <= left < cheapest


@pytest.mark.parametrize("budget", ["bytes", "time"])
@pytest.mark.parametrize(("ratio", "expected"), [(0, [0, 0]), (1, [256, 208])])
def test_nothing_and_everything(budget: str, ratio: float, expected: list[int]) -> None:
    shapes = [shape(256), shape(208)]
    assert allocate(random_costs(shapes, 0), shapes, ratio, 64, budget) == expected


def test_a_budget_of_time_that_prunes_nothing_says_so() -> None:
    """A layer of SmolLM2: the launch of its kernels takes longer than its weights."""
    shapes = [shape(1536, hidden=576)] * 2
    costs = random_costs(shapes, 0)
    options = {"calibration": "any", "preset": "guided", "dense_ratio": 0.5}
    with pytest.warns(PruneWarning, match="keeps every MLP dense.*--allocation bytes"):
        counts = dense_counts(costs, shapes, PruneConfig(allocation="time", **options))
    assert counts == [1536, 1536]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(dense_counts(costs, shapes, PruneConfig(allocation="bytes", **options))) == 1536
        large = [shape(14336, hidden=4096)] * 2
        bought = dense_counts(random_costs(large, 0), large, PruneConfig(allocation="time", **options))
        assert 0 < sum(bought) < 2 * 14336


@pytest.mark.parametrize("factor", [1e-25, 1e-10, 1e10, 1e25])
def test_the_unit_of_loss_does_not_matter(factor: float) -> None:
    shapes = [shape(n, hidden=h) for n in (1024, 2048) for h in (256, 512)]
    costs = random_costs(shapes, 3)
    scaled = [c.double() * factor for c in costs]
    assert allocate(scaled, shapes, 0.5, 64) == allocate(costs, shapes, 0.5, 64)


def test_costs_of_zero_and_equal_costs() -> None:
    shapes = [GLU] * 4
    for value in (0.0, 1.0):
        counts = allocate([torch.full((256,), value)] * 4, shapes, 0.5, 64)
        assert spent(shapes, counts) <= money(shapes, 0.5, 64)
        assert sum(counts) == 4 * 128


def test_counts_that_no_layout_has_are_not_offered() -> None:
    shapes = [shape(256), shape(264)]
    for seed in range(8):
        counts = allocate(random_costs(shapes, seed), shapes, 0.47, 12)
        assert all((s.intermediate - n) % 8 == 0 for n, s in zip(counts, shapes, strict=True))
        assert spent(shapes, counts) <= spent(shapes, [120, 120])


def test_prices() -> None:
    """Bytes of FP8: 1 per dense weight, 5/8 per 2:4 weight; of a big MLP, time grows with the dense share."""
    assert price(GLU, 256, "bytes") == 3 * 256 * 128
    assert price(GLU, 64, "bytes") == 3 * 128 * (64 + 192 * 0.625)
    big = shape(14336, hidden=4096)
    times = [price(big, n, "time") for n in (0, 7168, 14336)]
    assert 0 < times[0] < times[1] < times[2] < 1e-3


def test_layers_without_an_mlp_have_no_count() -> None:
    shapes = [GLU, None, GLU]
    costs = [torch.ones(256), torch.empty(0), torch.ones(256) * 1000]
    for allocation in ("bytes", "time"):
        config = PruneConfig(calibration="x", allocation=allocation)
        counts = dense_counts(costs, shapes, config)
        assert counts[1] == 0
        assert counts[2] > counts[0]
    config = PruneConfig(calibration="x", allocation="uniform", dense_ratio=0.25)
    assert dense_counts(costs, shapes, config) == [64, 0, 64]
