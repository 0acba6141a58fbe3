"""Histograms against sorting, and thresholds against the budget and the cheapest choice."""

from __future__ import annotations

import math
import random

import pytest
import torch

from vllm_spense.sparsify.allocation import MOST, thresholds_by_loss, uniform_thresholds
from vllm_spense.sparsify.magnitudes import BINS, Magnitudes, values


def seen(*parts: torch.Tensor) -> Magnitudes:
    found = Magnitudes()
    for part in parts:
        found.see(part)
    return found


def test_bins_are_the_values_of_bf16() -> None:
    found = values()
    assert torch.equal(found, found.to(torch.bfloat16).float())
    assert found[0] == 0
    assert (found.diff() > 0).all()
    assert found[-1] == torch.finfo(torch.bfloat16).max


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.7, 0.99, 1.0])
def test_a_threshold_is_the_quantile(share: float) -> None:
    x = torch.randn(3, 7, 501, generator=torch.Generator().manual_seed(1)) * 3
    found = seen(x[:1], x[1:])
    rounded = x.to(torch.bfloat16).float().abs().flatten()
    threshold = found.threshold(share)
    ordered = rounded.sort().values
    assert threshold == ordered[math.ceil(share * len(ordered) - 1e-6) - 1]
    assert found.share(threshold) == pytest.approx(float((rounded <= threshold).double().mean()))
    assert found.share(threshold) >= share - 1e-9
    assert found.energy(threshold) == pytest.approx(
        float(rounded[rounded <= threshold].square().sum()), rel=1e-5
    )
    assert found.total == x.numel()


def test_zeros_need_no_threshold() -> None:
    found = seen(torch.tensor([0.0, -0.0, 0.0, 5.0]))
    assert found.threshold(0.75) == 0.0
    assert found.share(0.0) == 0.75
    assert found.threshold(0.76) == 5.0


def test_no_values_and_broken_ones() -> None:
    assert seen(torch.empty(0, 8)).total == 0
    for broken in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            seen(torch.tensor([1.0, broken]))
    assert len(Magnitudes().counts) == BINS


def layers(seed: int) -> dict[str, Magnitudes]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: seen(scale * torch.randn(width, 64, generator=generator))
        for name, scale, width in (("a", 0.1, 40), ("b", 1.0, 40), ("c", 20.0, 80))
    }


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_budget_is_met(sparsity: float, seed: int) -> None:
    found, generator = layers(seed), random.Random(seed)
    losses = {name: 10 ** generator.uniform(-4, 0) for name in found}
    thresholds = thresholds_by_loss(found, sparsity, losses)
    total = sum(layer.total for layer in found.values())
    skipped = sum(layer.share(thresholds[name]) * layer.total for name, layer in found.items()) / total
    assert sparsity <= skipped < sparsity + 0.01
    assert all(layer.share(thresholds[name]) <= MOST + 0.01 for name, layer in found.items())


def test_no_exchange_is_cheaper() -> None:
    """Moving skipped inputs from one layer to another costs more, by the model of losses itself."""
    found, losses = layers(3), {"a": 0.01, "b": 0.001, "c": 0.05}
    uniform = uniform_thresholds(found, 0.5)
    units = {name: losses[name] / layer.energy(uniform[name]) for name, layer in found.items()}

    def cost(thresholds: dict[str, float]) -> float:
        return sum(units[name] * layer.energy(thresholds[name]) for name, layer in found.items())

    best = thresholds_by_loss(found, 0.5, losses)
    assert cost(best) < 0.9 * cost(uniform)
    for one in found:
        for other in found:
            if one != other:
                share = found[one].share(best[one]) - 0.1
                more = found[other].share(best[other]) + 0.1 * found[one].total / found[other].total
                if share > 0 and more < 1:
                    changed = {one: found[one].threshold(share), other: found[other].threshold(more)}
                    assert cost(best | changed) > cost(best)


def test_equal_layers_skip_equal_shares() -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(4))
    found = {"a": seen(x), "b": seen(10 * x)}
    best = thresholds_by_loss(found, 0.4, {"a": 0.02, "b": 0.02})
    assert found["a"].share(best["a"]) == pytest.approx(found["b"].share(best["b"]), abs=0.02)
    assert best["b"] == pytest.approx(10 * best["a"], rel=0.02)


def test_a_layer_of_zeros_keeps_its_values() -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(5))
    found = {"zeros": seen(x.masked_fill(torch.rand(100, 64) < 0.95, 0)), "full": seen(x)}
    best = thresholds_by_loss(found, 0.5, {"zeros": 1e-9, "full": 0.1})
    assert best["zeros"] == 0.0
