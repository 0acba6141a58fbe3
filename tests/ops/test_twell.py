"""TwELL's words: what is packed comes back, equal bits for equal rows, and nothing is lost in silence."""

from __future__ import annotations

import random

import pytest
import torch

from vllm_spense.ops.mlp.twell import MAX_HIDDEN, SHARES, TILES, TwellShape, overflowed, pack, unpack


def sparse_rows(tokens: int, hidden: int, density: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, hidden, generator=generator)
    kept = torch.rand(tokens, hidden, generator=generator) < density
    return (values * kept).bfloat16()


def slow_words(values: torch.Tensor, shape: TwellShape) -> list[list[list[int]]]:
    """The format, one value at a time."""
    rows = []
    for row in values:
        tiles = []
        for first in range(0, shape.hidden, shape.tile):
            words = []
            for column in range(first, min(first + shape.tile, shape.hidden)):
                if float(row[column]) != 0:
                    bits = int(row[column].view(torch.int16)) & 0xFFFF
                    words.append(bits << 16 | column)
            stored = words[: shape.capacity]
            stored += [0] * (shape.capacity - len(stored))
            tiles.append([len(words), *stored])
        rows.append(tiles)
    return rows


def unsigned(words: torch.Tensor) -> list:
    return (words.long() & 0xFFFFFFFF).tolist()


def test_a_thousand_random_sizes_densities_and_capacities() -> None:
    rng = random.Random(0)
    lost = 0
    for seed in range(1000):
        hidden = rng.choice([0, 1, 127, 128, 129, 255, 300, 900])
        shape = TwellShape(hidden, rng.choice(TILES), rng.choice(SHARES))
        tokens = rng.choice([0, 1, 2, 5])
        values = sparse_rows(tokens, shape.hidden, rng.random() ** 3, seed)
        words = pack(values, shape)
        assert words.shape == (tokens, shape.tiles, shape.words)
        counts = torch.stack([part.ne(0).sum(-1) for part in values.split(shape.tile, -1)], -1)
        assert torch.equal(words[:, :, 0].long(), counts if shape.tiles else counts[:, :0])
        bad = overflowed(words, shape)
        assert torch.equal(bad, (counts > shape.capacity).any(-1) if shape.tiles else bad)
        lost += int(bad.any())
        assert torch.equal(unpack(words[~bad], shape), values[~bad])
        if bad.any():
            with pytest.raises(ValueError, match=f"more than {shape.capacity} values"):
                unpack(words, shape)
    assert 100 < lost < 900, "both ways are to be seen"


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("tile", TILES)
def test_words_are_those_of_the_format(tile: int, share: int) -> None:
    shape = TwellShape(300, tile, share)
    values = sparse_rows(3, 300, 0.3, seed=1)
    assert unsigned(pack(values, shape)) == slow_words(values, shape)


def test_nan_is_kept_and_minus_zero_is_not() -> None:
    shape = TwellShape(4, 128)
    words = pack(torch.tensor([[-0.0, torch.nan, 0.0, 1.0]]).bfloat16(), shape)
    assert int(words[0, 0, 0]) == 2
    row = unpack(words, shape)[0]
    assert row[1].isnan()
    assert row.nan_to_num(5).tolist() == [0, 5, 0, 1]


def test_the_last_column_that_an_index_can_name() -> None:
    shape = TwellShape(MAX_HIDDEN)
    values = torch.zeros(1, MAX_HIDDEN, dtype=torch.bfloat16)
    values[0, -1] = -2.5
    assert torch.equal(unpack(pack(values, shape), shape), values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 64, 8), "a tile of 64 values"),
        ((100, 256, 3), "1/3 of them"),
        ((100, 256, 0), "1/0 of them"),
        ((MAX_HIDDEN + 1,), "65536 is beyond"),
        ((-1,), "-1 is beyond"),
    ],
)
def test_shapes_that_no_kernel_has(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwellShape(*arguments)


def test_other_values_are_refused() -> None:
    shape = TwellShape(100)
    with pytest.raises(ValueError, match=r"bf16 \[M, 100\]"):
        pack(torch.zeros(2, 100), shape)
    with pytest.raises(ValueError, match=r"bf16 \[M, 100\]"):
        pack(torch.zeros(2, 99, dtype=torch.bfloat16), shape)


@pytest.mark.parametrize(
    ("place", "word", "message"),
    [
        ((0, 0, 0), -1, "less than no values"),
        ((0, 1, 1), 1 << 16 | 3, "not its own"),  # a column of the first tile in the second
        ((0, 1, 2), 1 << 16 | 299, "not its own"),  # beyond the row's end
        ((0, 0, 2), 1 << 16 | 0, "not in order"),
    ],
)
def test_words_that_no_packing_gives(place: tuple[int, int, int], word: int, message: str) -> None:
    shape = TwellShape(290)
    values = torch.zeros(1, 290, dtype=torch.bfloat16)
    values[0, [5, 9, 257, 280]] = 1
    words = pack(values, shape)
    unpack(words, shape)
    words[place] = word
    with pytest.raises(ValueError, match=message):
        unpack(words, shape)


def test_words_of_another_shape() -> None:
    words = pack(torch.zeros(1, 290, dtype=torch.bfloat16), TwellShape(290))
    with pytest.raises(ValueError, match=r"int32 \[M, 2, 64\]"):
        unpack(words, TwellShape(290, 256, 4))
