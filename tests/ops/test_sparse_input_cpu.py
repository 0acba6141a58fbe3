"""spense::sparse_input_linear_cpu, every instruction set that this CPU has, both ways, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ops.test_sparse_mlp_cpu import (
    ACCUMULATION,
    ACTIVE,
    ALL,
    CPU,
    ROUNDING,
    every_kernel,
    every_way,
    needs_kernels,
)
from vllm_spense.ops.mlp.select import select_sparse_input
from vllm_spense.ops.mlp.sparse_input import SparseInputReference, SparseInputSpec
from vllm_spense.ops.mlp.sparse_input_cpu import SparseInputCpuBackend

SIZES = [(1, 1), (64, 64), (61, 45), (513, 129), (300, 300)]
"""Inputs and outputs."""


def inputs(tokens: int, k: int, density: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, k, generator=generator)
    return torch.where(torch.rand(tokens, k, generator=generator) < density, values, 0.0).bfloat16()


def weights(k: int, n: int) -> torch.Tensor:
    return torch.randn(k, n, generator=torch.Generator().manual_seed(1)).bfloat16()


def run(
    x: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None = None,
    threshold: float = 0.0,
    isa: int = 0,
    way: int = 0,
) -> torch.Tensor:
    return torch.ops.spense.sparse_input_linear_cpu(x, weight_t, bias, threshold, isa, way)


def check(
    y: torch.Tensor, x: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> None:
    kept = torch.where(x.double().abs() <= threshold, 0.0, x.double())
    wanted = kept @ weight_t.double() + (0 if bias is None else bias.double())
    bound = ROUNDING * wanted.abs() + ACCUMULATION * (kept.abs() @ weight_t.double().abs() + 1e-30)
    assert y.shape == wanted.shape
    assert bool(((y.double() - wanted).abs() <= bound).all())


@every_kernel
@every_way
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.30078125])
def test_against_float64(threshold: float, sizes: tuple[int, int], way: int, isa: int) -> None:
    """One threshold lies between two bf16 values, one is one, and inputs that equal it are dropped."""
    k, n = sizes
    for tokens in (0, 1, 2, 3, 8, 17, 64):
        x = inputs(tokens, k, seed=tokens)
        x[::2, ::3] = threshold
        bias = weights(1, n)[0] if tokens % 2 else None
        check(run(x, weights(k, n), bias, threshold, isa, way), x, weights(k, n), bias, threshold)


@needs_kernels
def test_random_sizes_and_densities() -> None:
    generator = torch.Generator().manual_seed(21)
    for seed in range(1000):
        k, n, tokens = (int(torch.randint(1, most, (), generator=generator)) for most in (300, 200, 40))
        density, threshold = (float(z) for z in torch.rand(2, generator=generator))
        x = inputs(tokens, k, density**3, seed)
        threshold = threshold if seed % 2 else 0.0
        check(run(x, weights(k, n), None, threshold), x, weights(k, n), None, threshold)


@every_kernel
@every_way
def test_what_is_not_finite_is_seen_in_its_token_only(way: int, isa: int) -> None:
    x, weight_t = inputs(9, 64), weights(64, 48)
    whole = run(x, weight_t, None, 0.25, isa, way)
    x.view(torch.int16)[4, 7] = -0x40  # NaN with a sign
    x[6, 3] = float("inf")
    y = run(x, weight_t, None, 0.25, isa, way)
    assert y[4].isnan().all()
    assert not y[6].isfinite().any()
    y[4], y[6] = whole[4], whole[6]
    assert torch.equal(y, whole)


@every_kernel
@every_way
def test_bits_depend_on_the_token_alone(way: int, isa: int) -> None:
    """Neither on threads, nor on chance, nor on other tokens."""
    x, weight_t = inputs(40, 500), weights(500, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = run(x, weight_t, None, 0.0, isa, way)
        torch.set_num_threads(2)
        assert torch.equal(run(x, weight_t, None, 0.0, isa, way), whole)
    finally:
        torch.set_num_threads(before)
    for first, last in ((0, 1), (5, 7), (3, 19)):
        assert torch.equal(run(x[first:last], weight_t, None, 0.0, isa, way), whole[first:last])


@needs_kernels
def test_many_tokens_and_rows_that_lie_apart() -> None:
    wide = inputs(600, 200)
    x = wide[:, 31:160]
    for way in (ACTIVE, ALL):
        y = run(x, weights(129, 64), None, 0.5, 0, way)
        check(y, x, weights(129, 64), None, 0.5)
        assert torch.equal(y, run(x.contiguous(), weights(129, 64), None, 0.5, 0, way))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(3, 64)}, r"x must be a bf16 CPU tensor \[M, K\]"),
        ({"weight_t": torch.zeros(63, 48).bfloat16()}, r"weight_t must be .* \[K, N\]"),
        ({"bias": torch.zeros(47).bfloat16()}, r"bias must be .* bf16 \[N\]"),
        ({"threshold": -0.5}, "threshold -0.5 must be a number from 0 on"),
        ({"isa": 2}, "instruction set 2 is none"),
        ({"way": -1}, "there is no way -1"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_refused(change: dict[str, Any], said: str) -> None:
    usual: dict[str, Any] = {"x": inputs(3, 64), "weight_t": weights(64, 48)}
    run(**usual)
    with pytest.raises(RuntimeError, match=said):
        run(**(usual | change))


@needs_kernels
def test_as_a_torch_operator() -> None:
    example = (inputs(3, 64), weights(64, 48), weights(1, 48)[0], 0.5)
    torch.library.opcheck(torch.ops.spense.sparse_input_linear_cpu.default, example)


@needs_kernels
def test_the_back_end() -> None:
    spec = SparseInputSpec(64, 48, 0.25)
    backend = select_sparse_input(spec, CPU)
    assert isinstance(backend, SparseInputCpuBackend)
    weight = weights(64, 48).t().contiguous()
    tensors = backend.prepare(spec, weight.clone())
    assert tensors["weight_packed"].shape == (64, 48)
    x, bias = inputs(64, 5).t(), weights(1, 48)[0]  # rows are not contiguous
    y = backend.apply(spec, tensors, x, bias)
    check(y, x, weight.t(), bias, 0.25)
    reference = SparseInputReference()
    check(reference.apply(spec, reference.prepare(spec, weight), x, bias), x, weight.t(), bias, 0.25)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def double(x: torch.Tensor) -> torch.Tensor:
        return backend.apply(spec, tensors, x, bias) * 2

    for tokens in (5, 3):
        assert torch.equal(double(x[:tokens]), 2 * backend.apply(spec, tensors, x[:tokens], bias))


def test_what_it_does_not_run() -> None:
    spec, backend = SparseInputSpec(64, 48), SparseInputCpuBackend()
    assert backend.why_not(spec, torch.device("cuda")) == "runs on CPUs, not on cuda"
    wide = replace(spec, dtype=torch.float32)
    assert backend.why_not(wide, CPU) == "the kernels take bf16 weights, not torch.float32"
    assert select_sparse_input(wide, CPU).name == "reference"
