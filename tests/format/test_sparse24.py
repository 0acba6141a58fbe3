"""2:4 compression against a per-group loop, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spense.format.sparse24 import (
    LEGAL_NIBBLES,
    compress,
    decompress,
    legal_meta_bytes,
    magnitude_mask,
)

DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
NEGATIVE_ZERO = {1: 0x80, 2: -(1 << 15), 4: -(1 << 31)}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def slow_compress(weight: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Bit patterns of the values, and metadata bytes, group by group from the format's definition."""
    values: list[list[int]] = []
    meta: list[list[int]] = []
    floats, patterns = weight.float().tolist(), bits(weight).tolist()
    for row, row_bits in zip(floats, patterns, strict=True):
        kept_row: list[int] = []
        nibbles: list[int] = []
        for start in range(0, len(row), 4):
            nonzero = [i for i in range(4) if row[start + i] != 0.0]
            assert len(nonzero) <= 2
            fill = [i for i in range(4) if i not in nonzero]
            chosen = sorted(nonzero + fill[: 2 - len(nonzero)])
            kept_row += [row_bits[start + i] if i in nonzero else 0 for i in chosen]
            nibbles.append(chosen[0] + 4 * chosen[1])
        values.append(kept_row)
        meta.append([nibbles[i] + 16 * nibbles[i + 1] for i in range(0, len(nibbles), 2)])
    return values, meta


def random_24(rows: int, cols: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A 2:4 matrix with groups of zero, one and two non-zeros, and some negative zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    weight = weight * magnitude_mask(torch.rand(rows, cols, generator=generator))
    weight = weight * (torch.rand(rows, cols, generator=generator) > 0.3)  # -x * 0 leaves -0.0
    return weight.to(dtype)


def without_negative_zero(weight: torch.Tensor) -> torch.Tensor:
    raw = bits(weight).clone()
    raw[raw == NEGATIVE_ZERO[weight.element_size()]] = 0
    return raw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (7, 24), (33, 144), (5, 576)])
