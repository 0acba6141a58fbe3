"""Which back end runs a layer, and that those in plain PyTorch compute the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.layers import make_layer
from vllm_spense.format import FP8_DTYPE, Codecs, Layout
from vllm_spense.format.codecs import FP8, INT8
from vllm_spense.format.layout import Split
from vllm_spense.ops import LinearSpec, available_backends, select_backend
from vllm_spense.ops.backend import Tensors

CPU = torch.device("cpu")
RUNNABLE = [b for b in available_backends() if b.name in ("cpu-fp32", "reference")]
KERNELS = next(b for b in available_backends() if b.name == "cpu")
CUDA = next(b for b in available_backends() if b.name == "cuda")
LAYOUTS = [
    (Layout("output", 24, 48, 8), 2),
    (Layout("output", 24, 48, 0), 3),
    (Layout("output", 24, 48, 24), 1),
    (Layout("input", 24, 48, 16), 1),
    (Layout("input", 24, 48, 0), 1),
    (Layout("input", 24, 48, 48), 1),
]


def make(
    layout: Layout, shards: int, weight_dtype: torch.dtype = FP8_DTYPE, seed: int = 0
) -> tuple[LinearSpec, Tensors]:
    """Spec and checkpoint tensors of ``shards`` fused layers."""
    layer = make_layer([layout] * shards, weight_dtype, seed=seed)
    return layer.spec, layer.tensors()


def test_the_best_legal_back_end_runs_a_cpu_layer() -> None:
    spec, _ = make(*LAYOUTS[0])
    assert select_backend(spec, CPU).name == "cpu"
    assert select_backend(spec, CPU, "reference").name == "reference"


def test_another_device_falls_back_to_the_definition() -> None:
    """The last back end runs anywhere, so every layer has one."""
    spec, _ = make(*LAYOUTS[0])
    assert select_backend(spec, torch.device("meta")).name == "reference"


def test_a_named_back_end_that_cannot_run_says_why() -> None:
    spec, _ = make(*LAYOUTS[0])
    with pytest.raises(ValueError, match="back end 'cpu' cannot run this layer: runs on CPUs, not on meta"):
        select_backend(spec, torch.device("meta"), "cpu")


def test_unknown_names_list_the_known_ones() -> None:
    spec, _ = make(*LAYOUTS[0])
    with pytest.raises(
        ValueError, match=r"unknown back end 'cublas' \(known: .*cpu, cpu-4bit, cpu-fp32, reference\)"
    ):
        select_backend(spec, CPU, "cublas")


def test_the_list_is_a_copy() -> None:
    available_backends().clear()
    assert {b.name for b in available_backends()} >= {"cpu", "cpu-fp32", "reference"}


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [FP8_DTYPE, torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout", "shards"), LAYOUTS, ids=str)
def test_back_ends_agree_bit_for_bit(
    layout: Layout, shards: int, weight_dtype: torch.dtype, out: torch.dtype
) -> None:
    spec, tensors = make(layout, shards, weight_dtype)
    generator = torch.Generator().manual_seed(1)
    for tokens in (0, 1, 7):
        x = torch.randn(tokens, layout.in_features, generator=generator).to(out)
        for bias in (None, torch.randn(spec.out_features, generator=generator).to(out)):
            results = [b.apply(spec, b.prepare(spec, tensors), x, bias) for b in RUNNABLE]
            assert results[0].shape == (tokens, spec.out_features)
            assert results[0].dtype == out
            assert all(torch.equal(results[0], other) for other in results[1:])
            assert tokens == 0 or results[0].count_nonzero() > 0


@pytest.mark.parametrize(("layout", "shards"), [case for case in LAYOUTS if case[0].sparse], ids=str)
def test_the_kernels_layout_holds_the_same_layer(layout: Layout, shards: int) -> None:
    """What the CUDA back end prepares, computed by the definition: on CPUs the operator takes it as well."""
    spec, tensors = make(layout, shards)
    x = torch.randn(7, layout.in_features)
    reference = select_backend(spec, CPU, "reference")
    expected = reference.apply(spec, reference.prepare(spec, tensors), x, None)
    assert torch.equal(CUDA.apply(spec, CUDA.prepare(spec, tensors), x, None), expected)


@pytest.mark.parametrize("backend", [*RUNNABLE, KERNELS, CUDA], ids=lambda b: b.name)
@pytest.mark.parametrize(("layout", "shards"), LAYOUTS, ids=str)
def test_prepared_shapes_depend_on_the_spec_only(backend, layout: Layout, shards: int) -> None:
    """Other weights, and weights of zeros only, give the same names, shapes and dtypes."""
    spec, first = make(layout, shards, seed=0)
    _, second = make(layout, shards, seed=1)
    zeros = {
        n: torch.full_like(t, 0x44) if n == "sparse_meta" else torch.zeros_like(t) for n, t in first.items()
    }
    signatures = [
        {n: (t.shape, t.dtype) for n, t in backend.prepare(spec, tensors).items()}
        for tensors in (first, second, zeros)
    ]
    assert signatures[0] == signatures[1] == signatures[2]
    assert "weight_packed" in signatures[0], "vLLM's LoRA code looks for it"


@pytest.mark.parametrize("split", ["output", "input"])
def test_activations_become_what_the_weights_are_multiplied_with(split: Split) -> None:
    layout = Layout(split, 24, 48, 16)
    fp8, _ = make(layout, 1)
    dtypes = (FP8_DTYPE, torch.int8, torch.bfloat16)
    assert [make(layout, 1, d)[0].activation_dtype for d in dtypes] == [FP8_DTYPE, torch.int8, None]
    mixed = replace(fp8, codecs=Codecs(FP8, INT8))
    assert mixed.activation_dtype is None, "both regions read the same inputs"
    assert fp8.hybrid
    assert not make(Layout(split, 24, 48, 0), 1)[0].hybrid
    assert hash(fp8) == hash(make(layout, 1)[0])
