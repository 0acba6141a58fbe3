"""Calibration windows of a text of any length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from vllm_spense.text.bos import Bos, opening, opening_text
from vllm_spense.text.reading import Text, TextRecord
from vllm_spense.text.sources import Source
from vllm_spense.text.windows import (
    MAX_END,
    TextEnd,
    check_window,
    one_window,
    sample_windows,
    text_end,
    tokenize,
)

LONG = 8 << 20
"""Characters of a text above which only random pieces are tokenised; all of four times as many took 5 GB."""
CHARACTERS = 8
"""A piece has so many per token that is needed; what more a token takes is made up for by further pieces."""


@dataclass(frozen=True)
class Calibration:
    """``windows`` [num_samples, seq_len] int64, the text's ``end`` and its ``record``.

    ``tokens``: of the whole text; None for a very long one, which nobody counts.
    """

    windows: torch.Tensor
    end: TextEnd
    record: TextRecord
    tokens: int | None


def calibrate(
    sources: list[Source],
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    seed: int,
    *,
    bos: Bos = "auto",
    column: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Random windows of the text of ``sources``, fixed by the seed.

    They start anywhere in the tokens of the whole text. Of a text of more than :data:`LONG` characters (or
    more than the windows need, if that is more) each window is taken from a random piece of its own, so that
    all of it is read but little of it tokenised. ``progress`` gets the characters read, every :data:`LONG`.
    Raises ``ValueError`` for what cannot be read and for too short a text.
    """
    start = opening(tokenizer, bos)
    check_window(seq_len, start)
    text = Text(sources, tokenizer, column)
    size, count = CHARACTERS * max(seq_len, MAX_END), num_samples + num_samples // 4 + 4
    chunks = _counted(text.chunks(), progress)
    limit = max(LONG, (count + 2) * size)
    head = _up_to(limit + 1, chunks)
    if len(head) <= limit:
        ids, sizes = tokenize(tokenizer, head), (num_samples, seq_len, seed)
        windows, end = sample_windows(ids, *sizes, start), text_end(ids, *sizes)
        record, tokens = text.record(), ids.numel()
    else:
        pieces, last = random_pieces(chain([head], chunks), size, count, seed)
        windows = _windows_of(pieces, tokenizer, num_samples, seq_len, seed, start)
        end = TextEnd(tokenize(tokenizer, last)[1:][-MAX_END:], calibrated=False)
        record, tokens = replace(text.record(), pieces=num_samples), None
    return Calibration(windows, end, replace(record, bos=opening_text(tokenizer, start)), tokens)


def random_pieces(chunks: Iterator[str], size: int, count: int, seed: int) -> tuple[list[str], str]:
    """``count`` random pieces of ``size`` characters, and the end (up to ``2 * size``), in one pass.

    Every piece of the text but its end has the same chance (reservoir sampling).
    """
    generator = random.Random(seed)
    kept: list[str] = []
    held: list[str] = []
    for seen, piece in enumerate(_cut(chunks, size), start=-1):  # the last two are the end
        held.append(piece)
        if len(held) > 2:
            candidate, place = held.pop(0), generator.randrange(seen)
            if len(kept) < count:
                kept.append(candidate)
            elif place < count:
                kept[place] = candidate
    return kept, "".join(held)


def _windows_of(
    pieces: list[str], tokenizer: Any, num_samples: int, seq_len: int, seed: int, start: Sequence[int]
) -> torch.Tensor:
    """One window per piece, without the tokens at its ends, which the cut may have changed."""
    generator = random.Random(seed)
    left, windows = _tokenized(pieces, tokenizer), []
    for _ in range(num_samples):
        ids = torch.empty(0, dtype=torch.long)
        while ids.numel() < seq_len:
            more = next(left, None)
            if more is None:
                raise ValueError(
                    f"the calibration text has over {CHARACTERS} characters per token nearly everywhere; "
                    "is it text that this model can read?"
                )
            ids = torch.cat([ids, more[1:-1]])
        at = generator.randrange(ids.numel() - seq_len + 1)
        windows.append(one_window(ids[at : at + seq_len], seq_len, start))
    return torch.stack(windows)


def _tokenized(pieces: list[str], tokenizer: Any) -> Iterator[torch.Tensor]:
    """Token ids of each piece; a few are split at once, which tokenizers do on several cores."""
    for at in range(0, len(pieces), 16):
        some = tokenizer(pieces[at : at + 16], add_special_tokens=False, verbose=False)["input_ids"]
        yield from (torch.tensor(ids, dtype=torch.long) for ids in some)


def _cut(chunks: Iterator[str], size: int) -> Iterator[str]:
    """The same text in pieces of ``size`` characters, the last one shorter."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        for at in range(0, len(rest) - size + 1, size):
            yield rest[at : at + size]
        rest = rest[len(rest) // size * size :]
    if rest:
        yield rest


def _up_to(count: int, chunks: Iterator[str]) -> str:
    """The first ``count`` characters and what comes in one chunk with the last, or all that there are."""
    parts: list[str] = []
    length = 0
    while length < count and (chunk := next(chunks, None)) is not None:
        parts.append(chunk)
        length += len(chunk)
    return "".join(parts)


def _counted(chunks: Iterator[str], progress: Callable[[int], None] | None) -> Iterator[str]:
    length = 0
    for chunk in chunks:
        before, length = length, length + len(chunk)
        if progress is not None and before // LONG < length // LONG:
            progress(length)
        yield chunk