def test_round_trip_and_encoding(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_24(*shape, dtype, seed=shape[1])
    assert (bits(weight) == NEGATIVE_ZERO[weight.element_size()]).any() or shape == (1, 8)
    values, meta = compress(weight)
    assert values.dtype == dtype
    assert meta.dtype == torch.uint8
    slow_values, slow_meta = slow_compress(weight)
    assert bits(values).tolist() == slow_values
    assert meta.tolist() == slow_meta
    assert torch.equal(bits(decompress(values, meta)), without_negative_zero(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_zero_pattern_of_a_group(dtype: torch.dtype) -> None:
    """0, 1 or 2 non-zeros at any place; zeros with the lowest positions fill up."""
    masks = [m for m in itertools.product((0, 1), repeat=4) if sum(m) <= 2]
    weight = torch.tensor([[*m, *m] for m in masks], dtype=torch.float32).to(dtype)
    values, meta = compress(weight)
    expected = {(0, 0, 0, 0): 0x4, (1, 0, 0, 0): 0x4, (0, 1, 0, 0): 0x4, (0, 0, 1, 0): 0x8, (0, 0, 0, 1): 0xC}
    for mask, byte in zip(masks, meta.flatten().tolist(), strict=True):
        places = [i for i in range(4) if mask[i]]
        nibble = expected.get(mask) or places[0] | places[1] << 2
        assert byte == nibble * 0x11, mask
    assert torch.equal(decompress(values, meta).float(), weight.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_zero_is_a_zero(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-0.0, 1.0, -0.0, 2.0, -0.0, -0.0, -0.0, -0.0]]).to(dtype)
    values, meta = compress(weight)
    assert meta.tolist() == [[0xD | 0x4 << 4]]
    assert values.float().tolist() == [[1.0, 2.0, 0.0, 0.0]]
    assert not torch.signbit(values.float()).any()
    assert not torch.signbit(decompress(values, meta).float()).any()


def test_fp8_values_keep_their_bits_even_nan() -> None:
    """The codec moves bytes; refusing NaN is the validator's work."""
    weight = torch.zeros(1, 256 * 4, dtype=torch.uint8)
    weight[0, ::4] = torch.arange(256, dtype=torch.uint8)
    values, meta = compress(weight.view(torch.float8_e4m3fn))
    expected = weight.clone()
    expected[expected == 0x80] = 0
    assert torch.equal(decompress(values, meta).view(torch.uint8), expected)


@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values, meta = compress(torch.zeros(shape, dtype=dtype))
    assert values.shape == (shape[0], shape[1] // 2)
    assert meta.shape == (shape[0], shape[1] // 8)
    out = decompress(values, meta)
    assert out.shape == shape
    assert out.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous_input(dtype: torch.dtype) -> None:
    weight = random_24(16, 40, dtype, seed=1)
    sliced, transposed = weight[:, 8:32], bits(weight).t().contiguous().t().view(dtype)
    assert torch.equal(compress(sliced)[1], compress(sliced.contiguous())[1])
    for ours, plain in zip(compress(transposed), compress(weight), strict=True):
        assert torch.equal(ours.view(torch.uint8), plain.view(torch.uint8))


@pytest.mark.parametrize("cached", [1, 100, 33 * 40, 1 << 19])
def test_the_size_of_a_part_changes_nothing(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_spense.format.sparse24._CACHED_BYTES", cached)
    weight = without_negative_zero(random_24(33, 40, torch.float8_e4m3fn, 4))
    assert torch.equal(bits(decompress(*compress(weight))), bits(weight))


def test_only_six_nibbles_are_legal() -> None:
    pairs = {a | b << 2 for a, b in itertools.combinations(range(4), 2)}
    assert set(LEGAL_NIBBLES) == pairs
    table = legal_meta_bytes()
    assert [b for b in range(256) if table[b]] == sorted(a | b << 4 for a in pairs for b in pairs)


@pytest.mark.parametrize("cols", [4, 12, 7])
def test_columns_must_be_whole_metadata_bytes(cols: int) -> None:
    with pytest.raises(ValueError, match=f"{cols} columns are no multiple of 8"):
        compress(torch.zeros(2, cols))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_non_zeros_are_refused_by_row(dtype: torch.dtype) -> None:
    weight = torch.zeros(5, 16)
    weight[3, 4:7] = 1
    with pytest.raises(ValueError, match="row 3 has a group of 4 with more than two non-zeros"):
        compress(weight.to(dtype))


def test_meta_must_fit_values() -> None:
    with pytest.raises(ValueError, match=r"meta \(2, 3\) does not fit values \(2, 8\)"):
        decompress(torch.zeros(2, 8), torch.zeros(2, 3, dtype=torch.uint8))


groups = st.tuples(
    st.sampled_from([(), (0,), (1,), (2,), (3,), *itertools.combinations(range(4), 2)]),
    st.lists(st.integers(0, 255), min_size=2, max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4), data=st.data())
def test_any_2_4_matrix_has_one_encoding(rows: int, data: st.DataObject) -> None:
    count = 2 * data.draw(st.integers(1, 6))
    drawn = data.draw(st.lists(groups, min_size=rows * count, max_size=rows * count))
    raw = torch.zeros(rows * count, 4, dtype=torch.uint8)
    for i, (places, payload) in enumerate(drawn):
        for place, byte in zip(places, payload, strict=False):
            raw[i, place] = byte
    weight = raw.view(rows, count * 4).view(torch.float8_e4m3fn)
    values, meta = compress(weight)
    assert legal_meta_bytes()[meta.int()].all()
    slow_values, slow_meta = slow_compress(weight)
    assert (values.view(torch.uint8).tolist(), meta.tolist()) == (slow_values, slow_meta)
    again = compress(decompress(values, meta))
    assert torch.equal(again[0].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(again[1], meta)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=32).filter(lambda x: len(x) % 4 == 0))
def test_magnitude_mask_keeps_the_two_largest_and_the_earlier_of_ties(scores: list[int]) -> None:
    mask = magnitude_mask(torch.tensor([scores], dtype=torch.float32))[0].tolist()
    for start in range(0, len(scores), 4):
        group = scores[start : start + 4]
        best = sorted(range(4), key=lambda i: (-group[i], i))[:2]
        assert mask[start : start + 4] == [i in best for i in range(4)]


def test_mask_does_not_depend_on_the_neighbours() -> None:
    """All-tied groups, alone and among others: the first two positions, always."""
    mask = magnitude_mask(torch.ones(64, 576))
    assert torch.equal(mask, torch.tensor([True, True, False, False]).repeat(64, 144))
