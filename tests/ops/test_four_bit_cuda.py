"""The back end of the compiled 4-bit kernels without a GPU: what it takes, and what it hands to them."""

from __future__ import annotations

import pytest
import torch

from tests.layers import four_bit_tensors
from vllm_spense.format import Codecs
from vllm_spense.format.codecs import FP8, codec
from vllm_spense.format.codecs.four_bit import FourBit
from vllm_spense.ops import LinearSpec, extension
from vllm_spense.ops.linear import four_bit_cuda, select
from vllm_spense.ops.linear.four_bit import FourBitLayer
from vllm_spense.ops.linear.four_bit_cuda import FourBitCudaBackend, cuda_linear

CUDA = torch.device("cuda", 0)
NF4 = codec("nf4")
assert isinstance(NF4, FourBit)
UNIFORM = Codecs(NF4, NF4)
FUSED = LinearSpec("output", 120, 160, (0, 0, 0), (64, 24, 32), UNIFORM)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if there were one, with the kernels."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(extension, "why_not_loaded", lambda: None)
    monkeypatch.setattr(four_bit_cuda, "_why_not_on", lambda index: None)
    return monkeypatch


def test_what_it_takes(a_gpu: pytest.MonkeyPatch) -> None:
    backend = FourBitCudaBackend()
    assert backend.why_not(FUSED, CUDA) is None
    assert backend.why_not(LinearSpec("input", 24, 96, (0,), (96,), UNIFORM), CUDA) is None
    assert backend.why_not(LinearSpec("input", 24, 96, (32,), (64,), UNIFORM), CUDA) is None
    assert backend.why_not(LinearSpec("output", 24, 96, (8, 1), (8, 7), UNIFORM), CUDA) is None
    assert "not on cpu" in str(backend.why_not(FUSED, torch.device("cpu")))
    small, other = NF4.variant(8), NF4.variant(96)
    for spec, reason in (
        (LinearSpec("output", 16, 64, (0,), (16,)), "in 4 bits, not FP8"),
        (LinearSpec("output", 16, 64, (8,), (8,), Codecs(NF4, FP8)), "in 4 bits, not NF4 + FP8"),
        (LinearSpec("output", 16, 48, (0,), (16,), UNIFORM), "multiple of 32"),
        (LinearSpec("input", 16, 64, (8,), (56,), UNIFORM), "8 columns of a region"),
        (LinearSpec("output", 40, 64, (0,) * 5, (8,) * 5, UNIFORM), "5 fused shards"),
        (LinearSpec("output", 16, 64, (0,), (16,), Codecs(small, small)), "smaller than 16"),
        (LinearSpec("output", 16, 96, (0,), (16,), Codecs(other, other)), "no power of two"),
    ):
        assert reason in str(backend.why_not(spec, CUDA))
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5 is below 8.0" in str(backend.why_not(FUSED, CUDA))


def test_it_comes_before_triton(a_gpu: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert select.select_backend(FUSED, CUDA).name == "cuda-4bit"
    mixed = LinearSpec("output", 16, 64, (8,), (8,), Codecs(NF4, FP8))
    assert select.select_backend(mixed, CUDA).name == "triton-4bit"


def test_the_operator_has_a_shape_for_compilers() -> None:
    spec = LinearSpec("output", 120, 160, (32, 8, 0), (32, 16, 32), UNIFORM)
    ready = FourBitCudaBackend().prepare(spec, four_bit_tensors(spec))
    layer = FourBitLayer.of(spec, {name: tensor.to("meta") for name, tensor in ready.items()})
    y = cuda_linear(torch.empty(5, 160, dtype=torch.bfloat16, device="meta"), layer)
    assert (y.shape, y.dtype) == ((5, 120), torch.bfloat16)
