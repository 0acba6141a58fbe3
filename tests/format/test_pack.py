"""One linear layer <-> its checkpoint tensors."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.format import Layout, pack_linear, unpack_linear
from vllm_spense.format.fp8 import FP8_DTYPE, quantize_per_channel
from vllm_spense.format.layout import Split
from vllm_spense.format.sparse24 import magnitude_mask

N, K = 24, 48
LAYOUTS = [
    Layout(split, N, K, sparse)
    for split, sparse in (
        ("output", 8),
        ("output", 0),
        ("output", N),
        ("input", 16),
        ("input", 0),
        ("input", K),
    )
]


def pruned(layout: Layout, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    rows, cols = layout.sparse_shape
    if layout.sparse:
        weight[:rows, :cols] *= magnitude_mask(weight[:rows, :cols].abs())
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [FP8_DTYPE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_round_trip(layout: Layout, dtype: torch.dtype) -> None:
    weight, bias = pruned(layout), torch.randn(N).to(torch.bfloat16)
    tensors = pack_linear(weight, layout, weight_dtype=dtype, bias=bias)
    scale = {"weight_scale"} if dtype == FP8_DTYPE else set()
    assert set(tensors) == {*layout.regions(), "bias"} | scale
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == layout.shape(name), name  # type: ignore[arg-type]
        assert tensor.is_contiguous()
    stored = quantize_per_channel(weight)[0] if dtype == FP8_DTYPE else weight.to(dtype) + 0.0
    bits = torch.uint8 if dtype == FP8_DTYPE else torch.int16
    assert torch.equal(unpack_linear(tensors, layout).view(bits), stored.view(bits))
    assert torch.equal(tensors["bias"], bias)


@pytest.mark.parametrize("split", ["output", "input"])
def test_one_scale_covers_both_regions(split: Split) -> None:
    """The scale of a row of an input split is that of the whole row, whatever region its maximum is in."""
    layout = Layout(split, N, K, 16)
    weight = pruned(layout)
    weight[:, -4:] = torch.tensor([0.0, 0.0, 0.0, 100.0])
    scale = pack_linear(weight, layout)["weight_scale"]
    assert torch.equal(scale, quantize_per_channel(weight)[1])
    assert (scale >= 100 / 448).all()


@pytest.mark.parametrize("dtype", [FP8_DTYPE, torch.bfloat16], ids=str)
def test_no_negative_zero_reaches_the_file(dtype: torch.dtype) -> None:
    layout = Layout("input", 4, 16, 8)
    weight = torch.full((4, 16), -0.0)
    weight[:, 0] = 1.0
    tensors = pack_linear(weight, layout, weight_dtype=dtype)
    for name in ("sparse_values", "dense_weight"):
        assert not torch.signbit(tensors[name].float()).any(), name


def test_bfloat16_has_no_scale_and_rounds_once() -> None:
    layout = Layout("input", N, K, 16)
    weight = pruned(layout)
    tensors = pack_linear(weight, layout, weight_dtype=torch.bfloat16)
    assert torch.equal(unpack_linear(tensors, layout), weight.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [FP8_DTYPE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(N, K)
    weight[5, 40] = bad
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        pack_linear(weight, Layout("output", N, K, 8), weight_dtype=dtype)


def test_overflow_into_bfloat16_is_refused() -> None:
    """Finite in fp32, infinite once rounded to bf16."""
    weight = torch.zeros(N, K)
    weight[5, 40] = torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        pack_linear(weight, Layout("output", N, K, 8), weight_dtype=torch.bfloat16)


def test_wrong_shape_and_unpruned_weights_are_refused() -> None:
    layout = Layout("output", N, K, 8)
    with pytest.raises(ValueError, match=r"weight \(24, 40\) does not fit Layout\(split='output'"):
        pack_linear(torch.zeros(N, 40), layout)
    with pytest.raises(ValueError, match="row 0 has a group of 4 with more than two non-zeros"):
        pack_linear(torch.ones(N, K), layout)
