"""Per-token FP8 activations against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.format.codecs.fp8 import FP8_DTYPE, FP8_MAX
from vllm_spense.ops.quantize import MIN_SCALE, quantize_per_token

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RELATIVE = 2.0**-4  # half a step of 3 mantissa bits
SUBNORMAL = 2.0**-10  # half the smallest e4m3 step, in units of the scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (7, 144), (33, 576)])
def test_against_a_loop(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[0])[:, None]).to(dtype)
    q, scale = quantize_per_token(x)
    assert (q.dtype, scale.dtype) == (FP8_DTYPE, torch.float32)
    assert (q.shape, scale.shape) == (x.shape, (shape[0], 1))
    for token in range(shape[0]):
        values = x[token].float()
        expected = max(abs(v) for v in values.tolist()) / FP8_MAX
        assert scale[token].item() == pytest.approx(max(expected, MIN_SCALE), rel=1e-6)
        expected_q = torch.stack([(v / scale[token, 0]).to(FP8_DTYPE) for v in values])
        assert torch.equal(q[token].view(torch.uint8), expected_q.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bound(dtype: torch.dtype) -> None:
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(1)).to(dtype)
    q, scale = quantize_per_token(x)
    error = (q.float() * scale - x.float()).abs()
    assert (error <= torch.maximum(x.float().abs() * RELATIVE, scale * SUBNORMAL) * (1 + 1e-6)).all()


def test_a_zero_token_gives_zeros_and_a_positive_scale() -> None:
    x = torch.zeros(3, 16)
    x[1, 4] = 2.0
    q, scale = quantize_per_token(x)
    assert scale.flatten().tolist() == [
        pytest.approx(MIN_SCALE),
        pytest.approx(2 / FP8_MAX),
        pytest.approx(MIN_SCALE),
    ]
    assert q.float().count_nonzero() == 1
    assert torch.isfinite(q.float()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_becomes_448_exactly(dtype: torch.dtype, sign: int) -> None:
    """Rounding of absmax / 448 may push the quotient above 448; it saturates, never becomes NaN (0x7F)."""
    largest = torch.linspace(0.01, 60000, 4000).to(dtype)
    x = torch.stack([sign * largest, largest / 3], 1)
    q, _ = quantize_per_token(x)
    assert (q[:, 0].float() == sign * FP8_MAX).all()


def test_tiny_tokens_keep_the_least_scale() -> None:
    q, scale = quantize_per_token(torch.tensor([[1e-30, -1e-40, 0.0]]))
    assert scale.item() == pytest.approx(MIN_SCALE)
    assert q.float().tolist() == [[0.0, 0.0, 0.0]]


def test_negative_zero_stays_harmless() -> None:
    """Activations may hold -0 (byte 0x80): only stored weights must be canonical."""
    q, _ = quantize_per_token(torch.tensor([[-0.0, -1e-9, 448.0]]))
    assert q.float().abs().tolist() == [[0.0, 0.0, 448.0]]


def test_tokens_do_not_depend_on_their_batch() -> None:
    x = torch.randn(16, 144, generator=torch.Generator().manual_seed(2)).bfloat16()
    q, scale = quantize_per_token(x)
    for token in (0, 7, 15):
        alone, alone_scale = quantize_per_token(x[token : token + 1])
        assert torch.equal(alone.view(torch.uint8), q[token : token + 1].view(torch.uint8))
        assert torch.equal(alone_scale, scale[token : token + 1])


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    q, scale = quantize_per_token(torch.zeros(shape, dtype=torch.bfloat16))
    assert q.shape == shape
    assert scale.shape == (shape[0], 1)
    assert (scale > 0).all()


def test_meta_shapes() -> None:
    q, scale = quantize_per_token(torch.empty(5, 24, dtype=torch.bfloat16, device="meta"))
    assert (q.shape, q.dtype) == ((5, 24), FP8_DTYPE)
    assert (scale.shape, scale.dtype) == ((5, 1), torch.float32)
