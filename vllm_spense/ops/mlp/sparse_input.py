"""``spense::sparse_input_linear``: a linear layer that skips the inputs that are zero, or nearly so.

For fc2 behind ReLU or squared ReLU (OPT, Nemotron), whose input is mostly zeros, and for down behind any
activation where small inputs may be dropped (TEAL, arXiv 2408.14690, here with a threshold per layer). The
weight is held transposed, so that an input is one contiguous row of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.library import custom_op

from vllm_spense.ops.backend import Legal, Tensors


@dataclass(frozen=True)
class SparseInputSpec:
    """A layer as it lies on one rank: ``in_features`` K, ``out_features`` N, ``dtype`` of weight and input.

    Inputs with ``|x| <= threshold`` are taken as zero; at 0 nothing is lost. ``density``: share of the
    others, as in ``SparseMlpSpec``. Raises ``ValueError`` for thresholds that are negative or not finite, and
    a density that is no share.
    """

    in_features: int
    out_features: int
    threshold: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    density: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold) or self.threshold < 0:
            raise ValueError(f"threshold {self.threshold!r} must be a number from 0 on")
        if self.density is not None and not 0 <= self.density <= 1:
            raise ValueError(f"density {self.density!r} must be a share from 0 to 1")


class SparseInputBackend(Legal[SparseInputSpec], Protocol):
    """One way to run such a layer; stateless."""

    def prepare(self, spec: SparseInputSpec, weight: torch.Tensor) -> Tensors:
        """From ``weight [N, K]`` to run-time tensors, whose shapes depend on the spec alone. Takes ownership.
        ``weight_packed`` is among them: vLLM's LoRA code looks for it."""

    def apply(
        self,
        spec: SparseInputSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """``x [M, K]`` to ``y [M, N]`` in x's dtype."""


def sparse_input_definition(
    x: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """``y [M, N]`` in plain torch, sums in fp32; ``x [M, K]``, ``weight_t [K, N]``, ``bias [N]``.

    NaN is no small input: it is seen in the result.
    """
    kept = torch.where(x.float().abs() <= threshold, 0.0, x.float())
    y = kept @ weight_t.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


@custom_op("spense::sparse_input_linear", mutates_args=(), device_types=("cpu", "cuda"))
def sparse_input_linear(
    x: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """:func:`sparse_input_definition`, opaque to compilers."""
    return sparse_input_definition(x, weight_t, bias, threshold)


def empty_output(x: torch.Tensor, weight_t: torch.Tensor, *_: Any) -> torch.Tensor:
    """``y [M, N]``, not filled: the fake of every operator that computes such a layer."""
    return x.new_empty((x.shape[0], weight_t.shape[1]))


sparse_input_linear.register_fake(empty_output)


class SparseInputReference:
    """The definition: multiplies every input. Runs anywhere."""

    name = "reference"

    def why_not(self, spec: SparseInputSpec, device: torch.device) -> str | None:
        return None

    def prepare(self, spec: SparseInputSpec, weight: torch.Tensor) -> Tensors:
        return {"weight_packed": weight.t().contiguous()}

    def apply(
        self,
        spec: SparseInputSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return sparse_input_linear(x, tensors["weight_packed"], bias, spec.threshold)
