"""A tokenizer and random text for the tiny models of :mod:`tiny`."""

from __future__ import annotations

import random
from pathlib import Path

from tests.tiny import VOCAB


def add_tokenizer(directory: Path, **special: str) -> Path:
    """Save a tokenizer that maps the words w0 … w511 to their numbers; returns ``directory``.

    ``special``: words that a processor finds as attributes of the tokenizer, and that need no space around;
    with them w1 is the BOS token, which nothing adds, and w500 … w503 are newlines.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB)}
    for lines in range(1, 5 if special else 1):  # vLLM's processors of Gemma look for these
        words["\n" * lines] = words.pop(f"w{VOCAB - 13 + lines}")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra = {"extra_special_tokens": special, "bos_token": "w1", "pad_token": "w0"} if special else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", **extra).save_pretrained(directory)
    return directory


def write_text(path: Path, words: int = 4000, vocabulary: int = VOCAB) -> Path:
    """Write ``words`` random words of the first ``vocabulary``, one token each; returns ``path``."""
    generator = random.Random(0)
    path.write_text(" ".join(f"w{generator.randrange(vocabulary)}" for _ in range(words)))
    return path
