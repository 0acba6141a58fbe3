"""Everything ``spense eval`` measures, with one load of each model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_spense.evaluation.agreement import Agreement, agreement
from vllm_spense.evaluation.continuation import BATCH, Continuation, continuation, text_items
from vllm_spense.evaluation.harness import Harness
from vllm_spense.evaluation.loading import Activations, load_model, load_tokenizer
from vllm_spense.evaluation.perplexity import mean_nll, text_windows
from vllm_spense.network import language_head
from vllm_spense.sources import check_windows
from vllm_spense.text import Beginning, Bos, Given, context_length, find_sources, opening, opening_text

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Evaluation:
    """``perplexity`` = exp(``nll``); ``nll``: mean negative log-likelihood, nats, of ``tokens`` next tokens.

    ``bos``: the special tokens with which every window starts, as context that is not scored; None for none.
    ``agreement``, ``continuation``, ``tasks``: None where they were not asked for.
    """

    perplexity: float
    nll: float
    tokens: int
    seconds: float
    bos: str | None = None
    agreement: Agreement | None = None
    continuation: Continuation | None = None
    tasks: dict[str, dict[str, float]] | None = None


def evaluate(
    directory: str | Path,
    text: Given,
    *,
    seq_len: int = 512,
    max_tokens: int = 16384,
    bos: Bos = "auto",
    text_column: str | None = None,
    dtype: Dtype | None = None,
    activations: Activations = "checkpoint",
    reference: str | Path | None = None,
    with_continuation: bool = False,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Quality of a dense or Spense ``directory`` on ``text``: files, folders, ``-``, or a dataset of the hub.

    Perplexity: the first ``max_tokens // seq_len`` non-overlapping windows of ``seq_len`` tokens, each
    scored on its own ``seq_len - 1`` next tokens. ``bos``: whether windows start with the model's BOS token
    (``auto``: where serving puts it there, too), which is then the first of the ``seq_len``.

    ``reference``: the dense directory to compare the distributions of these tokens with.
    ``with_continuation``: the four-way task on ``text``, whose documents are separated by blank lines.
    ``tasks``, ``include_path``, ``limit``: see
    :class:`~vllm_spense.evaluation.harness.Harness`.

    ``dtype`` of the activations: by default bf16 on a GPU and fp32 on a CPU, where bf16 takes about eight
    times as long and gives the same figure (SmolLM2-135M: 13.44 in fp32, 13.45 in bf16). ``progress`` gets
    (steps done, steps in all); a step is a window or eight items.

    Raises ``ValueError`` for a text shorter than one window, for damaged checkpoints, for a reference with
    another vocabulary and for unknown tasks, ``ImportError`` for tasks without lm_eval.
    """
    started = time.monotonic()
    find_sources(text)  # before the model's files: it is what people mistype
    harness = Harness(tasks, include_path) if tasks else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    tokenizer = load_tokenizer(directory)
    start, beginning = opening(tokenizer, bos), Beginning(text, tokenizer, text_column)
    windows = text_windows(tokenizer, beginning, seq_len, max_tokens, bos)
    items = text_items(tokenizer, beginning, bos=bos) if with_continuation else None
    if reference is not None:
        others = text_windows(load_tokenizer(reference), beginning, seq_len, windows.numel(), bos)
        if not torch.equal(others, windows):
            raise ValueError(f"{reference} splits the text into other tokens than {directory}")
    for used in (directory, reference):
        if used is not None:
            check_windows(windows, Path(used))
    steps = _Steps(len(windows) + (0 if items is None else -(-len(items.answers) // BATCH)), progress)
    windows = windows.to(device)
    model = load_model(directory, activations=activations, **options)
    language_head(model)
    context = context_length(start)
    compared = None
    if reference is None:
        nll = mean_nll(model, windows, steps, context=context)
    else:
        compared = agreement(model, load_model(reference, **options), windows, steps, context=context)
        nll = compared.nll
    chosen = None if items is None else continuation(model, items, steps)
    scores = None if harness is None else harness.run(model, tokenizer, limit, bos)
    return Evaluation(
        perplexity=math.exp(nll),
        nll=nll,
        tokens=windows.shape[0] * (seq_len - context),
        seconds=time.monotonic() - started,
        bos=opening_text(tokenizer, start),
        agreement=compared,
        continuation=chosen,
        tasks=scores,
    )


class _Steps:
    """One progress over several measurements, which each count their own steps."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.total, self.done, self.progress = total, 0, progress

    def __call__(self, done: int, total: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)
