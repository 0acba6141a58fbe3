"""The dense kernels of vLLM that GPUs fall back to, run here with vLLM's CPU versions of them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from vllm_spense.format import Codecs
from vllm_spense.format.codecs import NF4
from vllm_spense.format.online import online_layout, prune_and_pack
from vllm_spense.ops import LinearSpec, select_backend
from vllm_spense.ops.linear.reference import OUT_DTYPES
from vllm_spense.serving.layers.method import install

N, K = 48, 64
BOUND = 2e-2  # relative Frobenius error: bf16 rounding, and another order of scales


@pytest.fixture(params=["output", "input"])
def case(request: pytest.FixtureRequest) -> tuple[LinearSpec, dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    layout = online_layout(request.param, N, K, 0.5)
    tensors = prune_and_pack(torch.randn(N, K), layout)
    spec = LinearSpec(request.param, N, K, (layout.sparse,), (layout.dense,))
    return spec, tensors, torch.randn(5, K).bfloat16()


def run(
    runtime, tensors: dict[str, torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    layer = torch.nn.Module()
    layer.logical_widths = [N]
    layer.orig_dtype = torch.bfloat16
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # a back end spends them
    for name, tensor in tensors.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    install(layer, runtime.prepare(tensors), tuple(tensors))
    runtime.finish(layer)
    return runtime.apply(layer, x, bias)


@pytest.mark.parametrize("with_bias", [False, True])
def test_vllm_dense_fp8_agrees_with_the_definition(case, with_bias: bool) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_spense.serving.dense import DenseFp8
    from vllm_spense.serving.runtime import SpenseRuntime

    spec, tensors, x = case
    bias = torch.randn(N).bfloat16() if with_bias else None
    with set_current_vllm_config(VllmConfig()):
        dense = run(DenseFp8(spec, torch.bfloat16), dict(tensors), x, bias)
    reference = select_backend(spec, torch.device("cpu"), "reference")
    ours = run(SpenseRuntime(spec, reference), dict(tensors), x, bias)
    assert dense.dtype == ours.dtype == torch.bfloat16
    error = (dense.float() - ours.float()).norm() / ours.float().norm()
    assert error < BOUND


@pytest.mark.parametrize(
    ("wanted", "chosen"), [(None, "cpu"), ("reference", "reference"), ("vllm-fp8", "vllm-fp8")]
)
def test_the_environment_may_name_the_back_end(case, monkeypatch, wanted: str | None, chosen: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_spense.serving.runtime import make_runtime

    spec, tensors, _ = case
    monkeypatch.delenv("SPENSE_BACKEND", raising=False)
    if wanted:
        monkeypatch.setenv("SPENSE_BACKEND", wanted)
    layer = torch.nn.Module()
    layer.orig_dtype = torch.bfloat16
    with set_current_vllm_config(VllmConfig()):
        assert make_runtime(spec, tensors, layer).name == chosen


def test_layers_without_a_sparse_region_keep_the_default(monkeypatch) -> None:
    from vllm_spense.serving.runtime import make_runtime

    tensors = prune_and_pack(torch.randn(N, K), online_layout("output", N, K, 1.0))
    tensors["sparse_values"] = torch.empty(0, K // 2, dtype=torch.float8_e4m3fn)
    tensors["sparse_meta"] = torch.empty(0, K // 8, dtype=torch.uint8)
    spec = LinearSpec("output", N, K, (0,), (N,))
    monkeypatch.setenv("SPENSE_BACKEND", "cuda")
    assert make_runtime(spec, tensors, torch.nn.Module()).name == "cpu"


def test_a_back_end_that_cannot_run_is_refused(case, monkeypatch) -> None:
    from vllm_spense.serving.runtime import make_runtime

    spec, tensors, _ = case
    monkeypatch.setenv("SPENSE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda' cannot run this layer: runs on CUDA devices"):
        make_runtime(spec, tensors, torch.nn.Module())


def test_unquantized_layers_cannot_be_asked_for(case, monkeypatch) -> None:
    """They would leave out the scales of FP8 weights."""
    from vllm_spense.serving.runtime import make_runtime

    spec, tensors, _ = case
    monkeypatch.setenv("SPENSE_BACKEND", "vllm-unquantized")
    with pytest.raises(ValueError, match="unknown back end 'vllm-unquantized'"):
        make_runtime(spec, tensors, torch.nn.Module())


def test_leading_dimensions_are_kept(case) -> None:
    from vllm_spense.serving.runtime import SpenseRuntime

    spec, tensors, x = case
    runtime = SpenseRuntime(spec, select_backend(spec, torch.device("cpu")))
    y = run(runtime, dict(tensors), x.view(1, 5, K), None)
    assert y.shape == (1, 5, N)
    assert torch.equal(y[0], run(runtime, dict(tensors), x, None))
    assert y.dtype in OUT_DTYPES


def test_a_layer_finds_its_runtime(case) -> None:
    from vllm_spense.serving.runtime import make_runtime

    spec, tensors, _ = case
    layer = torch.nn.Module()
    layer.orig_dtype = torch.bfloat16
    assert make_runtime(spec, tensors, layer).name == "cpu"
    unquantized = LinearSpec(spec.split, N, K, spec.sparse_sizes, spec.dense_sizes, Codecs.of("bf16"))
    assert make_runtime(unquantized, tensors, layer).name == "vllm-unquantized"


@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="no AMX there")
def test_a_process_that_runs_on_a_cpu_has_asked_for_amx() -> None:
    """Linux kills what uses tiles unasked, and vLLM's attention uses them where the CPU has them."""
    program = """
import ctypes, torch
from vllm_spense.format.online import online_layout, prune_and_pack
from vllm_spense.ops import LinearSpec
from vllm_spense.serving.runtime import make_runtime

def permitted():
    features = ctypes.c_uint64()
    arch_prctl, get_permissions, tiles = 158, 0x1022, 1 << 18
    failed = ctypes.CDLL(None).syscall(arch_prctl, get_permissions, ctypes.byref(features))
    return not failed and bool(features.value & tiles)

before = permitted()
layout = online_layout("output", 48, 64, 0.5)
spec = LinearSpec.of([layout])
make_runtime(spec, prune_and_pack(torch.randn(48, 64), layout), torch.nn.Module())
print(before, permitted())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["False", str(torch.cpu._is_amx_tile_supported())]


def four_bit(block: int = 64, columns: int = 128) -> LinearSpec:
    codec = NF4.variant(block)
    return LinearSpec("output", N, columns, (0,), (N,), Codecs(codec, codec))


def test_weights_in_4_bits_get_a_kernel_or_are_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spense.serving.dense import DenseUnquantized
    from vllm_spense.serving.runtime import choose

    cpu = torch.device("cpu")
    monkeypatch.delenv("SPENSE_BACKEND", raising=False)
    chosen, reason = choose(four_bit(), cpu)
    kernels = platform.machine() == "x86_64"
    assert getattr(chosen, "name", None) == ("cpu-4bit" if kernels else DenseUnquantized.name)
    assert (reason is None) == kernels
    chosen, reason = choose(four_bit(block=8), cpu)
    assert chosen is DenseUnquantized
    assert reason == "no kernel for NF4 takes the layer: written out in bf16 at load"
    monkeypatch.setenv("SPENSE_BACKEND", "vllm-unquantized")
    assert choose(four_bit(), cpu) == (DenseUnquantized, "SPENSE_BACKEND=vllm-unquantized asks for it")
    monkeypatch.setenv("SPENSE_BACKEND", "cpu-fp32")
    with pytest.raises(ValueError, match="it does not know NF4 weights"):
        choose(four_bit(), cpu)
