"""gate_up with SiLU·mul fused: against layer, activation and quantisation one after another."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.format import FP8_DTYPE, Layout
from vllm_spense.ops import LinearSpec, linear, prune_and_pack, quantize_per_token
from vllm_spense.ops.kernel_config import KernelConfig
from vllm_spense.ops.linear import OUT_DTYPES
from vllm_spense.ops.quantize import quantize_with_amax
from vllm_spense.ops.repack import block_metadata, pad_pitch
from vllm_spense.ops.silu_mul import linear_silu_mul, paired_config

K, SPARSE, DENSE = 64, 24, 40


def arguments(sparse: int, dense: int, with_bias: bool = False, tokens: int = 5) -> list:
    torch.manual_seed(sparse + dense)
    size = sparse + dense
    packs = [prune_and_pack(torch.randn(size, K), Layout("output", size, K, sparse)) for _ in range(2)]
    empty = {
        "sparse_values": torch.empty(0, K // 2, dtype=FP8_DTYPE),
        "sparse_meta": torch.empty(0, K // 8, dtype=torch.uint8),
        "dense_weight": torch.empty(0, K, dtype=FP8_DTYPE),
    }
    weights = []
    for name, nothing in empty.items():
        parts = [p.get(name, nothing).view(torch.uint8) for p in packs]
        weights.append(torch.cat(parts).view(nothing.dtype))
    scale = torch.cat([p["weight_scale"] for p in packs])
    bias = torch.randn(2 * size) if with_bias else None
    x, x_scale = quantize_per_token(torch.randn(tokens, K))
    return [x, x_scale, *weights, scale, bias, [sparse] * 2, [dense] * 2]


@pytest.mark.parametrize(("sparse", "dense"), [(SPARSE, DENSE), (64, 0), (0, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_equals_layer_then_activation(sparse, dense, with_bias, out_dtype) -> None:
    case = arguments(sparse, dense, with_bias)
    y, amax = linear_silu_mul(*case, out_dtype)
    gate, up = linear(*case, True, torch.float32).double().chunk(2, dim=1)
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
    case = arguments(SPARSE, DENSE)
    blocked = [*case[:2], pad_pitch(case[2]), block_metadata(case[3]), pad_pitch(case[4]), *case[5:]]
    for got, expected in zip(
        linear_silu_mul(*blocked, torch.bfloat16), linear_silu_mul(*case, torch.bfloat16), strict=True
    ):
        assert torch.equal(got, expected)


def test_opcheck() -> None:
    # test_schema hashes its inputs with a multiplication that torch does not have for e4m3.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(linear_silu_mul, (*arguments(SPARSE, DENSE), torch.bfloat16), test_utils=checks)


@pytest.mark.parametrize(
    ("sparse", "dense"), [([24, 16], [40, 48]), ([24], [40]), ([24, 24], [40, 32]), ([8, 8, 8], [8, 8, 8])]
)
def test_shards_must_be_equal_pairs(sparse: list[int], dense: list[int]) -> None:
    case = arguments(SPARSE, DENSE)
    with pytest.raises(ValueError, match="gate and up must have equal regions"):
        linear_silu_mul(*case[:7], sparse, dense, torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 8, 40, 64, 65, 128, 1000, 32768])
def test_a_compiled_pair_is_chosen(tokens: int) -> None:
    spec = LinearSpec("output", 51200, 5120, (12800, 12800), (12800, 12800), FP8_DTYPE)
    config = paired_config(spec, tokens, 132)
    compiled = {KernelConfig("sm90", 128, t, c) for t in (8, 16, 32, 64) for c in (1, 2, 4, 8)}
    compiled |= {KernelConfig("sm90", 128, 128, c, True) for c in (1, 2, 4)}
    assert config in compiled
