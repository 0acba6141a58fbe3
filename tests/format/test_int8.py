"""INT8 weights with one scale per row, against a loop over rows and codes."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.format.codecs import INT8, scales
from vllm_spense.format.codecs.base import dequantize
from vllm_spense.format.codecs.int8 import INT8_MAX, TOP_CODES

ALL = range(-INT8_MAX, INT8_MAX + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_against_a_loop(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 24, generator=generator) * torch.logspace(-3, 3, 9)[:, None]
    weight = weight.to(dtype)
    q, scale = INT8.quantize(weight)
    assert (q.dtype, q.shape) == (torch.int8, (9, 24))
    assert (scale.dtype, scale.shape) == (torch.float32, (9,))
    for row in range(9):
        values = weight[row].float().tolist()
        errors = [error_with(values, code) for code in TOP_CODES]
        top = int(q[row].abs().max())
        assert scale[row].item() == pytest.approx(max(map(abs, values)) / top, rel=1e-6)
        assert errors[TOP_CODES.index(top)] <= min(errors) * (1 + 1e-5)
        for value, stored in zip(values, q[row].tolist(), strict=True):
            distance = abs(stored - value / scale[row].item())
            assert distance <= min(abs(code - value / scale[row].item()) for code in ALL) + 1e-5


def error_with(values: list[float], code: int) -> float:
    """Squared error of a row whose largest magnitude is stored as ``code``."""
    scale = max(map(abs, values)) / code
    return sum((round(v / scale) * scale - v) ** 2 for v in values)


def test_less_error_than_always_127() -> None:
    weight = torch.randn(64, 576, generator=torch.Generator().manual_seed(3))
    scale = weight.abs().amax(1, keepdim=True) / INT8_MAX
    plain = (weight / scale).round() * scale
    chosen = dequantize(*INT8.quantize(weight))
    assert (chosen - weight).square().sum() < 0.99 * (plain - weight).square().sum()


def test_rounding_again_changes_nothing() -> None:
    q, scale = INT8.quantize(torch.randn(64, 96, generator=torch.Generator().manual_seed(2)))
    again, scale_again = INT8.quantize(dequantize(q, scale))
    assert torch.equal(again, q)
    assert torch.equal(scale_again, scale)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(4))
    whole = INT8.quantize(weight)
    monkeypatch.setattr(scales, "_CHUNK", 5 * 64)
    for part, expected in zip(INT8.quantize(weight), whole, strict=True):
        assert torch.equal(part, expected)


def test_never_the_value_without_a_magnitude() -> None:
    """-128 is no value, whatever is rounded, and a kernel never sees one of a file."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(5))
    weight[:, 0] = -weight.abs().amax(1) * torch.linspace(1, 1.01, 64)
    q, _ = INT8.quantize(weight)
    assert int(q.min()) >= -INT8_MAX
    stored = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)[None]
    assert INT8.illegal("dense_weight", stored) == (0, "-128, whose magnitude is no int8")
    assert INT8.illegal("sparse_values", stored[:, 1:]) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    weight = torch.ones(3, 8)
    weight[1, 5] = bad
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        INT8.quantize(weight)


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-38, 2.0**-100, torch.finfo(torch.float32).max])
def test_extreme_rows_give_finite_values_and_a_positive_scale(tiny: float) -> None:
    q, scale = INT8.quantize(torch.tensor([[tiny, 0.0, -tiny, tiny]]))
    assert scale.item() > 0
    assert torch.isfinite(dequantize(q, scale)).all()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (3, 8)])
def test_nothing_and_zeros_have_scale_one(shape: tuple[int, int]) -> None:
    q, scale = INT8.quantize(torch.zeros(shape))
    assert q.shape == shape
    assert not q.any()
    assert scale.tolist() == [1.0] * shape[0]
