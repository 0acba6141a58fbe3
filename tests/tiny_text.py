"""A tokenizer and random text for the tiny models of :mod:`tiny`."""

from __future__ import annotations

import random
from pathlib import Path

from tiny import VOCAB


def add_tokenizer(directory: Path) -> Path:
    """Save a tokenizer that maps the words w0 … w511 to their numbers; returns ``directory``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
    return directory


def write_text(path: Path, words: int = 4000) -> Path:
    """Write ``words`` random words, one token each; returns ``path``."""
    generator = random.Random(0)
    path.write_text(" ".join(f"w{generator.randrange(VOCAB)}" for _ in range(words)))
    return path
