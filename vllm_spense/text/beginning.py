"""The beginning of a text, for evaluation: it is read and tokenised as far as somebody needs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from vllm_spense.text.reading import BETWEEN, Piece, Text, joined
from vllm_spense.text.sources import Given, find_sources
from vllm_spense.text.windows import tokenize

MARGIN = 4096
"""Characters behind a cut that show which tokens before it would be others without the cut."""
ENOUGH = 8 << 20
"""Characters of which documents are made."""


class Beginning:
    """What stands first in the text that ``given`` names; read once, remembered, whoever asks.

    Raises ``ValueError`` for what is not there, and later for what cannot be read.
    """

    def __init__(self, given: Given, tokenizer: Any, column: str | None = None) -> None:
        text = Text(find_sources(given), tokenizer, column)
        self.name = ", ".join(source.place for source in text.sources)
        self._rest = text.pieces()
        self._pieces: list[Piece] = []
        self._length = 0

    def characters(self, count: int) -> str:
        """At least the first ``count`` of them, or all of the text if it is shorter."""
        while self._length < count and (piece := next(self._rest, None)) is not None:
            self._pieces.append(piece)
            self._length += len(piece.text)
        return "".join(joined(self._pieces))

    def tokens(self, tokenizer: Any, count: int) -> torch.Tensor:
        """The first ``count`` ids [n] int64 of the text (all if fewer), as ``tokenizer`` splits all of it."""
        length = 8 * count
        while True:
            text = self.characters(length + MARGIN)
            more = tokenize(tokenizer, text[: length + MARGIN])
            if len(text) < length + MARGIN:  # that is all of it
                return more[:count]
            fewer = tokenize(tokenizer, text[:length])
            both = min(len(fewer), len(more))
            differ = (fewer[:both] != more[:both]).nonzero()
            if (int(differ[0]) if len(differ) else both) >= count:
                return more[:count]
            length *= 2

    def documents(self) -> list[str]:
        """What blank lines separate, and each chat; of the first :data:`ENOUGH` characters."""
        self.characters(ENOUGH)
        return list(_documents(self._pieces))


def _documents(pieces: Iterable[Piece]) -> Iterator[str]:
    length = 0
    whole: list[list[Piece]] = []
    for piece in pieces:
        if length >= ENOUGH:
            break
        length += len(piece.text)
        if piece.first or not whole:
            whole.append([piece])
        else:
            whole[-1].append(piece)
    for parts in whole:
        text = "".join(part.text for part in parts)
        yield from [text] if parts[0].chat else (part for part in text.split(BETWEEN) if part.strip())
