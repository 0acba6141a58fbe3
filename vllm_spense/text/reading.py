"""Where text comes from: files and datasets of the hub."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spense.format.files import storable

_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")


@dataclass(frozen=True)
class CalibrationText:
    """The text itself, where it came from, its SHA-256 (of the UTF-8 bytes), and what opens its windows."""

    text: str
    source: str
    sha256: str
    bos: str | None = None

    def record(self) -> dict[str, Any]:
        """What provenance says of the text; ``bos`` only where windows start with something."""
        found: dict[str, Any] = {"source": storable(self.source), "sha256": self.sha256}
        return found if self.bos is None else found | {"bos": self.bos}


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
