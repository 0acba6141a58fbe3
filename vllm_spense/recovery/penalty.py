"""The L1 penalty that makes a ReLU-gated model sparse (arXiv 2603.23198, section 4)."""

from __future__ import annotations

import torch


class L1Penalty:
    """Collects the hidden values of a forward pass; hand :meth:`see` to
    :func:`~vllm_spense.evaluation.hidden.hidden_values`.

    As the paper's own code has it: the absolute values are summed over the neurons, and averaged over tokens
    and layers.
    """

    def __init__(self) -> None:
        self._layers: list[torch.Tensor] = []

    def see(self, name: str, hidden: torch.Tensor) -> None:
        """``hidden [..., neurons]`` of one MLP."""
        self._layers.append(hidden.abs().sum(-1, dtype=torch.float32).mean())

    def take(self) -> torch.Tensor:
        """The penalty of all that was seen since the last call, a scalar in fp32 with its graph."""
        mean = torch.stack(self._layers).mean()
        self._layers.clear()
        return mean
