"""Random activation-sparse MLPs for tests of their kernels, and the bound that results are held to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tests.layers import ACCUMULATION, ROUNDING
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.twell import TwellShape, pack

ACTIVATIONS = (Activation("relu"), Activation("fatrelu", 0.01), Activation("relu2"), Activation("drelu"))


@dataclass(frozen=True)
class Mlp:
    """What :func:`vllm_spense.ops.mlp.sparse_mlp.sparse_mlp_definition` takes, before the activation."""

    x: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down_t: torch.Tensor
    up_bias: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.x, self.gate, self.up, self.down_t, self.up_bias, self.bias

    def token(self, index: int) -> Mlp:
        return replace(self, x=self.x[index : index + 1], gate=self.gate[index : index + 1])


def mlp(
    tokens: int,
    features: int,
    neurons: int,
    outputs: int,
    density: float = 0.1,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = False,
    seed: int = 0,
) -> Mlp:
    """``density``: share of gates above zero; the others are below, some at zero and at minus zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    draw = torch.rand(tokens, neurons, generator=generator)
    gate = normal(tokens, neurons).abs() + 0.05
    gate = torch.where(draw < density, gate, -gate)
    gate = torch.where((draw > 0.9) & (draw >= density), torch.where(draw > 0.95, 0.0, -0.0).to(dtype), gate)
    tensors = normal(tokens, features), gate.to(dtype), normal(neurons, features), normal(neurons, outputs)
    return Mlp(*tensors, *((normal(neurons), normal(outputs)) if bias else ()))


def words_of(gate: torch.Tensor, activation: Activation, shape: TwellShape) -> torch.Tensor:
    """The definition's words of what a gate in bf16 lets through."""
    return pack(torch.where(activation.active(gate.float()), gate, 0.0), shape)


def assert_within_rounding(
    y: torch.Tensor,
    given: Mlp,
    activation: Activation,
    *,
    rounding: float | None = None,
    accumulation: float = ACCUMULATION,
) -> None:
    """Every element is the float64 result, but for the order of fp32 sums and one rounding; NaN where it
    is."""
    gate, x, up = given.gate.double(), given.x.double(), given.up.double()
    upper, magnitude = x @ up.T, x.abs() @ up.abs().T
    if given.up_bias is not None:
        upper, magnitude = upper + given.up_bias.double(), magnitude + given.up_bias.double().abs()
    open_ = activation.active(gate)
    value = gate.square() if activation.kind == "relu2" else gate
    through = upper.clamp_min(0) if activation.kind == "drelu" else upper
    hidden = torch.where(open_, value * through, 0.0)
    down = given.down_t.double()
    bias = 0.0 if given.bias is None else given.bias.double()
    expected = hidden @ down + bias
    size = torch.where(open_, value.abs() * magnitude, 0.0) @ down.abs() + abs(bias)
    assert (y.dtype, y.shape) == (given.x.dtype, expected.shape)
    assert torch.equal(y.isnan(), expected.isnan())
    step = ROUNDING[y.dtype] if rounding is None else rounding
    error = (y.double() - expected).abs()
    bound = step * expected.abs() + (1 + step) * accumulation * size + 2.0**-133
    same = expected.isnan() | (y.double() == expected)  # infinity, too
    assert ((error <= bound) | same).all(), f"worst {(error / bound).nan_to_num().max():.2f} bounds"
