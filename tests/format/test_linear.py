"""One linear layer <-> its checkpoint tensors: every registered codec, and every pair of two."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.tiny import unpacked
from vllm_spense.format import Codecs, Layout, LinearFormat, pack_linear
from vllm_spense.format.codecs import RowCodec, codec, codec_names
from vllm_spense.format.codecs.fp8 import quantize_per_channel
from vllm_spense.format.layout import Axis, Split
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


def pruned(layout: Layout) -> torch.Tensor:
    shape = layout.out_features, layout.in_features
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    rows, cols = layout.sparse_shape
    if layout.sparse:
        weight[:rows, :cols] *= magnitude_mask(weight[:rows, :cols].abs())
    return weight


CODECS = [Codecs.of(name) for name in codec_names()]
PAIRS = [Codecs(codec(a), codec(b)) for a, b in itertools.permutations(codec_names(), 2)]
every_codec = pytest.mark.parametrize("codecs", CODECS, ids=lambda c: c.name)
every_pair = pytest.mark.parametrize("codecs", [*CODECS, *PAIRS], ids=lambda c: c.name)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@every_pair
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_round_trip(layout: Layout, codecs: Codecs) -> None:
    weight, bias = pruned(layout), torch.randn(N).to(torch.bfloat16)
    linear = LinearFormat(layout, codecs, bias=True)
    tensors = linear.encode(weight, bias)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {n: s.shape for n, s in linear.held().items()}
    for name, tensor in tensors.items():
        assert tensor.is_contiguous()
        assert tensor.dtype in linear.tensors()[name].dtypes
        assert linear.illegal(name, tensor) is None
    assert torch.equal(tensors["bias"], bias)
    decoded = linear.decode(tensors)
    assert decoded.dtype == torch.float32
    assert not decoded[weight == 0].any(), "zeros are exact"
    few = min(c.bits for c in (codecs.sparse, codecs.dense))
    worst = (decoded - weight).abs() / weight.abs().amax(1, keepdim=True)
    assert worst.max() <= 2 ** (-few / 2)
    again = linear.encode(decoded, bias)
    assert all(torch.equal(bits(again[name]), bits(tensor)) for name, tensor in tensors.items())
    assert linear.nbytes() == sum(t.nbytes for name, t in tensors.items() if name != "bias")


@every_codec
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_spelled_out_it_is_a_dense_layer_with_the_same_values(layout: Layout, codecs: Codecs) -> None:
    granule = getattr(codecs.dense, "block", codecs.dense.granule)  # no block lies in both regions
    sparse = layout.sparse * (granule if layout.split == "input" else 1)
    layout = Layout(layout.split, N, K * granule, sparse)
    linear = LinearFormat(layout, codecs)
    tensors = linear.encode(pruned(layout))
    dense = LinearFormat(layout.without_sparsity, codecs)
    spelled = linear.spelled_out(tensors)
    assert set(spelled) == set(dense.held())
    assert torch.equal(dense.decode(spelled), linear.decode(tensors))


def test_what_two_codecs_store_has_no_dense_layer() -> None:
    linear = LinearFormat(LAYOUTS[0], PAIRS[0])
    with pytest.raises(ValueError, match="have no dense layer with the same values"):
        linear.spelled_out(linear.encode(pruned(LAYOUTS[0])))


def cuttable(split: Split, axis: Axis, size: int, granule: int = 1) -> Layout:
    """A layout with unequal regions of which both can be cut into ``size`` parts along ``axis``."""
    columns = 16 * granule
    if split == "output":
        return Layout("output", 5 * size, columns * size if axis == "input" else columns + 8, 2 * size)
    rows = 3 * size if axis == "output" else 7
    return Layout("input", rows, columns * size + (3 * granule * size), columns * size)


@every_pair
@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("split", ["output", "input"])
def test_every_rank_has_its_share_of_both_regions(
    split: Split, axis: Axis, size: int, codecs: Codecs
) -> None:
    """A rank's tensors are those of a layer of its own, and hold its share of S and of D."""
    layout = cuttable(split, axis, size, max(codecs.sparse.granule, codecs.dense.granule))
    linear = LinearFormat(layout, codecs, bias=True)
    weight = pruned(layout)
    tensors = linear.encode(weight, torch.randn(layout.out_features))
    whole = linear.decode(tensors)
    local = linear.shard(axis, size)
    seen: list[int] = []
    for rank in range(size):
        mine = {name: linear.cut(name, tensor, axis, rank, size) for name, tensor in tensors.items()}
        assert {n: tuple(t.shape) for n, t in mine.items()} == {n: s.shape for n, s in local.held().items()}
        extents = [layout.sparse, layout.dense]
        if axis != split:
            extents = [layout.out_features if axis == "output" else layout.in_features]
        indices, start = [], 0
        for extent in extents:
            step = extent // size
            indices += range(start + rank * step, start + (rank + 1) * step)
            start += extent
        seen += indices
        expected = whole[indices] if axis == "output" else whole[:, indices]
        assert torch.equal(local.decode(mine), expected)
        assert torch.equal(mine["bias"], tensors["bias"][indices] if axis == "output" else tensors["bias"])
    assert sorted(seen) == list(range(len(seen))), "the ranks cover everything exactly once"


