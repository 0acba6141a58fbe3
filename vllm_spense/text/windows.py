"""Text to token ids, and token ids to windows that a model reads one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

MIN_END, MAX_END = 64, 2048
"""Tokens of the end of a text on which a checkpoint is tried: what is too few to say anything, and enough."""


@dataclass(frozen=True)
class TextEnd:
    """Last tokens of a calibration text, [n] int64; ``calibrated``: windows were sampled from them, too."""

    ids: torch.Tensor
    calibrated: bool


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids [n] int64 of one text, without special tokens around it."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def first_windows(
    ids: torch.Tensor, seq_len: int, opening: Sequence[int] = (), count: int | None = None
) -> torch.Tensor:
    """The first ``count`` (None: all) whole windows of ``ids [n]``, one behind the other: [k, seq_len] int64.

    Each starts with ``opening`` (:func:`~vllm_spense.text.bos.opening`) and goes on with the tokens that
    follow. An opening that stands in the text itself is not put there twice. k is 0 for too short a text.
    """
    windows: list[torch.Tensor] = []
    at = 0
    while count is None or len(windows) < count:
        part = ids[at : at + seq_len]
        taken = seq_len if _begins(part, opening) else seq_len - len(opening)
        if part.numel() < taken:
            break
        windows.append(one_window(part, seq_len, opening))
        at += taken
    return torch.stack(windows) if windows else ids.new_empty(0, seq_len)


def sample_windows(
    ids: torch.Tensor, num_samples: int, seq_len: int, seed: int, opening: Sequence[int] = ()
) -> torch.Tensor:
    """``num_samples`` random windows of ``ids [n]``: [num_samples, seq_len] int64, fixed by the seed.

    Each starts with ``opening``, as those of :func:`first_windows`. Raises ``ValueError`` when the text is
    shorter than one window, or a window holds nothing but the opening.
    """
    n = ids.numel()
    check_window(seq_len, opening)
    if n < seq_len:
        raise ValueError(
            f"the calibration text has {n} tokens, fewer than one window of {seq_len}; "
            "give a longer text or a smaller --seq-len"
        )
    starts = _starts(n, num_samples, seq_len, seed).tolist()
    return torch.stack([one_window(ids[start : start + seq_len], seq_len, opening) for start in starts])


def text_end(ids: torch.Tensor, num_samples: int, seq_len: int, seed: int) -> TextEnd:
    """The end of ``ids [n]`` behind all windows of :func:`sample_windows`, or of all ids if that is short."""
    behind = int(_starts(ids.numel(), num_samples, seq_len, seed).max()) + seq_len
    calibrated = ids.numel() - behind < MIN_END
    start = max(0 if calibrated else behind, ids.numel() - MAX_END)
    return TextEnd(ids[start:].clone(), calibrated)


def context_length(opening: Sequence[int]) -> int:
    """Tokens at the start of a window that are context and no targets: the opening, or the first token."""
    return max(1, len(opening))


def check_window(seq_len: int, opening: Sequence[int]) -> None:
    """Raises ``ValueError`` for windows that hold nothing but their opening."""
    if seq_len <= context_length(opening):
        raise ValueError(f"a window of {seq_len} tokens is filled by the {len(opening)} that open it")


def one_window(part: torch.Tensor, seq_len: int, opening: Sequence[int]) -> torch.Tensor:
    """``opening`` and what then fits of ``part [n]`` into ``seq_len`` tokens, or ``part`` if it has it."""
    if _begins(part, opening):
        return part[:seq_len]
    return torch.cat([part.new_tensor(opening), part[: seq_len - len(opening)]])


def _starts(n: int, num_samples: int, seq_len: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, n - seq_len + 1, (num_samples,), generator=generator)


def _begins(part: torch.Tensor, opening: Sequence[int]) -> bool:
    return part[: len(opening)].tolist() == list(opening)
