"""From a weight and the statistics of its inputs to a weight that obeys its layout."""

from __future__ import annotations

import warnings

import torch

from vllm_spense.format import Layout
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.refit import refine
from vllm_spense.pruning.solvers import (
    Factor,
    SolverError,
    factorize,
    prune_magnitude,
    prune_obs,
    prune_wanda,
)

REFIT_DAMPING = 1e-4
"""Part of the Hessian's mean diagonal added for the least squares: for inputs that are never seen alone."""


class Solver:
    """Prunes the linears that read one input, by the configured method.

    ``h [K, K]``: Hessian of that input, None when nothing was calibrated. ``name`` stands in messages.
    ``raised_damping``: the damping that the factorisation needed, if it was more than configured.
    """

    def __init__(self, config: PruneConfig, h: torch.Tensor | None, name: str) -> None:
        self.config = config
        self.h = h
        self.name = name
        self.raised_damping: float | None = None
        self._factor: Factor | None = None

    def prune(self, weight: torch.Tensor, layout: Layout) -> torch.Tensor:
        """``weight [N, K]`` fp32 with a 2:4 region as in ``layout``; a new tensor where anything changes.

        Raises :class:`~vllm_spense.pruning.solvers.SolverError` for a Hessian that cannot be factored and
        for numbers that leave fp32 on the way.
        """
        pruned = self._prune(weight, layout)
        if not torch.isfinite(pruned).all():
            raise SolverError(f"{self.name}: the pruned weight holds NaN or infinity")
        return pruned

    def _prune(self, weight: torch.Tensor, layout: Layout) -> torch.Tensor:
        config, h = self.config, self.h
        if not layout.sparse:
            return weight
        if config.method == "magnitude" or h is None:
            return prune_magnitude(weight, layout)
        if config.method == "wanda":
            return prune_wanda(weight, layout, h)
        factor = self._factored(h)
        pruned = prune_obs(weight, layout, factor, config.block_size)
        if not config.refit or bool(factor.dead.all()):  # no input, no error: nothing to answer to
            return pruned
        return self._refined(weight, pruned, layout, h, factor)

    def _refined(
        self, weight: torch.Tensor, pruned: torch.Tensor, layout: Layout, h: torch.Tensor, factor: Factor
    ) -> torch.Tensor:
        rows, cols = layout.sparse_shape
        damped = h.clone()
        damped.diagonal().add_(REFIT_DAMPING * h.diagonal().mean())
        pruned[:rows] = refine(
            pruned[:rows],
            cols,
            damped,
            weight[:rows] @ damped,
            factor.upper,
            iterations=self.config.refit,
            rounds=self.config.refine,
            seed=self.config.seed,
        )
        return pruned

    def _factored(self, h: torch.Tensor) -> Factor:
        if self._factor is None:
            wanted = self.config.damping
            self._factor = factorize(h, wanted, name=self.name, strict=self.config.strict)
            if self._factor.escalations:
                self.raised_damping = self._factor.damping
                warnings.warn(
                    f"{self.name}: the input Hessian needed damping {self._factor.damping:g} instead of "
                    f"{wanted:g}; more calibration text may prune better",
                    stacklevel=2,
                )
        return self._factor
