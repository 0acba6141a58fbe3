"""Perplexity on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from vllm_spense.text import Beginning, Bos, context_length, first_windows, opening


def text_windows(
    tokenizer: Any, text: Beginning, seq_len: int, max_tokens: int, bos: Bos = "auto"
) -> torch.Tensor:
    """First non-overlapping windows [num, seq_len] int64 of a text, each behind the model's opening.

    Raises ``ValueError`` for a text shorter than one window.
    """
    start = opening(tokenizer, bos)
    if seq_len <= context_length(start) or max_tokens < seq_len:
        least = context_length(start) + 1
        raise ValueError(f"max_tokens {max_tokens} holds no window of {seq_len} tokens (at least {least})")
    ids = text.tokens(tokenizer, max_tokens)
    windows = first_windows(ids, seq_len, start, max_tokens // seq_len)
    if not len(windows):
        raise ValueError(f"{text.name} has {len(ids)} tokens, fewer than one window of {seq_len}")
    return windows


@torch.inference_mode()
def mean_nll(
    model: nn.Module,
    windows: torch.Tensor,
    progress: Callable[[int, int], None] | None = None,
    *,
    context: int = 1,
) -> float:
    """Mean negative log-likelihood (nats) of the next tokens within ``windows [num, seq_len]``.

    The first ``context`` tokens of a window (BOS, or just its first one) are read but not scored.
    """
    total = 0.0
    for i, window in enumerate(windows):
        logits = model(input_ids=window[None], use_cache=False).logits[0, context - 1 : -1].float()
        total += float(cross_entropy(logits, window[context:], reduction="sum"))
        if progress is not None:
            progress(i + 1, windows.shape[0])
    return total / (windows.shape[0] * (windows.shape[1] - context))
