"""Calibration text to token windows."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_spense.pruning.trust import warn

_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
MIN_END, MAX_END = 64, 2048
"""Tokens of the end of a text on which a checkpoint is tried: what is too few to say anything, and enough."""


@dataclass(frozen=True)
class CalibrationText:
    """The text itself, where it came from and its SHA-256 (of the UTF-8 bytes)."""

    text: str
    source: str
    sha256: str


@dataclass(frozen=True)
class TextEnd:
    """Last tokens of a calibration text, [n] int64; ``calibrated``: windows were sampled from them, too."""

    ids: torch.Tensor
    calibrated: bool


def read_calibration(source: str) -> CalibrationText:
    """Read a UTF-8 text file, or the ``text`` column of a hub dataset ``org/name`` (needs network).

    Raises ``ValueError`` when neither is there or the file is not UTF-8.
    """
    path = Path(source).expanduser()
    if path.is_file():
        data = path.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: the calibration text is not UTF-8 ({error})") from None
        return CalibrationText(text, path.name, hashlib.sha256(data).hexdigest())
    if path.exists() or not _DATASET_NAME.fullmatch(source):
        raise ValueError(f"{source}: no such calibration text file")
    text = _read_dataset(source)
    return CalibrationText(text, source, hashlib.sha256(text.encode()).hexdigest())


def _read_dataset(name: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"{name}: there is no such file, and reading it as a dataset of the Hugging Face hub "
            "needs the package datasets (`pip install datasets`)"
        ) from None
    try:
        rows = load_dataset(name, split="train")
    except Exception as error:
        raise ValueError(f"{name}: no such file, and not readable as a dataset ({error})") from None
    if "text" not in rows.column_names:
        raise ValueError(f"{name}: the dataset has no column 'text' (it has {rows.column_names})")
    return "\n\n".join(rows["text"])


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids [n] int64 of one long text, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def sample_windows(ids: torch.Tensor, num_samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """``num_samples`` random windows of ``ids [n]``: [num_samples, seq_len] int64, fixed by the seed.

    Raises ``ValueError`` when the text is shorter than one window; warns when the windows together
    are longer than the text, for then they repeat each other.
    """
    n = ids.numel()
    if n < seq_len:
        raise ValueError(
            f"the calibration text has {n} tokens, fewer than one window of {seq_len}; "
            "give a longer text or a smaller --seq-len"
        )
    if num_samples * seq_len > n:
        warn(
            f"{num_samples} windows of {seq_len} tokens out of a text of {n} tokens overlap heavily; "
            "a longer calibration text prunes better"
        )
    return ids[_starts(n, num_samples, seq_len, seed)[:, None] + torch.arange(seq_len)]


def text_end(ids: torch.Tensor, num_samples: int, seq_len: int, seed: int) -> TextEnd:
    """The end of ``ids [n]`` behind all windows of :func:`sample_windows`, or of all ids if that is short."""
    behind = int(_starts(ids.numel(), num_samples, seq_len, seed).max()) + seq_len
    calibrated = ids.numel() - behind < MIN_END
    start = max(0 if calibrated else behind, ids.numel() - MAX_END)
    return TextEnd(ids[start:].clone(), calibrated)


def _starts(n: int, num_samples: int, seq_len: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, n - seq_len + 1, (num_samples,), generator=generator)
