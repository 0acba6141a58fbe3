"""How many intermediate indices stay dense in each layer, under one budget for the whole model.

An index costs loss when it becomes 2:4 (:mod:`.pilot`, :mod:`.sensitivity`) and costs bytes, or time, when it
stays dense. The budget is what the same dense ratio in every layer would cost; it buys the most expensive
losses first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch

from vllm_spense.devices import H200
from vllm_spense.format.layout import META_GROUP
from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.models.parts import MlpShape
from vllm_spense.ops.kernel_config import candidates, estimate
from vllm_spense.ops.spec import LinearSpec
from vllm_spense.pruning.choice.selection import dense_count
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.warnings import warn

Budget = Literal["bytes", "time"]
DECODE_TOKENS = 32
"""Tokens of the decode step whose predicted time on an H200 a budget of time counts."""


@lru_cache
def price(shape: MlpShape, dense: int, budget: Budget) -> float:
    """Of an MLP with ``dense`` dense indices: bytes of its FP8 weights, or predicted seconds of its two
    kernels in a decode step on an H200."""
    rows, cols = shape.layouts(dense)
    specs = [LinearSpec.of([rows] * shape.inner, UNIFORM_FP8), LinearSpec.of([cols], UNIFORM_FP8)]
    if budget == "bytes":
        return float(sum(spec.weight_bytes for spec in specs))
    return sum(_seconds(spec) for spec in specs)


def _seconds(spec: LinearSpec) -> float:
    configs = candidates(spec, DECODE_TOKENS, H200.capability, cutlass=False)
    return min(estimate(spec, DECODE_TOKENS, config, H200.processors) for config in configs)


def legal_counts(intermediate: int, alignment: int) -> list[int]:
    """Sizes that D may have, from the smallest to the whole of the ``intermediate`` indices."""
    counts = [*range(0, intermediate, alignment), intermediate]
    return [count for count in counts if (intermediate - count) % META_GROUP == 0]


def dense_counts(
    costs: Sequence[torch.Tensor], shapes: Sequence[MlpShape | None], config: PruneConfig
) -> list[int]:
    """Size of D in each layer as ``config`` says, from the costs [I] of its indices; 0 where no MLP is."""
    known = [shape for shape in shapes if shape is not None]
    if config.allocation == "uniform":
        found = [dense_count(s.intermediate, config.dense_ratio, config.alignment) for s in known]
    else:
        priced = [cost for cost, shape in zip(costs, shapes, strict=True) if shape is not None]
        found = allocate(priced, known, config.dense_ratio, config.alignment, config.allocation)
        if config.dense_ratio < 1 and found == [shape.intermediate for shape in known]:
            warn(
                f"a budget of {config.allocation} keeps every MLP dense: at these layer sizes no 2:4 region "
                "is predicted to save any; --allocation bytes prunes"
            )
    counts = iter(found)
    return [0 if shape is None else next(counts) for shape in shapes]


def allocate(
    costs: Sequence[torch.Tensor],
    shapes: Sequence[MlpShape],
    dense_ratio: float,
    alignment: int,
    budget: Budget = "bytes",
) -> list[int]:
    """Dense indices per layer that avoid most of ``costs [I]`` for the price of one dense ratio everywhere.

    Every count is one that :func:`~.selection.dense_count` could give. A layer's indices are bought in
    the order of their costs, in blocks of ``alignment``.
    """
    offers = [_Offers(cost, shape, alignment, budget) for cost, shape in zip(costs, shapes, strict=True)]
    money = sum(
        price(shape, dense_count(shape.intermediate, dense_ratio, alignment), budget) for shape in shapes
    )
    low, high = 0.0, sum(o.gain(-1) for o in offers) / money or 1.0  # whatever the unit of the costs is
    while sum(o.price(o.best(high)) for o in offers) > money:
        low, high = high, high * 4
    for _ in range(60):  # the exchange rate of loss for money at which the budget is just kept
        rate = (low + high) / 2
        within = sum(o.price(o.best(rate)) for o in offers) <= money
        low, high = (low, rate) if within else (rate, high)
    chosen = [o.best(high) for o in offers]
    money -= sum(o.price(c) for o, c in zip(offers, chosen, strict=True))
    while True:  # what is left over buys single blocks
        next_up = [
            (o.gain(c + 1) - o.gain(c), i)
            for i, (o, c) in enumerate(zip(offers, chosen, strict=True))
            if c + 1 < len(o.counts) and o.price(c + 1) - o.price(c) <= money * (1 + 1e-9)
        ]
        if not next_up:
            return [o.counts[c] for o, c in zip(offers, chosen, strict=True)]
        i = max(next_up)[1]
        money -= offers[i].price(chosen[i] + 1) - offers[i].price(chosen[i])
        chosen[i] += 1


class _Offers:
    """The dense counts that one layer may have, what each avoids and what it costs."""

    def __init__(self, cost: torch.Tensor, shape: MlpShape, alignment: int, budget: Budget) -> None:
        self.counts = legal_counts(shape.intermediate, alignment)
        avoided = torch.cat([torch.zeros(1), cost.double().cpu().sort(descending=True).values.cumsum(0)])
        self._gains = avoided[self.counts].tolist()
        self._prices = [price(shape, count, budget) for count in self.counts]

    def gain(self, choice: int) -> float:
        return self._gains[choice]

    def price(self, choice: int) -> float:
        return self._prices[choice]

    def best(self, rate: float) -> int:
        """The choice with the most gain left after paying; of equals the cheapest."""
        values = [g - rate * p for g, p in zip(self._gains, self._prices, strict=True)]
        return values.index(max(values))
