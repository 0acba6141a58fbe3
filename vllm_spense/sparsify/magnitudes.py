"""How large the inputs of each layer are, counted exactly: every value that bf16 has is a bin of its own."""

from __future__ import annotations

import torch

BINS = 0x7F80
"""Bit patterns of bf16's finite values from 0 on, which ascend as the values do."""


class Magnitudes:
    """A histogram of ``|x|`` rounded to bf16, as far as it was seen."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def see(self, x: torch.Tensor) -> None:
        """Count all values of ``x``; raises ``ValueError`` for NaN and infinity."""
        bits = x.detach().to(torch.bfloat16).abs().view(torch.int16).flatten().cpu()
        if bits.numel() and int(bits.max()) >= BINS:
            raise ValueError("NaN or infinity among the activations")
        self.counts += torch.bincount(bits, minlength=BINS)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def threshold(self, share: float) -> float:
        """The smallest value such that at least ``share`` of those seen are not above it."""
        reached = self.counts.cumsum(0) >= share * self.total
        return float(values()[int(reached.nonzero()[0])])

    def share(self, threshold: float) -> float:
        """Of the values seen, those that are not above ``threshold``."""
        return int(self.counts[values() <= threshold].sum()) / self.total

    def energy(self, threshold: float) -> float:
        """Sum of squares of the values that are not above ``threshold``."""
        squares = self.counts.double() * values().double().square()
        return float(squares[values() <= threshold].sum())


def values() -> torch.Tensor:
    """The value of each bin, fp32."""
    return torch.arange(BINS, dtype=torch.int16).view(torch.bfloat16).float()
