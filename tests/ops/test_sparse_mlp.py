"""The definitions of the activation-sparse operators, against torch's own MLPs and loops over neurons."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from vllm_spense.ops.mlp.activation import KINDS, Activation
from vllm_spense.ops.mlp.select import (
    SPARSE_INPUT,
    SPARSE_MLP,
    select_sparse_input,
    select_sparse_mlp,
)
from vllm_spense.ops.mlp.sparse_input import SparseInputReference, SparseInputSpec, sparse_input_linear
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpReference, SparseMlpSpec, sparse_mlp

CPU = torch.device("cpu")
ACTIVATIONS = [Activation(kind, 0.3 if kind == "fatrelu" else 0.0) for kind in KINDS]


def torch_mlp(x, gate, up, down, up_bias, bias, activation: Activation) -> torch.Tensor:
    """What models spell out, in fp64."""
    x, gate, up, down = (t.double() for t in (x, gate, up, down))
    upper = F.linear(x, up, None if up_bias is None else up_bias.double())
    act = {
        "relu": F.relu,
        "fatrelu": lambda z: F.threshold(z, activation.threshold, 0.0),
        "relu2": lambda z: F.relu(z).square(),
        "drelu": F.relu,
    }[activation.kind]
    if activation.kind == "drelu":
        upper = F.relu(upper)
    return F.linear(act(gate) * upper, down, None if bias is None else bias.double())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
def test_it_is_the_mlp_of_models(activation: Activation, tokens: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, gate, up, down = normal(tokens, 7), normal(tokens, 33), normal(33, 7), normal(11, 33)
    up_bias, out_bias = (normal(33), normal(11)) if bias else (None, None)
    spec = SparseMlpSpec(7, 33, 11, activation, torch.float32)
    given = {"up": up, "down": down} | ({"up_bias": up_bias, "bias": out_bias} if bias else {})
    backend = SparseMlpReference()
    y = backend.apply(spec, backend.prepare(spec, given), x, gate)
    assert y.shape == (tokens, 11)
    assert y.dtype == torch.float32
    expected = torch_mlp(x, gate, up, down, up_bias, out_bias, activation)
    torch.testing.assert_close(y, expected.float())


def test_kinds_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(4, 7, generator=generator), torch.randn(4, 33, generator=generator)
    up, down_t = torch.randn(33, 7, generator=generator), torch.randn(33, 11, generator=generator)
    found = [sparse_mlp(x, gate, up, down_t, None, None, a.kind, a.threshold) for a in ACTIVATIONS]
    for one in range(len(found)):
        assert all(not torch.allclose(found[one], other) for other in found[:one])


def test_closed_neurons_are_not_touched() -> None:
    """A kernel never reads their weights, so what stands there must not matter."""
    up, down_t = torch.randn(3, 4), torch.randn(3, 2)
    gate = torch.tensor([[1.0, -1.0, 0.0]])
    up[1:] = torch.inf
    y = sparse_mlp(torch.randn(1, 4), gate, up, down_t, None, None, "relu", 0.0)
    assert y.isfinite().all()


def test_a_gate_of_nan_is_seen() -> None:
    gate = torch.tensor([[torch.nan, -1.0], [1.0, -1.0]])
    y = sparse_mlp(torch.ones(2, 3), gate, torch.ones(2, 3), torch.ones(2, 2), None, None, "relu", 0.0)
    assert y[0].isnan().all()
    assert y[1].tolist() == [3, 3]


def test_the_threshold_is_open_above() -> None:
    gate = torch.tensor([[0.5, 0.51]])
    assert Activation("fatrelu", 0.5).active(gate).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("kind", "threshold", "message"),
    [
        ("silu", 0.0, "unknown activation 'silu'"),
        ("fatrelu", -0.1, "must be a number from 0 on"),
        ("fatrelu", math.nan, "must be a number from 0 on"),
        ("fatrelu", math.inf, "must be a number from 0 on"),
        ("relu", 0.1, "relu has no threshold"),
    ],
)
def test_activations_that_there_are_not(kind: str, threshold: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Activation(kind, threshold)
    with pytest.raises(ValueError, match=message):
        sparse_mlp(
            torch.ones(1, 2),
            torch.ones(1, 3),
            torch.ones(3, 2),
            torch.ones(3, 2),
            None,
            None,
            kind,
            threshold,
        )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_small_inputs_are_taken_as_zero(threshold: float, bias: bool) -> None:
    x, weight, added = torch.randn(5, 9), torch.randn(4, 9), torch.randn(4) if bias else None
    spec, backend = SparseInputSpec(9, 4, threshold, torch.float32), SparseInputReference()
    y = backend.apply(spec, backend.prepare(spec, weight), x, added)
    expected = torch.zeros(5, 4) if added is None else added.expand(5, 4).clone()
    for token in range(5):
        for column in range(9):
            if abs(float(x[token, column])) > threshold:
                expected[token] += x[token, column] * weight[:, column]
    torch.testing.assert_close(y, expected)
    assert torch.allclose(y, F.linear(x, weight, added)) == (threshold == 0)


def test_an_input_of_nan_is_seen() -> None:
    y = sparse_input_linear(torch.tensor([[torch.nan, 0.1]]), torch.ones(2, 2), None, 0.5)
    assert y.isnan().all()


@pytest.mark.parametrize("threshold", [-1.0, math.nan, math.inf])
def test_thresholds_that_there_are_not(threshold: float) -> None:
    with pytest.raises(ValueError, match="must be a number from 0 on"):
        SparseInputSpec(4, 4, threshold)


def test_the_choice_of_a_back_end() -> None:
    mlp = SparseMlpSpec(8, 16, 8, Activation("relu"), torch.float64)
    linear = SparseInputSpec(8, 16, 0.0, torch.float64)
    assert select_sparse_mlp(mlp, CPU).name == "reference", "no kernel computes in fp64"
    assert select_sparse_input(linear, CPU).name == "reference"
    assert select_sparse_mlp(mlp, CPU, "reference").name == "reference"
    for backends in (SPARSE_MLP, SPARSE_INPUT):
        assert backends[-1].name == "reference"
        assert len({b.name for b in backends}) == len(backends)
    with pytest.raises(ValueError, match="unknown back end 'fast'"):
        select_sparse_mlp(mlp, CPU, "fast")
    with pytest.raises(ValueError, match="unknown back end 'fast'"):
        select_sparse_input(linear, CPU, "fast")


def test_both_operators_can_be_compiled_and_traced() -> None:
    x, gate, up, down_t = torch.randn(3, 8), torch.randn(3, 16), torch.randn(16, 8), torch.randn(16, 4)
    torch.library.opcheck(sparse_mlp, (x, gate, up, down_t, None, torch.randn(4), "relu", 0.0))
    torch.library.opcheck(sparse_input_linear, (gate, down_t, None, 0.5))
