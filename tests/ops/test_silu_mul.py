"""gate_up with SiLU·mul fused: against layer, activation and quantisation one after another."""

from __future__ import annotations

import pytest
import torch

from tests.layers import make_layer
from vllm_spense.format import Layout
from vllm_spense.ops import LinearArguments, LinearSpec, quantize_per_token, quantize_with_amax
from vllm_spense.ops.linear.configs import KernelConfig
from vllm_spense.ops.linear.op import linear
from vllm_spense.ops.linear.reference import OUT_DTYPES
from vllm_spense.ops.linear.repack import block
from vllm_spense.ops.mlp.silu_mul import linear_silu_mul, paired_config

K, SPARSE, DENSE = 64, 24, 40


Arguments = tuple[torch.Tensor, torch.Tensor, LinearArguments]


def arguments(sparse: int, dense: int, with_bias: bool = False, tokens: int = 5) -> Arguments:
    seed = sparse + dense
    layer = make_layer([Layout("output", seed, K, sparse)] * 2, bias=with_bias, seed=seed)
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(seed))
    return *quantize_per_token(x), layer.arguments()


@pytest.mark.parametrize(("sparse", "dense"), [(SPARSE, DENSE), (64, 0), (0, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_equals_layer_then_activation(sparse, dense, with_bias, out_dtype) -> None:
    case = arguments(sparse, dense, with_bias)
    y, amax = linear_silu_mul(*case, out_dtype)
    gate, up = linear(*case, torch.float32).double().chunk(2, dim=1)
    expected = gate / (1 + (-gate).exp()) * up
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[out_dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=1e-4)
    assert y.dtype == out_dtype
    assert torch.equal(amax, y.float().abs().amax(1, keepdim=True))


def test_quantising_with_the_known_maximum_is_quantising() -> None:
    y, amax = linear_silu_mul(*arguments(SPARSE, DENSE), torch.bfloat16)
    for got, expected in zip(quantize_with_amax(y, amax), quantize_per_token(y), strict=True):
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_the_kernels_layout_gives_the_same_bits() -> None:
    x, x_scale, layer = arguments(SPARSE, DENSE)
    blocked = linear_silu_mul(x, x_scale, block(layer), torch.bfloat16)
    for got, expected in zip(blocked, linear_silu_mul(x, x_scale, layer, torch.bfloat16), strict=True):
        assert torch.equal(got, expected)


def test_opcheck() -> None:
    # test_schema hashes its inputs with a multiplication that torch does not have for e4m3.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x, x_scale, layer = arguments(SPARSE, DENSE)
    operator = torch.ops.spense.linear_silu_mul.default
    torch.library.opcheck(operator, (x, x_scale, *layer.flat(), torch.bfloat16), test_utils=checks)


@pytest.mark.parametrize(
    ("sparse", "dense"), [([24, 16], [40, 48]), ([24], [40]), ([24, 24], [40, 32]), ([8, 8, 8], [8, 8, 8])]
)
def test_shards_must_be_equal_pairs(sparse: list[int], dense: list[int]) -> None:
    x, x_scale, layer = arguments(SPARSE, DENSE)
    unlike = layer._replace(sparse_sizes=sparse, dense_sizes=dense)
    with pytest.raises(ValueError, match="gate and up must have equal regions"):
        linear_silu_mul(x, x_scale, unlike, torch.bfloat16)


def test_an_input_split_has_no_pairs() -> None:
    x, x_scale, layer = arguments(SPARSE, DENSE)
    with pytest.raises(ValueError, match="gate and up must have equal regions"):
        linear_silu_mul(x, x_scale, layer._replace(output_split=False), torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 8, 40, 64, 65, 128, 1000, 32768])
def test_a_compiled_pair_is_chosen(tokens: int) -> None:
    spec = LinearSpec("output", 51200, 5120, (12800, 12800), (12800, 12800))
    config = paired_config(spec, tokens, 132)
    compiled = {KernelConfig("sm90", 128, t, c) for t in (8, 16, 32, 64) for c in (1, 2, 4, 8)}
    compiled |= {KernelConfig("sm90", 128, 128, c, True) for c in (1, 2, 4)}
    assert config in compiled
