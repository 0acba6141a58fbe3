"""``spense::sparse_mlp``: up and down of a gated MLP for the neurons alone that a token's gate lets through.

``y = down(act(gate x) · up x)`` (arXiv 2603.23198, section 3). The gate's product comes from a linear layer
of any codec; this operator is given its output, skips what it closes, and reads ``up [I, K]`` and
``down_t [I, N]`` (down transposed) by the row: a neuron is one contiguous row of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.library import custom_op

from vllm_spense.ops.backend import Legal, Tensors
from vllm_spense.ops.mlp.activation import Activation


@dataclass(frozen=True)
class SparseMlpSpec:
    """An MLP as it lies on one rank: ``in_features`` K, ``neurons`` I, ``out_features`` N; ``dtype`` of its
    weights and activations.

    ``density``: share of neurons that a token's gate lets through, as it was measured, None where it was not;
    it bears on how back ends compute, not on what. Raises ``ValueError`` where that is no share.
    """

    in_features: int
    neurons: int
    out_features: int
    activation: Activation
    dtype: torch.dtype = torch.bfloat16
    density: float | None = None

    def __post_init__(self) -> None:
        if self.density is not None and not 0 <= self.density <= 1:
            raise ValueError(f"density {self.density!r} must be a share from 0 to 1")


class SparseMlpBackend(Legal[SparseMlpSpec], Protocol):
    """One way to run what follows the gate; stateless."""

    def prepare(self, spec: SparseMlpSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """From ``up [I, K]`` and ``down [N, I]`` (with ``up_bias [I]`` and ``bias [N]`` where there are) to
        run-time tensors, whose shapes depend on the spec alone. Takes ownership."""

    def apply(
        self, spec: SparseMlpSpec, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        """``x [M, K]`` and the gate's output ``[M, I]`` to ``y [M, N]`` in x's dtype."""


def sparse_mlp_definition(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    up_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """``y [M, N]`` in plain torch, sums in fp32, rounded once to x's dtype.

    ``x [M, K]``, ``gate [M, I]`` before the activation, ``up [I, K]``, ``down_t [I, N]``, biases ``[I]`` and
    ``[N]``.
    """
    upper = x.float() @ up.float().t()
    if up_bias is not None:
        upper = upper + up_bias.float()
    y = activation.hidden(gate, upper) @ down_t.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


@custom_op("spense::sparse_mlp", mutates_args=(), device_types=("cpu", "cuda"))
def sparse_mlp(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    up_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    threshold: float,
) -> torch.Tensor:
    """:func:`sparse_mlp_definition`, opaque to compilers: what every kernel is tested against."""
    return sparse_mlp_definition(x, gate, up, down_t, up_bias, bias, Activation(activation, threshold))


def empty_output(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down_t: torch.Tensor, *_: Any
) -> torch.Tensor:
    """``y [M, N]``, not filled: the fake of every operator that computes such an MLP."""
    return x.new_empty((x.shape[0], down_t.shape[1]))


sparse_mlp.register_fake(empty_output)


def transposed(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """What back ends that read by the row prepare: up, and down as ``down_t [I, N]``, contiguous."""
    kept = {name: tensor for name, tensor in tensors.items() if name != "down"}
    return kept | {"up": tensors["up"].contiguous(), "down_t": tensors["down"].t().contiguous()}


class SparseMlpReference:
    """The definition: computes every neuron. Runs anywhere."""

    name = "reference"

    def why_not(self, spec: SparseMlpSpec, device: torch.device) -> str | None:
        return None

    def prepare(self, spec: SparseMlpSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return transposed(tensors)

    def apply(
        self, spec: SparseMlpSpec, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        act = spec.activation
        biases = tensors.get("up_bias"), tensors.get("bias")
        return sparse_mlp(x, gate, tensors["up"], tensors["down_t"], *biases, act.kind, act.threshold)
