"""TwELL: a row's non-zero values, tile by tile, as a kernel's epilogue can write them.

Format of "Sparser, Faster, Lighter Transformer Language Models" (arXiv 2603.23198): the ``hidden`` values of
a token are cut into tiles of 128 or 256; a tile is ``tile / share`` 32-bit words, the first of which counts
its non-zeros. Each of the others is a bf16 value in the upper half and its column in the lower: ``hidden`` is
at most 65,535. Here values stand by ascending column, so that equal inputs give equal words, and the count
is the true one: where it is above the capacity the tile has overflowed and holds its first values only. A
consumer computes such a token from the dense row; :func:`unpack` refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILES = (128, 256)
SHARES = (8, 4, 2)
MAX_HIDDEN = (1 << 16) - 1
"""The most columns that a row may have: an index has 16 bits."""


@dataclass(frozen=True)
class TwellShape:
    """Sizes of a packed row: ``hidden`` values in tiles of ``tile``, each stored in ``tile / share`` words.

    Raises ``ValueError`` for tiles and shares that no kernel has, and a ``hidden`` beyond the index.
    """

    hidden: int
    tile: int = 256
    share: int = 8

    def __post_init__(self) -> None:
        if self.tile not in TILES or self.share not in SHARES:
            raise ValueError(
                f"a tile of {self.tile} values with 1/{self.share} of them stored is none of "
                f"{TILES} values with 1/{'/'.join(map(str, SHARES))}"
            )
        if not 0 <= self.hidden <= MAX_HIDDEN:
            raise ValueError(f"hidden size {self.hidden} is beyond the {MAX_HIDDEN} that an index can name")

    @property
    def tiles(self) -> int:
        """Tiles per row; the last one may be ragged."""
        return -(-self.hidden // self.tile)

    @property
    def words(self) -> int:
        """32-bit words per tile, the count included."""
        return self.tile // self.share

    @property
    def capacity(self) -> int:
        """Values that a tile can hold."""
        return self.words - 1


def pack(values: torch.Tensor, shape: TwellShape) -> torch.Tensor:
    """``values [M, hidden]`` bf16 to words ``[M, tiles, words]`` int32: what is not zero, NaN included.

    Unused words are zero. -0 is a zero.
    """
    tokens, hidden = values.shape
    if hidden != shape.hidden or values.dtype != torch.bfloat16:
        raise ValueError(f"values must be bf16 [M, {shape.hidden}], not {values.dtype} {list(values.shape)}")
    padded = values.new_zeros(tokens, shape.tiles * shape.tile)
    padded[:, :hidden] = values
    tiles = padded.view(tokens, shape.tiles, shape.tile)
    kept = tiles != 0
    slot = kept.cumsum(-1)
    words = torch.zeros(tokens, shape.tiles, shape.words, dtype=torch.int32, device=values.device)
    words[:, :, 0] = kept.sum(-1)
    column = torch.arange(shape.tiles * shape.tile, device=values.device).view(shape.tiles, shape.tile)
    word = (tiles.view(torch.int16).int() << 16) | column.int()
    token, tile, place = (kept & (slot <= shape.capacity)).nonzero(as_tuple=True)
    words[token, tile, slot[token, tile, place]] = word[token, tile, place]
    return words


def overflowed(words: torch.Tensor, shape: TwellShape) -> torch.Tensor:
    """Tokens ``[M]`` bool with a tile that had more values than it can hold."""
    return (words[:, :, 0] > shape.capacity).any(-1)


def unpack(words: torch.Tensor, shape: TwellShape) -> torch.Tensor:
    """Inverse of :func:`pack`: ``[M, hidden]`` bf16.

    Raises ``ValueError`` for words that no packing of this shape gives: other sizes, counts below zero,
    columns of another tile or not ascending, and tokens that overflowed.
    """
    if words.dtype != torch.int32 or words.shape[1:] != (shape.tiles, shape.words):
        raise ValueError(
            f"words must be int32 [M, {shape.tiles}, {shape.words}], not {words.dtype} {list(words.shape)}"
        )
    count = words[:, :, :1]
    if bool((count < 0).any()):
        raise ValueError("a tile counts less than no values")
    if bool(overflowed(words, shape).any()):
        token = int(overflowed(words, shape).nonzero()[0])
        raise ValueError(f"token {token} has a tile with more than {shape.capacity} values")
    slots = torch.arange(1, shape.words, device=words.device)
    used = slots <= count
    column = words[:, :, 1:] & 0xFFFF
    first = torch.arange(shape.tiles, device=words.device)[:, None] * shape.tile
    last = (first + shape.tile).clamp_max(shape.hidden)
    ascending = (column[:, :, 1:] > column[:, :, :-1]) | ~used[:, :, 1:]
    if bool((used & ((column < first) | (column >= last))).any()) or not bool(ascending.all()):
        raise ValueError("a tile names a column that is not its own, or not in order")
    values = torch.zeros(words.shape[0], shape.hidden, dtype=torch.bfloat16, device=words.device)
    at, tile, place = used.nonzero(as_tuple=True)
    kept = (words[:, :, 1:][at, tile, place] >> 16).to(torch.int16).view(torch.bfloat16)
    values[at, column[at, tile, place]] = kept
    return values
