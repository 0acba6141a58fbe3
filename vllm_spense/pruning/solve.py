"""From a weight and the statistics of its inputs to a weight that obeys its layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from vllm_spense.format import Layout
from vllm_spense.format.layout import GROUP
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.hessian import output_energy
from vllm_spense.pruning.refit import refine
from vllm_spense.pruning.rounding import round_and_refit
from vllm_spense.pruning.rows import solve_by_rows, solver_devices
from vllm_spense.pruning.solvers import (
    Factor,
    SolverError,
    factorize,
    obs_rows,
    prune_magnitude,
    prune_wanda,
)
from vllm_spense.pruning.trust import warn

REFIT_DAMPING = 1e-4
"""Part of the Hessian's mean diagonal added for the least squares: for inputs that are never seen alone."""


class Solver:
    """Prunes the linears that read one input, by the configured method.

    ``h [K, K]``: Hessian of that input, None when nothing was calibrated; ``halves``: the same of the
    samples to fit and of the held-out ones, to search the damping. ``cross [K, K]``: where outputs of other
    inputs x* are to be reproduced, 2 E[x* xᵀ]. ``name`` stands in messages. ``raised_damping``: the damping
    that the factorisation needed, if it was more than wanted. ``devices`` share the rows of OBS and what
    follows it; all that are visible where h is, if not given.
    """

    def __init__(
        self,
        config: PruneConfig,
        h: torch.Tensor | None,
        name: str,
        devices: Sequence[torch.device] | None = None,
        *,
        halves: tuple[torch.Tensor, torch.Tensor] | None = None,
        cross: torch.Tensor | None = None,
    ) -> None:
        self.config = config
        self.h = h
        self.name = name
        self.devices = devices
        self.halves = halves
        self.cross = cross
        self.raised_damping: float | None = None
        self._factor: Factor | None = None
        self._order: torch.Tensor | None = None

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
        weight = self._retargeted(weight, h)
        order = self._column_order(h, layout.sparse_shape[1])
        if order is None:
            return self._solved(weight, layout, h)
        return self._solved(weight[:, order], layout, h[order][:, order])[:, order.argsort()]

    def _solved(self, weight: torch.Tensor, layout: Layout, h: torch.Tensor) -> torch.Tensor:
        """By OBS and what follows it; ``weight`` and ``h`` have their columns in the order of OBS."""
        config = self.config
        rows, cols = layout.sparse_shape
        factor = self._factored(h, weight[:rows], cols)
        shared = [factor.upper, factor.dead]
        refits = config.refit and not bool(factor.dead.all())  # no input, no error: nothing to answer to
        if refits:
            shared.append(h.clone())
            shared[-1].diagonal().add_(REFIT_DAMPING * h.diagonal().mean())
        result = weight.clone()
        result[:rows] = self._on_devices(partial(self._solve_rows, cols), weight[:rows], shared)
        if refits and config.rounding_refit and rows < len(weight):  # no OBS there, but rounding errors
            result[rows:] = self._on_devices(self._round_rows, weight[rows:], shared[2:])
        return result

    def _on_devices(
        self, solve: Callable[..., torch.Tensor], weight: torch.Tensor, shared: list[torch.Tensor]
    ) -> torch.Tensor:
        return solve_by_rows(solve, weight, shared, self.devices or solver_devices(weight.device))

    def _solve_rows(
        self,
        cols: int,
        weight: torch.Tensor,
        upper: torch.Tensor,
        dead: torch.Tensor,
        damped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``weight [rows, K]`` with ``cols`` columns 2:4; refined if there is a ``damped`` Hessian."""
        config = self.config
        pruned = obs_rows(weight, cols, upper, dead, config.block_size)
        if damped is None:
            return pruned
        target = weight @ damped
        pruned = refine(
            pruned,
            cols,
            damped,
            target,
            upper,
            iterations=config.refit,
            rounds=config.refine,
            seed=config.seed,
        )
        return round_and_refit(pruned, cols, damped, target) if config.rounding_refit else pruned

    def _round_rows(self, weight: torch.Tensor, damped: torch.Tensor) -> torch.Tensor:
        """``weight [rows, K]``, all dense, on its FP8 grid."""
        return round_and_refit(weight, 0, damped, weight @ damped)

    def _retargeted(self, weight: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """The weight whose outputs come closest to those of ``weight`` for the inputs x* of ``cross``."""
        if self.cross is None:
            return weight
        upper = factorize(h, self.config.damping, name=self.name).upper
        missing = weight @ (self.cross - h)
        return weight + missing @ upper.t() @ upper

    def _column_order(self, h: torch.Tensor, cols: int) -> torch.Tensor | None:
        """Order [K] in which OBS visits the columns: groups of four stay, dense columns stay at the end.

        None where that is the order in which they stand.
        """
        if self._order is None and self.config.order == "energy":
            columns = torch.arange(len(h), device=h.device)
            groups = columns[:cols].view(-1, GROUP)
            ranked = h.diagonal()[groups].sum(1).argsort(descending=True, stable=True)
            self._order = torch.cat([groups[ranked].flatten(), columns[cols:]])
        return self._order

    def _factored(self, h: torch.Tensor, weight: torch.Tensor, cols: int) -> Factor:
        """Of ``h``, whose columns stand in the order of OBS like those of ``weight [rows, K]``."""
        if self._factor is None:
            wanted = self._best_damping(weight, cols)
            self._factor = factorize(h, wanted, name=self.name, strict=self.config.strict)
            if self._factor.escalations:
                self.raised_damping = self._factor.damping
                warn(
                    f"{self.name}: the input Hessian needed damping {self._factor.damping:g} instead of "
                    f"{wanted:g}; more calibration text may prune better"
                )
        return self._factor

    def _best_damping(self, weight: torch.Tensor, cols: int) -> float:
        """Of the configured one, a tenth and ten times it, what leaves the least loss on held-out samples."""
        config = self.config
        if self.halves is None:
            return config.damping
        order = self._order
        fit, held_out = (h if order is None else h[order][:, order] for h in self.halves)
        losses = {}
        for damping in (config.damping, config.damping / 10, min(1.0, config.damping * 10)):
            factor = factorize(fit, damping, name=self.name)
            change = obs_rows(weight, cols, factor.upper, factor.dead, config.block_size) - weight
            losses[damping] = output_energy(change, held_out)
        return min(losses, key=losses.__getitem__)
