"""Data-free pruning at load time."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import unpacked
from vllm_spense.format import FP8_DTYPE, Layout, quantize_per_channel
from vllm_spense.format.layout import Split
from vllm_spense.ops import online_layout, prune_and_pack


@pytest.mark.parametrize(
    ("split", "shape", "ratio", "sparse"),
    [
        ("output", (1536, 576), 0.5, 768),
        ("input", (576, 1536), 0.5, 768),
        ("output", (208, 144), 0.5, 104),
        ("input", (144, 208), 0.25, 152),  # 156, down to a multiple of 8
        ("output", (30, 144), 0.5, 8),
        ("output", (6, 144), 0.5, 0),  # nothing left
        ("input", (144, 12), 0.0, 8),  # the rest of a row stays dense
        ("output", (64, 64), 0.0, 64),
        ("output", (64, 64), 1.0, 0),
        ("output", (64, 60), 0.5, 0),  # groups of 8 do not fit K
    ],
)
def test_layout(split: Split, shape: tuple[int, int], ratio: float, sparse: int) -> None:
    layout = online_layout(split, *shape, ratio)
    assert layout == Layout(split, *shape, sparse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", [Layout("output", 24, 48, 16), Layout("input", 24, 48, 16)], ids=str)
def test_keeps_the_two_largest_of_four(layout: Layout, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    stored = unpacked(prune_and_pack(weight, layout, "bf16"), layout, "bf16").float()
    assert torch.equal(weight, before), "the caller's weight is not touched"
    rows, cols = layout.sparse_shape
    for i in range(24):
        for start in range(0, 48, 4):
            group = before[i, start : start + 4].bfloat16().float().tolist()
            if i < rows and start < cols:
                magnitudes = before[i, start : start + 4].float().abs().tolist()
                kept = sorted(range(4), key=lambda j: (-magnitudes[j], j))[:2]
                group = [group[j] if j in kept else 0.0 for j in range(4)]
            assert stored[i, start : start + 4].tolist() == group


def test_ties_keep_the_earlier_positions() -> None:
    layout = Layout("output", 8, 16, 8)
    stored = unpacked(prune_and_pack(torch.ones(8, 16), layout, "bf16"), layout, "bf16")
    assert torch.equal(stored.float(), torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(8, 4))


def test_fp8_is_the_default_and_the_scale_is_that_of_the_pruned_weight() -> None:
    layout = Layout("input", 4, 16, 8)
    weight = torch.ones(4, 16)
    weight[:, 3] = 10.0
    tensors = prune_and_pack(weight, layout)
    assert tensors["dense_weight"].dtype == FP8_DTYPE
    kept = weight.clone()
    kept[:, 1:3] = 0  # of 1 1 1 10 the tie keeps the first 1
    kept[:, 6:8] = 0
    assert torch.equal(tensors["weight_scale"], quantize_per_channel(kept)[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [2, 12])
def test_nan_and_infinity_are_refused(bad: float, column: int) -> None:
    """Also in the 2:4 region, where pruning must not hide them."""
    weight = torch.ones(4, 16)
    weight[1, column] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        prune_and_pack(weight, Layout("input", 4, 16, 8))