@every_pair
@pytest.mark.parametrize("split", ["output", "input"])
@pytest.mark.parametrize("empty", ["sparse", "dense"])
def test_empty_regions(split: Split, empty: str, codecs: Codecs) -> None:
    columns = 4 * 2 * max(4, codecs.sparse.granule, codecs.dense.granule)
    layout = Layout(split, 16, columns, 0 if empty == "sparse" else 16 if split == "output" else columns)
    linear = LinearFormat(layout, codecs)
    gone = {name for name, stored in linear.tensors().items() if not stored.held}
    assert gone == {name for name in linear.tensors() if name.startswith(f"{empty}_")}
    assert gone >= ({"sparse_values", "sparse_meta"} if empty == "sparse" else {"dense_weight"})
    tensors = linear.encode(pruned(layout))
    parts = []
    for rank in range(2):
        mine = {n: linear.cut(n, t, split, rank, 2) for n, t in tensors.items()}
        parts.append(linear.shard(split, 2).decode(mine))
    assert torch.equal(torch.cat(parts, layout.split_dim), linear.decode(tensors))


def test_a_single_rank_gets_the_tensor_itself() -> None:
    linear = LinearFormat(Layout("output", 8, 16, 4))
    tensor = torch.zeros(4, 8)
    assert linear.cut("sparse_values", tensor, "output", 0, 1) is tensor


class Blocks(RowCodec):
    """Values that cannot be parted within blocks of 32: what a codec with a scale per block needs."""

    name = title = "blocks"
    dtype, bits, granule = torch.bfloat16, 16, 32
    quantize, illegal_values = codec("bf16").quantize, codec("bf16").illegal_values  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (Layout("input", 8, 256, 128), None),
        (Layout("input", 8, 192, 64), "16 2:4 values per row, and codec blocks parts them by 32"),
        (Layout("input", 8, 160, 128), "16 dense values per row, and codec blocks parts them by 32"),
        (Layout("output", 8, 64, 4), "16 2:4 values per row"),
    ],
)
def test_no_cut_through_a_granule(layout: Layout, problem: str | None) -> None:
    linear = LinearFormat(layout, Codecs(Blocks(), Blocks()))
    assert linear.shardable("output", 2), "rows are whole"
    assert linear.shardable("input", 2) == (problem is None)
    if problem is not None:
        with pytest.raises(ValueError, match=problem):
            linear.shard("input", 2)


@pytest.mark.parametrize("split", ["output", "input"])
def test_one_scale_covers_both_regions(split: Split) -> None:
    """The scale of a row of an input split is that of the whole row, whatever region its maximum is in."""
    layout = Layout(split, N, K, 16)
    weight = pruned(layout)
    weight[:, -4:] = torch.tensor([0.0, 0.0, 0.0, 100.0])
    scale = pack_linear(weight, layout)["weight_scale"]
    assert torch.equal(scale, quantize_per_channel(weight)[1])
    assert (scale >= 100 / 448).all()


@every_codec
def test_no_negative_zero_reaches_the_file(codecs: Codecs) -> None:
    layout = Layout("input", 4, 16, 8)
    weight = torch.full((4, 16), -0.0)
    weight[:, 0] = 1.0
    tensors = LinearFormat(layout, codecs).encode(weight)
    for name in ("sparse_values", "dense_weight"):
        assert not torch.signbit(tensors[name].float()).any(), name


def test_bfloat16_has_no_scale_and_rounds_once() -> None:
    layout = Layout("input", N, K, 16)
    weight = pruned(layout)
    tensors = pack_linear(weight, layout, codec="bf16")
    assert "weight_scale" not in tensors
    assert torch.equal(unpacked(tensors, layout, "bf16"), weight.to(torch.bfloat16))


def test_fp8_has_the_values_and_scales_of_its_rounding() -> None:
    for layout in LAYOUTS:
        weight = pruned(layout)
        tensors = pack_linear(weight, layout)
        values, scale = quantize_per_channel(weight)
        assert torch.equal(bits(unpacked(tensors, layout)), bits(values))
        assert torch.equal(tensors["weight_scale"], scale)


@every_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad: float, codecs: Codecs) -> None:
    weight = torch.zeros(N, K)
    weight[5, 40] = bad
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        LinearFormat(Layout("output", N, K, 8), codecs).encode(weight)


def test_overflow_into_bfloat16_is_refused() -> None:
    """Finite in fp32, infinite once rounded to bf16."""
    weight = torch.zeros(N, K)
    weight[5, 40] = torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        pack_linear(weight, Layout("output", N, K, 8), codec="bf16")


def test_wrong_shape_and_unpruned_weights_are_refused() -> None:
    layout = Layout("output", N, K, 8)
    with pytest.raises(ValueError, match=r"weight \(24, 40\) does not fit Layout\(split='output'"):
        pack_linear(torch.zeros(N, 40), layout)
    with pytest.raises(ValueError, match="row 0 has a group of 4 with more than two non-zeros"):
        pack_linear(torch.ones(N, K), layout)
