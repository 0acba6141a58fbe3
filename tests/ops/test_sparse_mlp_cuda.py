"""The compiled back ends for activation-sparse MLPs without a GPU: what they take, and what they hand
over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mlps import ACTIVATIONS, Mlp, assert_within_rounding, mlp
from vllm_spense.ops import extension
from vllm_spense.ops.mlp import select, sparse_mlp_cuda
from vllm_spense.ops.mlp.activation import KINDS, Activation
from vllm_spense.ops.mlp.many_tokens import most_tokens, shape_for
from vllm_spense.ops.mlp.sparse_input import SparseInputSpec, sparse_input_definition
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpSpec, sparse_mlp_definition
from vllm_spense.ops.mlp.sparse_mlp_cuda import SparseInputCudaBackend, SparseMlpCudaBackend
from vllm_spense.ops.mlp.twell import TwellShape, overflowed, pack, unpack

KERNELS = Path(__file__).parents[2] / "kernels"
CUDA = torch.device("cuda", 0)
SPEC = SparseMlpSpec(64, 304, 40, Activation("relu"))
LAYER = SparseInputSpec(304, 40)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if there were one, with the kernels."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(extension, "why_not_loaded", lambda: None)
    monkeypatch.setattr(sparse_mlp_cuda, "_why_not_on", lambda index: None)
    return monkeypatch


def test_what_they_take(a_gpu: pytest.MonkeyPatch) -> None:
    backend, layers = SparseMlpCudaBackend(), SparseInputCudaBackend()
    assert backend.why_not(SPEC, CUDA) is None
    assert layers.why_not(LAYER, CUDA) is None
    assert select.select_sparse_mlp(SPEC, CUDA).name == "cuda"
    assert select.select_sparse_input(LAYER, CUDA).name == "cuda"
    for change, reason in (
        ({"neurons": 65_536}, "65536 neurons are beyond the 65535"),
        ({"neurons": 300}, "neurons 300 must be a multiple of 8"),
        ({"in_features": 65}, "in_features 65 must be a multiple of 8"),
        ({"out_features": 4}, "out_features 4 must be a multiple of 8"),
        ({"dtype": torch.float16}, "take bf16, not torch.float16"),
    ):
        assert reason in str(backend.why_not(replace(SPEC, **change), CUDA))
    for change, reason in (
        ({"in_features": 70_000}, "70000 inputs are beyond the 65535"),
        ({"in_features": 63}, "in_features 63 must be a multiple of 8"),
        ({"out_features": 4}, "out_features 4 must be a multiple of 8"),
        ({"dtype": torch.float32}, "take bf16, not torch.float32"),
    ):
        assert reason in str(layers.why_not(replace(LAYER, **change), CUDA))
    assert "not on cpu" in str(backend.why_not(SPEC, torch.device("cpu")))
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "compute capability 9.0, not 8.0" in str(backend.why_not(SPEC, CUDA))


def test_without_the_extension_another_one_runs(a_gpu: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    a_gpu.setattr(extension, "why_not_loaded", lambda: "not built")
    assert SparseMlpCudaBackend().why_not(SPEC, CUDA) == "not built"
    assert select.select_sparse_mlp(SPEC, CUDA).name == "triton"
    assert select.select_sparse_input(LAYER, CUDA).name == "triton"


@pytest.fixture
def calls() -> Iterator[list[tuple[Any, ...]]]:
    """The compiled operators for CPU tensors, in plain torch behind the library's own schemas."""
    if reason := extension.why_not_loaded():
        pytest.skip(reason)
    made: list[tuple[Any, ...]] = []

    def passed(gate: torch.Tensor, kind: int, threshold: float) -> torch.Tensor:
        seen = gate.abs() if kind == len(KINDS) else gate
        return torch.where(seen <= threshold, 0.0, gate)

    def pack_twell(
        gate: torch.Tensor, tile: int, share: int, kind: int, threshold: float, words: torch.Tensor
    ) -> None:
        made.append(("pack_twell", tile, share, kind, threshold))
        words.copy_(pack(passed(gate, kind, threshold), TwellShape(gate.shape[1], tile, share)))

    def sparse_mlp_packed(gate, words, x, up, up_bias, down_t, bias, tile, share, kind, threshold, y) -> None:
        made.append(("sparse_mlp_packed", tile, share, kind, threshold))
        shape = TwellShape(gate.shape[1], tile, share)
        kept = passed(gate, kind, threshold)
        fits = ~overflowed(words, shape)
        assert torch.equal(unpack(words[fits], shape), kept[fits])
        if kind == len(KINDS):
            assert x is None
            assert up is None
            y.copy_(sparse_input_definition(gate, down_t, bias, threshold))
        else:
            act = Activation(KINDS[kind], threshold)
            y.copy_(sparse_mlp_definition(x, gate, up, down_t, up_bias, bias, act))

    library = torch.library.Library("spense", "IMPL", "CPU")
    library.impl("pack_twell", pack_twell)
    library.impl("sparse_mlp_packed", sparse_mlp_packed)
    yield made
    library._destroy()


