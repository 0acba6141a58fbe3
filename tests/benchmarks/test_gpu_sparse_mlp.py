"""The GPU benchmark of activation-sparse MLPs without one: what it calls is an MLP, errors make no row."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import sparse_mlp
from benchmarks.kernels.sparse_mlp import DENSITIES, Mlps, check, dense, matrices, measure
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.many_tokens import shape_for
from vllm_spense.ops.mlp.sparse_mlp import sparse_mlp_definition


@pytest.fixture
def mlps(monkeypatch: pytest.MonkeyPatch) -> Mlps:
    monkeypatch.setattr(sparse_mlp, "ROTATE_BYTES", 1)
    torch.manual_seed(0)
    return Mlps(64, 256, torch.device("cpu"))


def test_copies_take_turns(mlps: Mlps) -> None:
    assert len(mlps.copies) == 2
    first, second = mlps.copies
    assert not torch.equal(first.up, second.up)


@pytest.mark.parametrize("density", DENSITIES)
def test_the_threshold_lets_the_density_through(mlps: Mlps, density: float) -> None:
    gate = mlps.x @ mlps.copies[0].gate.t()
    activation = mlps.threshold(gate, density)
    assert float(activation.active(gate.float()).float().mean()) == pytest.approx(density, abs=0.01)


def test_what_is_timed_is_the_mlp(mlps: Mlps) -> None:
    w, x = mlps.copies[0], mlps.x[:3]
    gate = torch.nn.functional.linear(x, w.gate)
    expected = sparse_mlp_definition(x.float(), gate, w.up, w.down_t, None, None, Activation("relu"))
    check(dense(x, w, torch.cat((w.gate, w.up))), expected)
    calls = mlps.ours(matrices, x, Activation("fatrelu", 0.1), shape_for(256, 0.1))
    assert len(calls) == 2
    assert calls[0]().shape == (3, 64)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="wrong result: relative error"):
        mlps.ours(lambda x, w, *how: torch.zeros(3, 64), x, Activation("relu"), shape_for(256, 0.1))


def test_what_fails_says_why(mlps: Mlps) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    times = measure(mlps, 2, 0.1)
    assert set(times) == {"bf16", "gate", "cuda", "triton", "matrices", "fp8 gate, packed"}
    assert all(isinstance(value, str) and "Error" in value for value in times.values())
