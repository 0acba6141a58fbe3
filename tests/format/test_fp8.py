"""FP8 weights with one scale per row, against a loop over rows and over all e4m3 numbers."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.format.codecs import scales
from vllm_spense.format.codecs.base import dequantize
from vllm_spense.format.codecs.fp8 import FP8_DTYPE, FP8_MAX, TOP_CODES, quantize_per_channel

E4M3 = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).double()
RELATIVE = 2.0**-4  # half a step of 3 mantissa bits
SUBNORMAL = 2.0**-10  # half the smallest e4m3 step, in units of the scale


def nearest_e4m3(value: float) -> set[float]:
    """The closest e4m3 numbers to a value (two of them at a tie)."""
    finite = E4M3[torch.isfinite(E4M3)]
    distance = (finite - value).abs()
    return {abs(x) for x in finite[distance == distance.min()].tolist()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_against_a_loop(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 24, generator=generator) * torch.logspace(-3, 3, 9)[:, None]
    weight = weight.to(dtype)
    q, scale = quantize_per_channel(weight)
    assert q.dtype == FP8_DTYPE
    assert scale.dtype == torch.float32
    assert scale.shape == (9,)
    for row in range(9):
        values = weight[row].float().tolist()
        slow = [error_with(values, code) for code in TOP_CODES]
        top = q[row].float().abs().max().item()
        assert scale[row].item() == pytest.approx(max(map(abs, values)) / top, rel=1e-6)
        assert slow[TOP_CODES.index(top)] <= min(slow) * (1 + 1e-5)
        for value, stored in zip(values, q[row].float().tolist(), strict=True):
            assert abs(stored) in nearest_e4m3(value / scale[row].item())
            assert stored == 0 or (stored > 0) == (value > 0)


def error_with(values: list[float], code: float) -> float:
    """Squared error of a row whose largest magnitude is stored as ``code``."""
    scale = max(map(abs, values)) / code
    return sum((min(nearest_e4m3(abs(v) / scale)) * scale - abs(v)) ** 2 for v in values)


def test_the_largest_weight_is_exact() -> None:
    weight = torch.tensor([[0.1, -3.7, 0.0], [5e-4, 1e-4, 2e-4]])
    q, scale = quantize_per_channel(weight)
    assert set(q.float().abs().amax(1).tolist()) <= set(TOP_CODES)
    assert torch.allclose(dequantize(q, scale).abs().amax(1), weight.abs().amax(1), rtol=1e-6)


def test_rounding_again_changes_nothing() -> None:
    rounded = dequantize(
        *quantize_per_channel(torch.randn(64, 96, generator=torch.Generator().manual_seed(2)))
    )
    assert torch.equal(dequantize(*quantize_per_channel(rounded)), rounded)


def test_less_error_than_always_448() -> None:
    weight = torch.randn(32, 576, generator=torch.Generator().manual_seed(3))
    scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
    plain = (weight / scale).to(FP8_DTYPE).float() * scale
    chosen = dequantize(*quantize_per_channel(weight))
    assert (chosen - weight).square().sum() < 0.95 * (plain - weight).square().sum()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(4))
    whole = quantize_per_channel(weight)
    monkeypatch.setattr(scales, "_CHUNK", 5 * 64)
    parts = quantize_per_channel(weight)
    assert torch.equal(parts[1], whole[1])
    assert torch.equal(parts[0].view(torch.uint8), whole[0].view(torch.uint8))


def test_error_bound() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 576, generator=generator)
    q, scale = quantize_per_channel(weight)
    error = (dequantize(q, scale) - weight).abs()
    bound = torch.maximum(weight.abs() * RELATIVE, scale[:, None] * SUBNORMAL)
    assert (error <= bound * (1 + 1e-6)).all()


def test_zero_rows_get_scale_one() -> None:
    q, scale = quantize_per_channel(torch.tensor([[0.0, -0.0], [1.0, 2.0]]))
    assert scale[0].item() == 1.0
    assert q.view(torch.uint8)[0].tolist() == [0, 0]


def test_no_negative_zero_is_stored() -> None:
    """-0 itself, and negative numbers that round to it."""
    q, _ = quantize_per_channel(torch.tensor([[-0.0, -1e-9, 1e-9, 448.0]]))
    assert q.view(torch.uint8)[0, :3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    weight = torch.ones(3, 8)
    weight[1, 5] = bad
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        quantize_per_channel(weight)


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-38, 2.0**-100])
def test_denormal_rows_give_finite_values_and_a_positive_scale(tiny: float) -> None:
    q, scale = quantize_per_channel(torch.tensor([[tiny, 0.0, -tiny, tiny]]))
    assert scale.item() > 0
    assert torch.isfinite(q.float()).all()
    assert torch.isfinite(dequantize(q, scale)).all()


def test_largest_float_does_not_overflow() -> None:
    weight = torch.tensor([[torch.finfo(torch.float32).max, 1.0]])
    q, scale = quantize_per_channel(weight)
    assert torch.isfinite(q.float()).all()
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    q, scale = quantize_per_channel(torch.zeros(shape))
    assert q.shape == shape
    assert scale.tolist() == [1.0] * shape[0]


def test_quantising_stored_values_again_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    q, scale = quantize_per_channel(torch.randn(16, 64, generator=generator))
    again, scale_again = quantize_per_channel(q.float())
    assert torch.equal(q.view(torch.uint8), again.view(torch.uint8))
    assert scale_again.tolist() == [1.0] * 16
    assert torch.equal(dequantize(q, scale), q.float() * scale[:, None])
    assert torch.equal(dequantize(q, None), q.float())
