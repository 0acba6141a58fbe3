"""Perplexity on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def read_text(path: Path) -> str:
    """A UTF-8 text file; raises ``ValueError`` when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the text cannot be read ({error})") from None


def text_windows(tokenizer: Any, path: Path, seq_len: int, max_tokens: int) -> torch.Tensor:
    """First non-overlapping windows [num, seq_len] int64 of a text file, no special tokens added.

    Raises ``ValueError`` for a text shorter than one window.
    """
    if seq_len < 2 or max_tokens < seq_len:
        raise ValueError(f"max_tokens {max_tokens} holds no window of {seq_len} tokens (at least 2)")
    ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    count = min(max_tokens, len(ids)) // seq_len
    if not count:
        raise ValueError(f"{path} has {len(ids)} tokens, fewer than one window of {seq_len}")
    return torch.tensor(ids[: count * seq_len], dtype=torch.long).view(count, seq_len)


@torch.inference_mode()
def mean_nll(
    model: nn.Module, windows: torch.Tensor, progress: Callable[[int, int], None] | None = None
) -> float:
    """Mean negative log-likelihood (nats) of all next tokens within ``windows [num, seq_len]``."""
    total = 0.0
    for i, window in enumerate(windows):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += float(cross_entropy(logits, window[1:], reduction="sum"))
        if progress is not None:
            progress(i + 1, windows.shape[0])
    return total / (windows.shape[0] * (windows.shape[1] - 1))
