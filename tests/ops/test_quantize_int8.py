"""Per-token INT8 activations against a loop over tokens, and against vLLM's own on CPUs."""

from __future__ import annotations

import pytest
import torch

from tests.layers import make_layer
from vllm_spense.format import Layout
from vllm_spense.ops import LinearArguments, LinearSpec, quantize_per_token
from vllm_spense.ops.activations import MIN_SCALE_INT8, quantized
from vllm_spense.ops.linear.op import linear

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BAD = (float("nan"), float("inf"), float("-inf"))


def tokens(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[0])[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (7, 144), (33, 576)])
def test_against_a_loop(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = tokens(shape, dtype)
    q, scale = quantize_per_token(x, torch.int8)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (q.shape, scale.shape) == (x.shape, (shape[0], 1))
    for token in range(shape[0]):
        values = x[token].float()
        expected = max(abs(v) for v in values.tolist()) / 127
        assert scale[token].item() == pytest.approx(expected, rel=1e-6)
        inverse = 1 / scale[token, 0]
        assert q[token].tolist() == [max(-127, min(127, round((v * inverse).item()))) for v in values]


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_is_what_vllm_does_on_cpus(dtype: torch.dtype) -> None:
    """Bit by bit, over a hundred thousand values; division by the scale differs in some of them."""
    from vllm import _custom_ops as ops

    x = tokens((300, 576), dtype)
    theirs, their_scale, _ = ops.onednn_scaled_int8_quant(x, None, None, True)
    q, scale = quantize_per_token(x, torch.int8)
    assert torch.equal(scale, their_scale)
    assert torch.equal(q, theirs)
    if dtype == torch.bfloat16:
        assert not torch.equal((x.float() / scale).round().to(torch.int8), theirs)


def test_ties_go_to_even() -> None:
    q, scale = quantize_per_token(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]), torch.int8)
    assert scale.item() == 1
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_zero_and_tiny_tokens_have_the_least_scale() -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [1e-40, -1e-45, 0.0], [1.0, 0.0, -2.0]])
    q, scale = quantize_per_token(x, torch.int8)
    assert scale.flatten().tolist() == [MIN_SCALE_INT8, MIN_SCALE_INT8, pytest.approx(2 / 127)]
    assert q.tolist() == [[0, 0, 0], [0, 0, 0], [64, 0, -127]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_becomes_127(dtype: torch.dtype, sign: int) -> None:
    """Never -128, though the reciprocal of a scale may be rounded up."""
    largest = torch.linspace(0.01, 60000, 4000).to(dtype)
    q, _ = quantize_per_token(torch.stack([sign * largest, largest / 3], 1), torch.int8)
    assert (q[:, 0] == sign * 127).all()


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_token_has_no_finite_output_and_spoils_no_other(bad: float) -> None:
    layer = make_layer([Layout("output", 24, 144, 8)], torch.int8, bias=True).arguments()
    x = tokens((5, 144), torch.bfloat16)
    good = linear(*quantize_per_token(x, torch.int8), layer, torch.bfloat16)
    x[2, 7] = bad
    q, scale = quantize_per_token(x, torch.int8)
    assert scale[2].isnan()
    assert not q[2].any()
    y = linear(q, scale, layer, torch.bfloat16)
    assert y[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], good[others])


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    q, scale = quantize_per_token(torch.zeros(shape, dtype=torch.bfloat16), torch.int8)
    assert (q.shape, q.dtype) == (shape, torch.int8)
    assert scale.shape == (shape[0], 1)
    assert (scale > 0).all()


def test_none_leaves_them_as_they_are() -> None:
    x = torch.randn(2, 8)
    assert quantized(x, None) == (x, None)
    assert quantized(x, torch.int8)[0].dtype == torch.int8


def test_compiled_equals_eager() -> None:
    layer = make_layer([Layout("input", 24, 144, 16)], torch.int8, bias=True)
    given: LinearArguments = layer.arguments()
    assert LinearSpec.of(layer.layouts, layer.codecs).activation_dtype == torch.int8

    def forward(x: torch.Tensor) -> torch.Tensor:
        return linear(*quantize_per_token(x * 2, torch.int8), given, x.dtype)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for count in (2, 19):
        x = torch.randn(count, 144, generator=torch.Generator().manual_seed(count)).bfloat16()
        x[1, 3] = torch.nan
        ours, eager = compiled(x), forward(x)
        assert torch.equal(ours.isnan(), eager.isnan())
        assert torch.equal(ours.nan_to_num(), eager.nan_to_num())
