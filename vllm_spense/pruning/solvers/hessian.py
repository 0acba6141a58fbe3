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
        """Add the inputs ``x [..., K]`` of the tokens of one sample."""
        flat = x.reshape(-1, x.shape[-1])
        halves = flat.is_cuda and flat.dtype.itemsize == 2  # exact products, summed in fp32 by tensor cores
        flat = flat if halves else flat.float()
        for i in range(0, flat.shape[1], _BLOCK):  # the blocks below the diagonal are mirrored later
            left, right, block = flat[:, i : i + _BLOCK].t(), flat[:, i:], self._sum[i : i + _BLOCK, i:]
            if halves:
                block += torch.mm(left, right, out_dtype=torch.float32)
            else:
                block.addmm_(left, right)
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

    whole = output_energy(weight, h)
    return output_energy(change, h) / whole if whole > 0 else 0.0


def output_energy(weight: torch.Tensor, h: torch.Tensor | None) -> float:
    """tr(W H Wᵀ); H = I when there are no statistics."""
    return float(((weight if h is None else weight @ h) * weight).sum(dtype=torch.float64))


def squares(x: torch.Tensor) -> torch.Tensor:
    """Sums of squares [K] over the tokens of ``x [..., K]``, in fp32."""
    return x.reshape(-1, x.shape[-1]).float().square().sum(0)