def applied(given: Mlp, activation: Activation, density: float | None) -> torch.Tensor:
    neurons, features = given.up.shape
    spec = SparseMlpSpec(features, neurons, given.down_t.shape[1], activation, given.x.dtype, density)
    tensors = {"up": given.up, "down": given.down_t.t().contiguous()}
    tensors |= {name: t for name in ("up_bias", "bias") if (t := getattr(given, name)) is not None}
    ready = SparseMlpCudaBackend().prepare(spec, tensors)
    flat = given.x, given.gate, ready["up"], ready["down_t"], ready.get("up_bias"), ready.get("bias")
    return sparse_mlp_cuda._cuda_sparse_mlp._init_fn(*flat, activation.kind, activation.threshold, density)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("density", [None, 0.02, 0.3])
def test_the_operators_are_called_as_they_are_declared(
    calls: list[tuple[Any, ...]], activation: Activation, density: float | None
) -> None:
    given = mlp(1, 64, 304, 40, density or 0.1, bias=True)
    assert_within_rounding(applied(given, activation, density), given, activation)
    shape = shape_for(304, density)
    how = shape.tile, shape.share, KINDS.index(activation.kind), pytest.approx(activation.threshold)
    assert calls == [("pack_twell", *how), ("sparse_mlp_packed", *how)]


def test_many_tokens_take_whole_matrices(calls: list[tuple[Any, ...]]) -> None:
    given, relu = mlp(most_tokens(None) + 1, 64, 304, 40, bias=True), ACTIVATIONS[0]
    assert_within_rounding(applied(given, relu, None), given, relu, accumulation=2.0**-6)
    assert calls == []


def test_inputs_of_a_plain_layer(calls: list[tuple[Any, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 304), (40, 304), (40,))
    )
    ready = SparseInputCudaBackend().prepare(LAYER, weight)
    run = sparse_mlp_cuda._cuda_sparse_input._init_fn
    y = run(x, ready["weight_packed"], bias, 0.5, None)
    assert torch.equal(y, sparse_input_definition(x, weight.t(), bias, 0.5))
    assert [call[0] for call in calls] == ["pack_twell", "sparse_mlp_packed"]
    many = x.repeat(40, 1)
    torch.testing.assert_close(run(many, ready["weight_packed"], bias, 0.5, None)[:2], y, rtol=2e-2, atol=0.1)
    assert len(calls) == 2


def test_the_operators_have_shapes_for_compilers() -> None:
    given = mlp(3, 64, 304, 40)
    tensors = [t.to("meta") for t in (given.x, given.gate, given.up, given.down_t)]
    y = sparse_mlp_cuda._cuda_sparse_mlp(*tensors, None, None, "relu", 0.0, None)
    assert (y.shape, y.dtype) == ((3, 40), torch.bfloat16)
    y = sparse_mlp_cuda._cuda_sparse_input(tensors[1], tensors[3], None, 0.0, None)
    assert (y.shape, y.dtype) == ((3, 40), torch.bfloat16)


def test_the_kernels_number_the_activations() -> None:
    header = (KERNELS / "mlp" / "twell.h").read_text()
    for number, kind in enumerate((*KINDS, "input")):
        assert f"k{kind.capitalize()} = {number}" in header
    assert len(KINDS) == sparse_mlp_cuda.INPUT
