"""``spense::linear_silu_mul`` on CUDA devices: every compiled pair configuration against float64."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.ops import linear_silu_mul, quantize_per_token, quantize_with_amax
from vllm_spense.ops.linear.spec import LinearSpec

from .cases import make_layer, output_layer
from .diagnosis import wrong

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda", "kernels")]

LAYERS = {
    "half": output_layer(512, (256, 256), (256, 256)),
    "sparse": output_layer(512, (256, 0), (256, 0)),
    "ragged": output_layer(1120, (200, 77), (200, 77)),
    "deep": output_layer(5120, (640, 640), (640, 640)),
}
PAIRS = [(t, c, False) for t in (8, 16, 32, 64) for c in (1, 2, 4, 8)] + [(128, c, True) for c in (1, 2, 4)]


def expected(spec: LinearSpec, tokens: int, device: torch.device, bias: torch.Tensor | None = None):
    layer = make_layer(spec, device)
    xq, xs = layer.inputs(tokens)
    gate, up = layer.expected(xq, xs, bias).chunk(2, dim=1)
    return layer, xq, xs, gate / (1 + (-gate).exp()) * up


@pytest.mark.parametrize("spec", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("tokens", [1, 13, 64, 200])
@pytest.mark.parametrize(("tile", "cluster", "multicast"), PAIRS)
def test_pairs(cuda: torch.device, spec, tokens: int, tile: int, cluster: int, multicast: bool) -> None:
    layer, xq, xs, wanted = expected(spec, tokens, cuda)
    y = torch.full_like(wanted, float("nan"), dtype=torch.bfloat16)
    amax = torch.zeros(tokens, 1, device=cuda)
    shards = layer.arguments().compiled()[:-1]
    torch.ops.spense.linear_silu_mul_sm90(xq, xs, *shards, tile, cluster, multicast, True, y, amax)
    assert not (problem := wrong(y, wanted)), problem
    assert torch.equal(amax, y.float().abs().amax(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_operator_then_quantisation(cuda: torch.device, dtype: torch.dtype) -> None:
    spec = LAYERS["half"]
    bias = make_layer(spec, cuda).bias(dtype)
    layer, xq, xs, wanted = expected(spec, 33, cuda, bias)
    y, amax = linear_silu_mul(xq, xs, layer.arguments(bias), dtype)
    assert not (problem := wrong(y, wanted)), problem
    for got, once_more in zip(quantize_with_amax(y, amax), quantize_per_token(y), strict=True):
        assert torch.equal(got.view(torch.uint8), once_more.view(torch.uint8))


def test_the_same_bits_every_time(cuda: torch.device) -> None:
    layer, xq, xs, _ = expected(LAYERS["deep"], 16, cuda)
    arguments = (xq, xs, layer.arguments(), torch.bfloat16)
    first = linear_silu_mul(*arguments)
    for _ in range(5):
        for a, b in zip(first, linear_silu_mul(*arguments), strict=True):
            assert torch.equal(a, b)
