"""Activations that leave most of an MLP's intermediate values at zero, by the names that configs have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

KINDS = ("relu", "fatrelu", "relu2", "drelu")
"""ReLU; FATReLU, ``z`` where ``z > threshold`` (ProSparse, arXiv 2402.13516); squared ReLU (Primer,
arXiv 2109.08668); dReLU, ReLU on both branches (TurboSparse, arXiv 2406.05955)."""


@dataclass(frozen=True)
class Activation:
    """One of :data:`KINDS`; ``threshold`` is FATReLU's, and zero for the others.

    Raises ``ValueError`` for another kind and for thresholds that are negative or not finite.
    """

    kind: str
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown activation {self.kind!r} (known: {', '.join(KINDS)})")
        if not math.isfinite(self.threshold) or self.threshold < 0:
            raise ValueError(f"threshold {self.threshold!r} must be a number from 0 on")
        if self.threshold and self.kind != "fatrelu":
            raise ValueError(f"{self.kind} has no threshold, and {self.threshold!r} is given")

    def active(self, gate: torch.Tensor) -> torch.Tensor:
        """Where the gate ``[..., I]`` lets something through; NaN does, so that it is seen in the result."""
        return ~(gate <= self.threshold)

    def of_gate(self, gate: torch.Tensor) -> torch.Tensor:
        """``act(gate)`` in fp32, of the same shape."""
        wide = gate.float()
        passed = torch.where(self.active(wide), wide, 0.0)
        return passed.square() if self.kind == "relu2" else passed

    def hidden(self, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        """``act(gate) · up`` in fp32: the input of down; ``up`` None: an MLP without a second branch.

        What the gate closes is zero, whatever ``up`` is there: kernels never compute it.
        """
        opened = self.of_gate(gate)
        if up is None:
            return opened
        wide = up.float()
        wide = wide.clamp_min(0) if self.kind == "drelu" else wide
        return torch.where(self.active(gate.float()), opened * wide, 0.0)
