"""Is a checkpoint alive? A few windows of text and a few greedy tokens, in seconds."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_spense.evaluation.loading import load_model, load_tokenizer
from vllm_spense.evaluation.perplexity import mean_nll
from vllm_spense.format.bitsandbytes import open_checkpoint
from vllm_spense.sources import check_windows, positions
from vllm_spense.text import Bos, context_length, first_windows, opening, tokenize

PROMPT = "The capital of France is"
NEW_TOKENS = 24
SEQ_LEN = 512
OVERHEAD = 1.3
"""Memory of a loaded model over that of its fp32 weights: the largest matrix twice, logits, activations."""


@dataclass(frozen=True)
class Trial:
    """``perplexity`` on ``tokens`` next tokens, None without text; ``text`` behind the prompt, None without
    a tokenizer. Both are None for models that predict no tokens."""

    perplexity: float | None
    tokens: int
    vocabulary: int
    text: str | None
    seconds: float

    @property
    def absurd(self) -> bool:
        """Whether guessing blindly would be better."""
        return self.perplexity is not None and self.perplexity > self.vocabulary


@torch.inference_mode()
def try_out(directory: str | Path, ids: torch.Tensor | None = None, bos: Bos = "auto") -> Trial:
    """Load ``directory`` as :func:`load_model` does, score ``ids [n]`` int64 and continue :data:`PROMPT`.

    Windows and prompt start with the model's BOS token where ``bos`` says so.

    Raises ``RuntimeError`` for a perplexity or logits that are not finite, ``ValueError`` for directories
    that cannot be loaded.
    """
    started = time.monotonic()
    model: Any = load_model(directory, device=_device(directory))
    tokenizer = _tokenizer(directory)
    predicts = model.get_output_embeddings() is not None  # not an embedding model or a classifier
    seq_len = min(SEQ_LEN, positions(model.config) or SEQ_LEN)
    start = () if tokenizer is None else opening(tokenizer, bos)
    perplexity, scored = None, 0
    context = context_length(start)
    if ids is not None and predicts and ids.numel() > context:
        windows = first_windows(ids, min(seq_len, ids.numel()), start).to(model.device)
        nll = mean_nll(model, windows, context=context)
        scored = windows.shape[0] * (windows.shape[1] - context)
        if not math.isfinite(nll):
            raise RuntimeError(f"{directory}: the perplexity is not finite ({nll} nats per token)")
        perplexity = math.exp(min(nll, 700))  # beyond that a float overflows
    prompt = torch.zeros(1, 1, dtype=torch.long)
    if tokenizer is not None:
        prompt = torch.cat([torch.tensor(start, dtype=torch.long), tokenize(tokenizer, PROMPT)])[None]
        check_windows(prompt, Path(directory))
    prompt = prompt.to(model.device)
    output = model(input_ids=prompt, use_cache=False)[0]  # logits, or hidden states of models without a head
    if not torch.isfinite(output).all():
        raise RuntimeError(f"{directory}: the model's output holds NaN or infinity")
    text = _continue(model, tokenizer, prompt) if tokenizer is not None and predicts else None
    return Trial(perplexity, scored, output.shape[-1], text, time.monotonic() - started)


def _continue(model: Any, tokenizer: Any, prompt: torch.Tensor) -> str:
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True)


def _tokenizer(directory: str | Path) -> Any:
    try:
        return load_tokenizer(directory)
    except (OSError, ValueError):  # models without one can be pruned without data
        return None


def _device(directory: str | Path) -> str:
    fits = torch.cuda.is_available() and memory_needed(directory) < torch.cuda.mem_get_info()[0]
    return "cuda" if fits else "cpu"


def memory_needed(directory: str | Path) -> int:
    """Bytes of host memory that :func:`try_out` takes, from headers."""
    checkpoint = open_checkpoint(directory)
    modules = checkpoint.require_spense().modules.values()
    weights = sum(spec.out_features * spec.in_features for spec in modules)
    weights += sum(math.prod(checkpoint.tensors[name].shape) for name in checkpoint.plain_tensors())
    return int(weights * 4 * OVERHEAD)


def memory_available() -> int:
    """Bytes of host memory that are free or could be."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":") for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
