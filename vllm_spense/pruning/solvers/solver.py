"""The configured way of pruning one weight: OBS and what follows it, Wanda, or magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from vllm_spense.format import Layout, LinearFormat
from vllm_spense.format.layout import GROUP
from vllm_spense.format.linear import Rounding
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.solvers.obs import (
    Factor,
    SolverError,
    factorize,
    obs_rows,
    prune_magnitude,
    prune_wanda,
)
from vllm_spense.pruning.solvers.refit import refine
from vllm_spense.pruning.solvers.rounding import round_columns, settle_columns
from vllm_spense.pruning.solvers.rows import solve_by_rows, solver_devices
from vllm_spense.pruning.stages import stage
from vllm_spense.pruning.warnings import warn

SETTLING = 3
"""Passes over the columns after rounding; they take up to a tenth off the error of SmolLM2's layers."""
SETTLING_DAMPING = 0.2
"""Part of the Hessian's mean diagonal added for them: with less, codes fit the calibration's text and no
other (docs/experiments.md)."""
REFIT_DAMPING = 1e-4
"""Part of the Hessian's mean diagonal added for the least squares: for inputs that are never seen alone."""


class Solver:
    """Prunes the linears that read one input, by the configured method.

    ``h [K, K]``: Hessian of that input, None when nothing was calibrated. ``name`` stands in messages.
    ``raised_damping``: the damping that the factorisation needed, if it was more than wanted. ``devices``
    share the rows of OBS and what follows it; all that are visible where h is, if not given.
    """

    def __init__(
        self,
        config: PruneConfig,
        h: torch.Tensor | None,
        name: str,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        self.config = config
        self.h = h
        self.name = name
        self.devices = devices
        self.raised_damping: float | None = None
        self._factor: Factor | None = None
        self._order: torch.Tensor | None = None

    def prune(self, weight: torch.Tensor, layout: Layout) -> torch.Tensor:
        """``weight [N, K]`` fp32 with a 2:4 region as in ``layout``; a new tensor where anything changes.

        Raises :class:`~vllm_spense.pruning.solvers.obs.SolverError` for a Hessian that cannot be factored and
        for numbers that leave fp32 on the way.
        """
        pruned = self._prune(weight, layout)
        if not torch.isfinite(pruned).all():
            raise SolverError(f"{self.name}: the pruned weight holds NaN or infinity")
        return pruned

    def round(self, weight: torch.Tensor, linear: LinearFormat) -> tuple[torch.Tensor, list[Rounding]]:
        """A pruned ``weight [N, K]`` as a coarse codec stores it, and that codec's roundings.

        OBS lets the columns to come make up for each one's rounding. Otherwise, and for fine codecs: the
        weight as it is, and none.
        """
        if self.config.method != "obs" or self.h is None:
            return weight, []
        roundings = linear.roundings(weight)
        if not roundings:
            return weight, []
        columns = torch.arange(weight.shape[1], device=weight.device)
        cols = linear.layout.sparse_shape[1] if linear.layout.sparse else len(columns) // GROUP * GROUP
        order = self._column_order(self.h, cols)
        order = columns if order is None else order
        upper = (self._factor or self._factored(self.h[order][:, order])).upper
        numbers = order.tolist()

        def stored(column: int, values: torch.Tensor) -> torch.Tensor:
            for rounding in roundings:
                values = rounding.column(numbers[column], values)
            return values

        kept = torch.ones_like(weight, dtype=torch.bool)
        rows, cols = linear.layout.sparse_shape
        kept[:rows, :cols] = weight[:rows, :cols] != 0
        target, kept = weight[:, order], kept[:, order]
        with stage("round and pack", weight.shape[1]):
            rounded = round_columns(target, kept, upper, stored, self.config.block_size)
            h = self.h[order][:, order]
            h.diagonal().add_(SETTLING_DAMPING * h.diagonal().mean())
            rounded = settle_columns(rounded, target, kept, h, stored, SETTLING, self.config.block_size)
        return rounded[:, order.argsort()], roundings

    def _prune(self, weight: torch.Tensor, layout: Layout) -> torch.Tensor:
        config, h = self.config, self.h
        if not layout.sparse:
            return weight
        if config.method == "magnitude" or h is None:
            return prune_magnitude(weight, layout)
        if config.method == "wanda":
            return prune_wanda(weight, layout, h)
        order = self._column_order(h, layout.sparse_shape[1])
        if order is None:
            return self._solved(weight, layout, h)
        return self._solved(weight[:, order], layout, h[order][:, order])[:, order.argsort()]

    def _solved(self, weight: torch.Tensor, layout: Layout, h: torch.Tensor) -> torch.Tensor:
        """``weight`` pruned by OBS and what follows it; its columns, and ``h``'s, are in the order of OBS."""
        rows, cols = layout.sparse_shape
        factor = self._factored(h)
        shared = [factor.upper, factor.dead]
        if self.config.refit and not bool(factor.dead.all()):  # no input, no error: nothing to answer to
            shared.append(h.clone())
            shared[-1].diagonal().add_(REFIT_DAMPING * h.diagonal().mean())
        result = weight.clone()
        devices = self.devices or solver_devices(weight.device)
        result[:rows] = solve_by_rows(partial(self._solve_rows, cols), weight[:rows], shared, devices)
        return result

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
        with stage("OBS", weight.shape[1]):
            pruned = obs_rows(weight, cols, upper, dead, config.block_size)
        if damped is None:
            return pruned
        target = weight @ damped
        with stage("refit and refine", weight.shape[1]):
            return refine(
                pruned,
                cols,
                damped,
                target,
                upper,
                iterations=config.refit,
                rounds=config.refine,
                seed=config.seed,
            )

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

    def _factored(self, h: torch.Tensor) -> Factor:
        """Factor ``h [K, K]``, whose columns stand in the order of OBS; once for all linears of one input."""
        if self._factor is None:
            wanted = self.config.damping
            with stage("factorise", len(h)):
                self._factor = factorize(h, wanted, name=self.name, strict=self.config.strict)
            if self._factor.escalations:
                self.raised_damping = self._factor.damping
                warn(
                    f"{self.name}: the input Hessian needed damping {self._factor.damping:g} instead of "
                    f"{wanted:g}; more calibration text may prune better"
                )
        return self._factor
