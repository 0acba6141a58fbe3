"""Extents of the two regions and the tensor-parallel rule: S and D are cut separately."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.format.layout import Axis, Layout, Split

SPLITS: tuple[Split, ...] = ("output", "input")
AXES: tuple[Axis, ...] = ("output", "input")


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("split", SPLITS)
def test_concatenated_slices_reassemble_each_stored_tensor(split: Split, axis: Axis, size: int) -> None:
    """A region's tensor with a column for eight inputs, and one with something per row of the layer."""
    layout = Layout(split, 8 * size, 32 * size, {"output": 3, "input": 16}[split] * size)
    for rows, columns in (layout.sparse_shape, layout.dense_shape):
        tensor = torch.arange(rows * columns // 8).reshape(rows, columns // 8)
        parts = [layout.cut_region(tensor, axis, rank, size) for rank in range(size)]
        assert torch.equal(torch.cat(parts, 0 if axis == "output" else 1), tensor)
    tensor = torch.arange(layout.out_features)
    parts = [layout.cut_rows(tensor, axis, rank, size) for rank in range(size)]
    if axis == "input":
        assert all(torch.equal(part, tensor) for part in parts)
    elif split == "input":
        assert torch.equal(torch.cat(parts), tensor)
    else:
        cut = [part.split([layout.sparse // size, layout.dense // size]) for part in parts]
        assert torch.equal(torch.cat([s for s, _ in cut] + [d for _, d in cut]), tensor)


@pytest.mark.parametrize(
    ("layout", "axis", "size", "message"),
    [
        (Layout("output", 20, 16, 6), "output", 4, "6 2:4 output features cannot be cut into 4"),
        (Layout("output", 20, 16, 8), "output", 8, "12 dense output features cannot be cut into 8"),
        (Layout("output", 20, 16, 8), "input", 3, "16 input features cannot be cut into 3"),
        (Layout("output", 20, 24, 8), "input", 2, "12 input features, which is no multiple of 8"),
        (Layout("input", 20, 40, 24), "input", 16, "24 2:4 input features cannot be cut into 16"),
        (Layout("input", 20, 29, 24), "input", 3, "5 dense input features cannot be cut into 3"),
        (Layout("input", 20, 40, 24), "input", 2, "12 input features, which is no multiple of 8"),
        (Layout("input", 20, 40, 24), "output", 3, "20 output features cannot be cut into 3"),
        (Layout("output", 6, 16, 0), "output", 4, "6 dense output features cannot be cut into 4"),
    ],
)
def test_refused_sizes(layout: Layout, axis: Axis, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.shard(axis, size)
    assert not layout.shardable(axis, size)


def test_a_sum_that_divides_is_not_enough() -> None:
    """16 = 6 + 10 rows divide by 4, but neither region does: a plain slice would mix S and D."""
    assert not Layout("output", 16, 8, 6).shardable("output", 4)
    assert Layout("output", 16, 8, 6).shardable("output", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rows", 8, 8, 0), "split must be 'output' or 'input', not 'rows'"),
        (("output", 0, 8, 0), r"shape \[0, 8\] must be positive"),
        (("output", 8, -8, 0), r"shape \[8, -8\] must be positive"),
        (("output", 8, 8, 9), r"sparse extent 9 must lie in 0\.\.8"),
        (("input", 8, 16, -8), r"sparse extent -8 must lie in 0\.\.16"),
        (("input", 8, 16, 4), "4 input features, which is no multiple of 8"),
        (("output", 8, 12, 4), "12 input features, which is no multiple of 8"),
    ],
)
def test_contradictory_extents(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(*arguments)


def test_odd_input_features_are_fine_without_a_sparse_region() -> None:
    assert Layout("output", 5, 7, 0).dense_shape == (5, 7)
    assert Layout("input", 5, 11, 8).dense_shape == (5, 3)
