"""NF4 and FP4 against the slow definition."""

from __future__ import annotations

import pickle

import pytest
import torch

from vllm_spense.format import Codecs, Layout, LinearFormat
from vllm_spense.format.codecs import FP4, NF4
from vllm_spense.format.codecs.four_bit import BLOCK, FourBit
from vllm_spense.format.sparse24 import magnitude_mask

both = pytest.mark.parametrize("codec", [NF4, FP4], ids=lambda codec: codec.name)


def weight_of(layout: Layout, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(
        layout.out_features, layout.in_features, generator=torch.Generator().manual_seed(seed)
    )
    rows, columns = layout.sparse_shape
    if layout.sparse:
        weight[:rows, :columns] *= magnitude_mask(weight[:rows, :columns].abs())
    return weight


def slow_row(codec: FourBit, packed: list[int], absmax: list[float], count: int) -> list[float]:
    """One row of codes, in plain Python: the first of two codes is in the high half of its byte."""
    codes = [half for byte in packed for half in (byte >> 4, byte & 15)]
    return [codec.table[code] * absmax[i // BLOCK] for i, code in enumerate(codes[:count])]


@both
@pytest.mark.parametrize("columns", [8, 64, 72, 200])
def test_decoding_is_the_definition(codec: FourBit, columns: int) -> None:
    layout = Layout("output", 3, columns, 0)
    tensors = codec.encode(weight_of(layout), layout)
    decoded = codec.decode(tensors, layout)
    for row in range(3):
        scale = float(tensors["weight_scale"][row])
        absmax = [(int(step) + 1) * scale for step in tensors["dense_absmax"][row]]
        expected = slow_row(codec, tensors["dense_weight"][row].tolist(), absmax, columns)
        torch.testing.assert_close(decoded[row], torch.tensor(expected), rtol=1e-6, atol=0)


@both
def test_every_weight_becomes_the_nearest_of_its_block(codec: FourBit) -> None:
    """No other code of the same block is nearer; and a block's best absmax is no worse than its largest."""
    layout = Layout("output", 16, 256, 0)
    weight = weight_of(layout)
    tensors = codec.encode(weight, layout)
    decoded = codec.decode(tensors, layout)
    absmax = (tensors["dense_absmax"].float() + 1) * tensors["weight_scale"][:, None]
    table = torch.tensor(codec.table)
    choices = absmax.repeat_interleave(BLOCK, 1)[..., None] * table
    nearest = (choices - weight[..., None]).abs().amin(2)
    torch.testing.assert_close((decoded - weight).abs(), nearest)
    largest = weight.view(16, -1, BLOCK).abs().amax(2).repeat_interleave(BLOCK, 1)
    plain = ((largest[..., None] * table - weight[..., None]).abs().amin(2)).square().sum()
    assert (decoded - weight).square().sum() < plain


@both
@pytest.mark.parametrize(
    "layout",
    [Layout("output", 8, 136, 4), Layout("output", 8, 136, 8), Layout("input", 8, 336, 192)],
    ids=str,
)
def test_blocks_are_of_what_is_stored(codec: FourBit, layout: Layout) -> None:
    """64 kept weights of a 2:4 region are 128 columns; its zeros are exact, positions are those of 2:4."""
    weight = weight_of(layout)
    tensors = codec.encode(weight, layout)
    rows, columns = layout.sparse_shape
    assert tensors["sparse_values"].shape == (rows, columns // 4)
    assert tensors["sparse_absmax"].shape == (rows, -(-columns // 128))
    decoded = codec.decode(tensors, layout)
    assert not decoded[weight == 0].any()
    kept = (weight[:rows, :columns] != 0).nonzero()
    row, column = kept[5].tolist()
    changed = tensors["sparse_absmax"].clone()
    changed[row, column // 128] = 0
    again = codec.decode(tensors | {"sparse_absmax": changed}, layout)
    assert again[row, column] != decoded[row, column]
    others = torch.ones_like(weight, dtype=torch.bool)
    others[row, column // 128 * 128 : min(column // 128 * 128 + 128, columns)] = False
    assert torch.equal(again[others], decoded[others])


@both
def test_fp32_scales_are_taken_as_they_are(codec: FourBit) -> None:
    layout = Layout("input", 5, 192, 128)
    tensors = codec.encode(weight_of(layout), layout)
    wide = {
        name: tensor.float() + 1 if name.endswith("absmax") else tensor for name, tensor in tensors.items()
    }
    assert torch.equal(codec.decode(wide, layout), codec.decode(tensors, layout))
    spelled, dense = codec.spelled_out(wide, layout), layout.without_sparsity
    assert torch.equal(codec.decode(spelled, dense), codec.decode(tensors, layout))
    mixed = tensors | {"dense_absmax": wide["dense_absmax"]}
    assert torch.equal(codec.decode(codec.spelled_out(mixed, layout), dense), codec.decode(tensors, layout))
    for bad in (float("nan"), float("inf")):
        wide["dense_absmax"][3, 0] = bad
        assert codec.illegal("dense_absmax", wide["dense_absmax"]) == (
            3,
            "an absmax that is not finite",
        )


@both
def test_rows_of_zeros_and_of_denormals(codec: FourBit) -> None:
    layout = Layout("output", 3, 64, 0)
    weight = torch.zeros(3, 64)
    weight[1, 7], weight[2, 7] = 1e-42, -3.0
    decoded = codec.decode(codec.encode(weight, layout), layout)
    assert not decoded[0].any()
    assert torch.isfinite(decoded).all()
    assert decoded[2, 7] == -3.0
    assert decoded[2].count_nonzero() == 1


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_infinite_is_rounded_with_given_scales(codec: FourBit, bad: float) -> None:
    layout = Layout("output", 3, 64, 0)
    weight = weight_of(layout)
    grid = codec.grid(weight, layout)
    weight[1, 7] = bad
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        codec.encode(weight, layout, grid)


@both
def test_a_dense_layer_needs_whole_blocks(codec: FourBit) -> None:
    layout = Layout("input", 4, 192, 72)
    with pytest.raises(ValueError, match="72 columns of the 2:4 region are no multiple of 64"):
        codec.spelled_out(codec.encode(weight_of(layout), layout), layout)


def test_bytes_per_weight() -> None:
    """Half for the code, 1/64 for the absmax, next to nothing for the row; in 2:4 half of it and metadata."""
    dense = LinearFormat(Layout("output", 1024, 4096, 0), Codecs.of("nf4"))
    assert dense.nbytes() / (1024 * 4096) == pytest.approx(0.5 + 1 / 64, abs=0.001)
    sparse = LinearFormat(Layout("output", 1024, 4096, 1024), Codecs.of("nf4"))
    assert sparse.nbytes() / (1024 * 4096) == pytest.approx(0.25 + 0.125 + 1 / 128, abs=0.001)


@both
def test_another_default_dtype_changes_nothing(codec: FourBit) -> None:
    """vLLM loads models with the model's dtype as torch's default."""
    layout = Layout("output", 4, 128, 2)
    tensors = codec.encode(weight_of(layout), layout)
    decoded = codec.decode(tensors, layout)
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = codec.encode(weight_of(layout).float(), layout)
        assert torch.equal(codec.decode(tensors, layout), decoded)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again["weight_scale"].dtype == torch.float32


@both
def test_ranks_cut_blocks(codec: FourBit) -> None:
    """A part that begins within a block has smaller blocks, with the same bits; fp32 absmax, too."""
    layout = Layout("input", 5, 288 * 2, 0)
    linear = LinearFormat(layout, Codecs(codec, codec))
    tensors = linear.encode(weight_of(layout))
    for absmax in (tensors["dense_absmax"], tensors["dense_absmax"].float() + 1):
        stored = tensors | {"dense_absmax": absmax}
        local = linear.shard("input", 2)
        assert local.codecs.dense is codec.variant(32)
        parts = [
            local.decode({n: local.loaded(n, linear.cut(n, t, "input", rank, 2)) for n, t in stored.items()})
            for rank in range(2)
        ]
        assert torch.equal(torch.cat(parts, 1), linear.decode(tensors))
    assert linear.shard("input", 1).codecs.dense is codec
    with pytest.raises(ValueError, match="a rank would have 9 dense values per row"):
        linear.shard("input", 64)


def test_variants_are_one_each_and_travel_between_processes() -> None:
    table = (*NF4.table[:15], 1.25)
    other = NF4.variant(32, table)
    assert other is NF4.variant(32, table) is pickle.loads(pickle.dumps(other))
    assert other is not NF4.variant(32)
    assert NF4.variant() is NF4 is pickle.loads(pickle.dumps(NF4))
    assert FP4.variant() is FP4 is pickle.loads(pickle.dumps(FP4))
    assert other.decode(
        {
            "dense_weight": torch.tensor([[0xF7]], dtype=torch.uint8),
            "dense_absmax": torch.tensor([[3.0]]),
            "weight_scale": torch.tensor([2.0]),
        },
        Layout("output", 1, 2, 0),
    ).tolist() == [[7.5, 0.0]]


@both
def test_an_empty_region_may_be_given(codec: FourBit) -> None:
    """As a server has it; with an odd number of columns it would not fit beside the other."""
    layout = Layout("output", 4, 7, 0)
    tensors = codec.encode(weight_of(layout), layout)
    stored = codec.tensors(layout).items()
    empty = {name: torch.empty(s.shape, dtype=s.dtypes[-1]) for name, s in stored if not s.held}
    assert empty
    assert torch.equal(codec.decode(tensors | empty, layout), codec.decode(tensors, layout))
