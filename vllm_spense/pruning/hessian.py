"""Second moments of a linear layer's input."""

from __future__ import annotations

import torch

from vllm_spense.format import CheckpointError

_BLOCK = 512


class Hessian:
    """Running ``H = 2/T Σ x xᵀ`` [K, K] in fp32 over T input tokens.

    It is the Hessian of the layer's mean squared output error (SparseGPT, arXiv 2301.00774, section
    3); the division by T keeps its scale apart from the number of samples.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(features, features, device=device)
        self._tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add the inputs ``x [..., K]`` of some tokens."""
        flat = x.reshape(-1, x.shape[-1]).float()
        for i in range(0, flat.shape[1], _BLOCK):  # the blocks below the diagonal are mirrored later
            self._sum[i : i + _BLOCK, i:].addmm_(flat[:, i : i + _BLOCK].t(), flat[:, i:])
        self._tokens += flat.shape[0]

    def matrix(self, module: str) -> torch.Tensor:
        """H [K, K]; :class:`CheckpointError` names ``module`` if its inputs held NaN or infinity."""
        if not torch.isfinite(self._sum).all():
            raise CheckpointError(
                "the calibration inputs of this layer hold NaN or infinity",
                module=module,
                fix="check the source model's weights; fp16 models can overflow",
            )
        upper = self._sum.triu()
        return (upper + upper.triu(1).t()) * (2.0 / max(self._tokens, 1))


def output_error(change: torch.Tensor, weight: torch.Tensor, h: torch.Tensor | None) -> float:
    """Relative squared output error tr(Δ H Δᵀ) / tr(W H Wᵀ); H = I when there are no statistics."""

    def energy(w: torch.Tensor) -> float:
        return float(((w if h is None else w @ h) * w).sum(dtype=torch.float64))

    whole = energy(weight)
    return energy(change) / whole if whole > 0 else 0.0
