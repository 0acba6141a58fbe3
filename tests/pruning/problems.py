"""Small problems for solvers: inputs of unequal sizes, their Hessian, a weight, its loss in fp64."""

from __future__ import annotations

from typing import Any

import torch

from vllm_spense.format import Layout
from vllm_spense.pruning import PruneConfig
from vllm_spense.pruning.solvers.hessian import Hessian

LAYOUTS = [Layout("output", 12, 48, 8), Layout("input", 12, 48, 24), Layout("input", 12, 48, 48)]


def inputs(features: int, samples: int = 16, tokens: int = 30, seed: int = 0) -> list[torch.Tensor]:
    """Samples [tokens, features] that share a few directions, of sizes from 0.1 to 10 in no order."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, features, generator=generator)
    sizes = torch.logspace(-1, 1, features)[torch.randperm(features, generator=generator)]
    return [
        (
            torch.randn(tokens, 4, generator=generator) @ mix
            + torch.randn(tokens, features, generator=generator)
        )
        * sizes
        for _ in range(samples)
    ]


def hessian(samples: list[torch.Tensor]) -> Hessian:
    h = Hessian(samples[0].shape[1])
    for x in samples:
        h.add(x)
    return h


def random_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(100 + seed))


def loss(weight: torch.Tensor, original: torch.Tensor, h: torch.Tensor) -> float:
    """Squared output error in fp64."""
    change = (weight - original).double()
    return float(((change @ h.double()) * change).sum())


def options(**changes: Any) -> PruneConfig:
    return PruneConfig(**({"calibration": "x"} | changes))


def is_24(region: torch.Tensor) -> bool:
    return bool(((region.reshape(region.shape[0], -1, 4) != 0).sum(-1) <= 2).all())
