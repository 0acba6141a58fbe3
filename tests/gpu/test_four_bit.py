"""Layers in 4 bits on a CUDA device, by every back end, against the definition's matrix."""

from __future__ import annotations

import pytest
import torch

from tests.layers import four_bit_tensors
from vllm_spense.format import Codecs
from vllm_spense.format.codecs import FP8, codec
from vllm_spense.format.codecs.four_bit import FourBit
from vllm_spense.ops import LinearSpec
from vllm_spense.ops.backend import Backend
from vllm_spense.ops.linear.four_bit import FourBitLayer
from vllm_spense.ops.linear.four_bit_cuda import FourBitCudaBackend, cuda_linear, dequantised
from vllm_spense.ops.linear.four_bit_triton import FourBitTritonBackend
from vllm_spense.ops.linear.reference import decoded

from .diagnosis import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]

NF4, FP4 = codec("nf4"), codec("fp4")
assert isinstance(NF4, FourBit)
assert isinstance(FP4, FourBit)
LAYERS = {
    "dense": LinearSpec("output", 4096, 4096, (0,), (4096,), Codecs(NF4, NF4)),
    "ragged": LinearSpec("output", 333, 1184, (0, 0, 0), (111, 200, 22), Codecs(FP4, FP4)),
    "16": LinearSpec("output", 130, 96, (0,), (130,), Codecs(NF4.variant(16), NF4.variant(16))),
    "gate_up": LinearSpec("output", 1200, 1024, (400, 200), (400, 200), Codecs(NF4, NF4)),
    "rows": LinearSpec("output", 333, 352, (20, 5, 0, 100), (31, 16, 161, 0), Codecs(NF4, NF4)),
    "columns": LinearSpec("input", 512, 2048, (1120,), (928,), Codecs(FP4.variant(32), NF4)),
    "narrow": LinearSpec("input", 130, 144, (8,), (136,), Codecs(NF4, NF4)),
    "mixed": LinearSpec("output", 700, 520, (300,), (400,), Codecs(NF4, FP8)),
}
BACK_ENDS: list[Backend[LinearSpec]] = [
    FourBitCudaBackend(),
    FourBitCudaBackend(shuffle=False),
    FourBitTritonBackend(),
]
EXACT = {torch.bfloat16: 2e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def legal(backend: Backend[LinearSpec], spec: LinearSpec, device: torch.device) -> Backend[LinearSpec]:
    if reason := backend.why_not(spec, device):
        pytest.skip(reason)
    return backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACK_ENDS, ids=["cuda-shuffle", "cuda-shared", "triton"])
@pytest.mark.parametrize("spec", LAYERS.values(), ids=LAYERS)
def test_products(
    cuda: torch.device, spec: LinearSpec, backend: Backend[LinearSpec], dtype: torch.dtype
) -> None:
    """One token, a tile and a bit, more than any tile, and as many as take the matrix."""
    tensors = {name: tensor.to(cuda) for name, tensor in four_bit_tensors(spec).items()}
    weight = decoded(spec, tensors).to(dtype).double()
    ready = legal(backend, spec, cuda).prepare(spec, tensors)
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(spec.out_features, generator=generator).to(cuda, dtype)
    for tokens in (1, 9, 17, 40, 200):
        x = torch.randn(tokens, spec.in_features, generator=generator).to(cuda, dtype)
        y = backend.apply(spec, ready, x, bias)
        expected = x.double() @ weight.T + bias.double()
        assert y.dtype == dtype
        assert relative_error(y, expected) < EXACT[dtype], tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", LAYERS.values(), ids=LAYERS)
def test_matrices_are_the_definitions(cuda: torch.device, spec: LinearSpec, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(cuda) for name, tensor in four_bit_tensors(spec).items()}
    expected = decoded(spec, tensors).to(dtype)
    triton = legal(FourBitTritonBackend(), spec, cuda)
    from vllm_spense.ops.linear import four_bit_triton_kernel  # imports Triton, which a CPU may lack

    layer = FourBitLayer.of(spec, triton.prepare(spec, tensors))
    assert torch.equal(four_bit_triton_kernel.dequantise(layer, spec.in_features, dtype), expected)
    backend = FourBitCudaBackend()
    if backend.why_not(spec, cuda) is None:
        ready = backend.prepare(spec, tensors)
        layer = FourBitLayer.of(spec, ready)
        for shuffle in (True, False):
            assert torch.equal(dequantised(layer, spec.in_features, dtype, shuffle), expected)


@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize("backend", BACK_ENDS, ids=["cuda-shuffle", "cuda-shared", "triton"])
def test_in_a_graph(cuda: torch.device, backend: Backend[LinearSpec], tokens: int) -> None:
    spec = LAYERS["dense"]
    tensors = {name: tensor.to(cuda) for name, tensor in four_bit_tensors(spec).items()}
    ready = legal(backend, spec, cuda).prepare(spec, tensors)
    x = torch.randn(tokens, spec.in_features, device=cuda).bfloat16()
    backend.apply(spec, ready, x, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend.apply(spec, ready, x, None)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert relative_error(y, backend.apply(spec, ready, x, None).double()) < EXACT[torch.bfloat16]


def test_calls_that_make_no_sense_are_refused(cuda: torch.device) -> None:
    spec = LAYERS["gate_up"]
    tensors = {name: tensor.to(cuda) for name, tensor in four_bit_tensors(spec).items()}
    backend = legal(FourBitCudaBackend(), spec, cuda)
    layer = FourBitLayer.of(spec, backend.prepare(spec, tensors))
    x = torch.zeros(2, 1024, dtype=torch.bfloat16, device=cuda)
    cuda_linear(x, layer)
    for given, change, message in (
        (x[:, :32].contiguous(), {}, "must be"),
        (x[:, :40].contiguous(), {}, "multiple of 32"),
        (x, {"dense_weight": layer.dense_weight[:, :8].contiguous()}, "dense_weight must be"),
        (x, {"sparse_values": layer.sparse_values[:, :8].contiguous()}, "sparse_values must be"),
        (x, {"sparse_meta": layer.sparse_meta[:, :8].contiguous()}, "sparse_meta must be"),
        (x, {"sparse_meta": layer.sparse_meta.t()}, "contiguous"),
        (x, {"blocks": [64, 32]}, "absmax must be"),
        (x, {"blocks": [64, 48]}, "power of two"),
        (x, {"tables": layer.tables[0]}, "tables must be"),
        (x, {"tables": layer.tables.cpu()}, "device of the weights"),
        (x, {"bias": x[0, :3]}, "bias must be"),
        (x, {"dense_weight": layer.dense_weight.view(torch.int8)}, "wrong dtype"),
        (x, {"dense_sizes": [400, 201]}, "dense_weight must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cuda_linear(given, layer._replace(**change))
