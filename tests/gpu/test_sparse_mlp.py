"""Activation-sparse MLPs on a CUDA device, by every back end, against the definition."""

from __future__ import annotations

import pytest
import torch

from tests.layers import make_layer
from tests.mlps import ACTIVATIONS, Mlp, assert_within_rounding, mlp, words_of
from vllm_spense.format import Layout
from vllm_spense.ops import quantize_per_token
from vllm_spense.ops.linear.cuda import run as linear
from vllm_spense.ops.linear.repack import block
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.many_tokens import most_tokens
from vllm_spense.ops.mlp.packed_gate import TILE, linear_twell
from vllm_spense.ops.mlp.packed_gate import why_not as why_not_packed
from vllm_spense.ops.mlp.silu_mul import paired_config
from vllm_spense.ops.mlp.sparse_input import SparseInputBackend, SparseInputSpec, sparse_input_definition
from vllm_spense.ops.mlp.sparse_input_triton import SparseInputTritonBackend
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpBackend, SparseMlpSpec
from vllm_spense.ops.mlp.sparse_mlp_cuda import (
    SparseInputCudaBackend,
    SparseMlpCudaBackend,
    multiply_packed,
    packed,
)
from vllm_spense.ops.mlp.sparse_mlp_triton import SparseMlpTritonBackend
from vllm_spense.ops.mlp.twell import TwellShape

from .diagnosis import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]

BACK_ENDS: list[SparseMlpBackend] = [SparseMlpCudaBackend(), SparseMlpTritonBackend()]
INPUTS: list[SparseInputBackend] = [SparseInputCudaBackend(), SparseInputTritonBackend()]
SIZES = {"SparseLM-2B": (2048, 5632, 2048), "Llama-2-7B": (4096, 11008, 4096), "ragged": (584, 1000, 328)}
RELU = ACTIVATIONS[0]
names = [backend.name for backend in BACK_ENDS]


def on(device: torch.device, given: Mlp) -> Mlp:
    return Mlp(*(None if t is None else t.to(device) for t in given.tensors()))  # type: ignore[arg-type]


def run(backend: SparseMlpBackend, given: Mlp, activation: Activation, density: float | None) -> torch.Tensor:
    neurons, features = given.up.shape
    spec = SparseMlpSpec(features, neurons, given.down_t.shape[1], activation, given.x.dtype, density)
    if reason := backend.why_not(spec, given.x.device):
        pytest.skip(reason)
    tensors = {"up": given.up, "down": given.down_t.t().contiguous()}
    tensors |= {name: t for name in ("up_bias", "bias") if (t := getattr(given, name)) is not None}
    return backend.apply(spec, backend.prepare(spec, tensors), given.x, given.gate)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("backend", BACK_ENDS, ids=names)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_mlps(
    cuda: torch.device, sizes: tuple[int, int, int], backend: SparseMlpBackend, activation: Activation
) -> None:
    """Few tokens, with tiles that overflow at 0.3; then so many that whole matrices are multiplied."""
    for tokens, density in ((1, 0.02), (5, 0.1), (3, 0.3), (200, 0.3)):
        given = on(cuda, mlp(tokens, *sizes, density, bias=True, seed=tokens))
        dense = tokens > most_tokens(0.1)
        y = run(backend, given, activation, None)
        assert_within_rounding(y, given, activation, accumulation=2.0**-6 if dense else 2.0**-17)


@pytest.mark.parametrize("backend", BACK_ENDS, ids=names)
def test_the_same_bits_every_time_and_in_a_graph(cuda: torch.device, backend: SparseMlpBackend) -> None:
    given = on(cuda, mlp(4, *SIZES["SparseLM-2B"], 0.15, seed=1))
    first = run(backend, given, RELU, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(backend, given, RELU, None)
    for _ in range(12):
        assert torch.equal(run(backend, given, RELU, None), first)
        graph.replay()
        assert torch.equal(y, first)
    for density in (0.9, 0.0):  # what overflows is decided when the graph runs
        given.gate.copy_(mlp(4, *SIZES["SparseLM-2B"], density, seed=2).gate)
        graph.replay()
        assert torch.equal(y, run(backend, given, RELU, None))


@pytest.mark.parametrize("share", [8, 4, 2])
@pytest.mark.parametrize("tile", [128, 256])
def test_words_are_the_definitions(cuda: torch.device, tile: int, share: int) -> None:
    given, shape = on(cuda, mlp(9, 16, 5000, 16, 0.2)), TwellShape(5000, tile, share)
    spec = SparseMlpSpec(16, 5000, 16, RELU)
    from vllm_spense.ops.mlp.sparse_mlp_triton_kernel import pack

    for activation in ACTIVATIONS:
        expected = words_of(given.gate, activation, shape)
        assert torch.equal(pack(given.gate, shape, activation.threshold), expected)
        if SparseMlpCudaBackend().why_not(spec, cuda) is None:
            assert torch.equal(packed(given.gate, shape, activation.threshold, 0), expected)


@pytest.mark.parametrize("backend", INPUTS, ids=names)
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_inputs_of_plain_layers(cuda: torch.device, backend: SparseInputBackend, threshold: float) -> None:
    spec = SparseInputSpec(8192, 2048, threshold)
    if reason := backend.why_not(spec, cuda):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2048, 8192, generator=generator).to(cuda, torch.bfloat16)
    ready = backend.prepare(spec, weight)
    for tokens in (1, 7, 200):
        x = torch.randn(tokens, 8192, generator=generator).relu().to(cuda, torch.bfloat16)
        y = backend.apply(spec, ready, x, None)
        expected = sparse_input_definition(x.float(), weight.t().float(), None, threshold)
        assert relative_error(y, expected) < 3e-3, tokens


