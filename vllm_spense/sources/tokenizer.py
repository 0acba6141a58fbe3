"""The tokenizer of a model directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vllm_spense.format.errors import CheckpointError, one_line

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Any one of these makes a tokenizer."""
_COPY = "copy the tokenizer's files from the model that this one was made from"


def check_tokenizer(directory: Path) -> None:
    """Raises :class:`CheckpointError` for a directory without any tokenizer."""
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        problem = f"no tokenizer is there (none of {', '.join(TOKENIZER_FILES[:3])})"
        raise CheckpointError(problem, file=directory, fix=_COPY)


def load_tokenizer(directory: Path) -> Any:
    """The directory's tokenizer, without running code from it.

    Raises :class:`CheckpointError` where there is none, or none that transformers can read.
    """
    from transformers import AutoTokenizer

    from vllm_spense.sources.architecture import load_config  # it looks at the tokenizer's files itself

    check_tokenizer(directory)
    config = load_config(directory, borrow=True)
    try:
        return AutoTokenizer.from_pretrained(
            directory, config=config, trust_remote_code=False, local_files_only=True
        )
    except MemoryError:
        raise
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        problem = (
            f"the tokenizer's library cannot take this name, which is no text in this locale ({encoding})"
        )
        raise CheckpointError(problem, file=directory, fix="set LC_ALL=C.UTF-8, or rename it") from None
    except Exception as error:
        text = one_line(f"{type(error).__name__}: {error}", 400)
        raise CheckpointError(f"the tokenizer cannot be read ({text})", file=directory, fix=_COPY) from None
