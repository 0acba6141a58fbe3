"""Extents of the two regions and the tensor-parallel rule: S and D are cut separately."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from vllm_spense.format.layout import TENSOR_NAMES, Axis, Layout, Split
from vllm_spense.format.online import prune_and_pack
from vllm_spense.format.pack import unpack_linear

SPLITS: tuple[Split, ...] = ("output", "input")
AXES: tuple[Axis, ...] = ("output", "input")


def packed(layout: Layout, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The stored matrix of a random layer and its tensors, bias included."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(layout.out_features, layout.in_features, generator=generator)
    tensors = prune_and_pack(weight, layout)
    tensors["bias"] = torch.randn(layout.out_features, generator=generator)
    return unpack_linear(tensors, layout), tensors


def owned(extents: Iterable[tuple[int, int]], rank: int, size: int) -> list[int]:
    """Indices of one rank, by the definition: its share of every (start, extent), one after another."""
    indices: list[int] = []
    for start, extent in extents:
        step = extent // size
        indices += range(start + rank * step, start + (rank + 1) * step)
    return indices


def cuttable(split: Split, axis: Axis, size: int) -> Layout:
    """A layout with unequal regions of which both can be cut into ``size`` parts along ``axis``."""
    if split == "output":
        return Layout("output", 5 * size, 16 * size if axis == "input" else 24, 2 * size)
    return Layout("input", 3 * size if axis == "output" else 7, 16 * size + 3 * size, 16 * size)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("split", SPLITS)
def test_every_rank_owns_its_share_of_both_regions(split: Split, axis: Axis, size: int) -> None:
    layout = cuttable(split, axis, size)
    matrix, tensors = packed(layout)
    regions = [(0, layout.sparse), (layout.sparse, layout.dense)]
    whole = [(0, layout.out_features if axis == "output" else layout.in_features)]
    local = layout.shard(axis, size)
    seen: list[int] = []
    for rank in range(size):
        mine = {n: layout.slice_tensor(n, t, axis, rank, size) for n, t in tensors.items()}
        for name in mine:
            assert tuple(mine[name].shape) == local.shape(name), name
        indices = owned(regions if axis == split else whole, rank, size)
        seen += indices
        expected = matrix.view(torch.uint8)
        expected = expected[indices] if axis == "output" else expected[:, indices]
        assert torch.equal(unpack_linear(mine, local).view(torch.uint8), expected)
        for name in ("weight_scale", "bias"):
            vector = tensors[name][indices] if axis == "output" else tensors[name]
            assert torch.equal(mine[name], vector), name
    assert sorted(seen) == list(range(whole[0][1])), "the ranks cover everything exactly once"


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("split", SPLITS)
def test_concatenated_slices_reassemble_each_stored_tensor(split: Split, axis: Axis) -> None:
    size = 4
    layout = cuttable(split, axis, size)
    for name in TENSOR_NAMES:
        shape = layout.shape(name)
        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
        parts = [layout.slice_tensor(name, tensor, axis, rank, size) for rank in range(size)]
        vector = name in ("weight_scale", "bias")
        if vector and axis == "input":
            assert all(torch.equal(part, tensor) for part in parts)
        elif vector and split == "output":
            cut = [part.split([layout.sparse // size, layout.dense // size]) for part in parts]
            assert torch.equal(torch.cat([s for s, _ in cut] + [d for _, d in cut]), tensor)
        else:
            assert torch.equal(torch.cat(parts, 0 if axis == "output" else 1), tensor)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("empty", ["sparse", "dense"])
def test_empty_regions(split: Split, empty: str) -> None:
    layout = Layout(split, 16, 32, {"sparse": 0, "dense": 16 if split == "output" else 32}[empty])
    expected = ("dense_weight",) if empty == "sparse" else ("sparse_values", "sparse_meta")
    assert layout.regions() == expected
    assert all(layout.shape(name) for name in TENSOR_NAMES)
    gone = ("sparse_values", "sparse_meta") if empty == "sparse" else ("dense_weight",)
    assert all(torch.Size(layout.shape(name)).numel() == 0 for name in gone)
    assert layout.shard(split, 2).regions() == expected
    matrix, tensors = packed(layout)
    parts = []
    for rank in range(2):
        mine = {n: layout.slice_tensor(n, t, split, rank, 2) for n, t in tensors.items()}
        parts.append(unpack_linear(mine, layout.shard(split, 2)).view(torch.uint8))
    assert torch.equal(torch.cat(parts, 0 if split == "output" else 1), matrix.view(torch.uint8))


def test_a_single_rank_gets_the_tensor_itself() -> None:
    layout = Layout("output", 8, 16, 4)
    tensor = torch.zeros(layout.shape("sparse_values"))
    assert layout.slice_tensor("sparse_values", tensor, "output", 0, 1) is tensor


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
    assert Layout("output", 5, 7, 0).shape("dense_weight") == (5, 7)
    assert Layout("input", 5, 11, 8).dense_shape == (5, 3)