@pytest.mark.parametrize("tokens", [1, 13, 40, 300])
@pytest.mark.parametrize("regions", [(0, 5632), (2816, 2816), (5632, 0)], ids=str)
def test_a_gate_that_its_own_kernel_packs(cuda: torch.device, regions: tuple[int, int], tokens: int) -> None:
    """The words are those of the kernel that writes the gate; tiles that overflow bring their values
    along."""
    sparse, dense = regions
    made = make_layer([Layout("output", sparse + dense, 2048, sparse)], seed=dense).arguments()
    layer = block(made._replace(**{n: t.to(cuda) for n, t in made._asdict().items() if torch.is_tensor(t)}))
    if reason := why_not_packed(layer, cuda):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 2048, generator=generator).to(cuda, torch.bfloat16)
    quantised = quantize_per_token(x)
    processors = torch.cuda.get_device_properties(cuda).multi_processor_count
    gate = torch.empty(tokens, 5632, dtype=torch.bfloat16, device=cuda)
    linear(paired_config(layer.spec(2048), tokens, processors), *quantised, layer, gate)
    others = on(cuda, mlp(tokens, 2048, 5632, 512, seed=tokens))
    for share in (8, 2):
        shape = TwellShape(5632, TILE, share)
        for quantile in (0.98, 0.85, 0.4):
            open_from = max(0.0, float(gate.float().flatten()[:100_000].quantile(quantile)))
            activation = Activation("fatrelu", open_from)
            words, values = linear_twell(*quantised, layer, activation, share)
            assert torch.equal(words, words_of(gate, activation, shape))
            tiles = (words[:, :, 0] > shape.capacity).repeat_interleave(TILE, 1)
            assert torch.equal(values[tiles], gate[tiles])
            given = Mlp(x, gate, others.up, others.down_t)
            y = multiply_packed(x, words, values, given.up, given.down_t, None, None, activation, shape)
            assert_within_rounding(y, given, activation, accumulation=2.0**-17)


def test_calls_that_make_no_sense_are_refused(cuda: torch.device) -> None:
    given, shape = on(cuda, mlp(2, 64, 256, 64)), TwellShape(256)
    if reason := SparseMlpCudaBackend().why_not(SparseMlpSpec(64, 256, 64, RELU), cuda):
        pytest.skip(reason)
    words = packed(given.gate, shape, 0.0, 0)
    y = torch.empty(2, 64, dtype=torch.bfloat16, device=cuda)
    good = {"gate": given.gate, "words": words, "x": given.x, "up": given.up, "up_bias": None}
    good |= {
        "down_t": given.down_t,
        "bias": None,
        "tile": 256,
        "share": 8,
        "kind": 0,
        "threshold": 0.0,
        "y": y,
    }
    torch.ops.spense.sparse_mlp_packed(*good.values())
    for change, message in (
        ({"gate": given.gate.float()}, "gate has the wrong dtype"),
        ({"gate": given.gate.t()}, "gate must be contiguous"),
        ({"words": words[:1]}, "words must be"),
        ({"words": words.cpu()}, "device of the gate"),
        ({"share": 3}, "no words hold"),
        ({"threshold": -1.0}, "no words hold"),
        ({"kind": 9}, "no activation has the number"),
        ({"up": given.up[:8]}, "up must be"),
        ({"x": given.x[:, :32].contiguous()}, "up must be"),
        ({"x": None}, "belong to a gated MLP"),
        ({"down_t": given.down_t[:, :8].contiguous()}, "down_t must be"),
        ({"bias": given.x[0, :3]}, "bias must be"),
        ({"up_bias": given.gate[0].float()}, "up_bias must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.spense.sparse_mlp_packed(*(good | change).values())
