"""One budget of skipped inputs for the whole model: who gives most of it.

In a layer the loss of skipping is taken to grow as the sum of squares that is skipped, and how much a unit of
that costs is measured: the layer's loss when it alone skips its share, over the squares skipped there. The
cheapest inputs of all layers are then those below ``sqrt(rate · squares / loss)`` of their own layer, for one
``rate`` that meets the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from vllm_spense.sparsify.magnitudes import Magnitudes

MOST = 0.99
"""Of a layer's inputs that may be skipped: the measurement at one share says nothing of the last ones."""


def uniform_thresholds(magnitudes: Mapping[str, Magnitudes], sparsity: float) -> dict[str, float]:
    """The same share of each layer's inputs."""
    return {name: seen.threshold(sparsity) for name, seen in magnitudes.items()}


def thresholds_by_loss(
    magnitudes: Mapping[str, Magnitudes], sparsity: float, losses: Mapping[str, float]
) -> dict[str, float]:
    """Thresholds that skip ``sparsity`` of all inputs.

    ``losses``: by layer, what it costs if it alone skips ``sparsity`` of its inputs (nats, in any case above
    zero). A layer whose inputs are zero anyway keeps a threshold of 0.
    """
    uniform = uniform_thresholds(magnitudes, sparsity)
    units = {}
    for name, seen in magnitudes.items():
        squares = seen.energy(uniform[name])
        units[name] = math.sqrt(squares / losses[name]) if squares else 0.0
    most = {name: seen.threshold(MOST) for name, seen in magnitudes.items()}
    total = sum(seen.total for seen in magnitudes.values())

    def at(rate: float) -> dict[str, float]:
        return {name: min(math.sqrt(rate) * unit, most[name]) for name, unit in units.items()}

    def skipped(thresholds: Mapping[str, float]) -> float:
        return sum(seen.share(thresholds[name]) * seen.total for name, seen in magnitudes.items()) / total

    low, high = 0.0, 1.0
    while skipped(at(high)) < sparsity and high < 1e30:
        high *= 4
    for _ in range(60):
        rate = (low + high) / 2
        low, high = (low, rate) if skipped(at(rate)) >= sparsity else (rate, high)
    return at(high)
