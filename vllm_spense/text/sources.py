"""What people name as text: files, folders, standard input, datasets of the hub. Nothing is read here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STANDARD_INPUT = "-"
KINDS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
"""By suffix, in front of which ``.gz`` does not count. What has none of these is known by its content."""
READABLE = ".txt, .jsonl, .json (each also as .gz) and .parquet"
_TABLES = {".csv", ".tsv"}  # text, but not to be calibrated on with its commas and quotes
_DATASET = re.compile(r"(?P<repository>[A-Za-z0-9][\w.\-]*/[\w.\-]+)(:(?P<config>[^:]*)(:(?P<split>.+))?)?")

Given = str | Path | Sequence[str | Path]
"""One source or several: a file, a folder, ``-``, or a dataset ``org/name``, ``org/name:config:split``."""


@dataclass(frozen=True)
class File:
    """A file (or pipe) at ``path``, None for standard input; ``kind``: of :data:`KINDS`, None if unknown."""

    path: Path | None
    kind: str | None = None

    @property
    def name(self) -> str:
        return STANDARD_INPUT if self.path is None else self.path.name

    @property
    def place(self) -> str:
        """Where it is, for error messages."""
        return "standard input" if self.path is None else str(self.path)


@dataclass(frozen=True)
class Dataset:
    """The dataset ``repository`` of the hub, under the whole ``name`` given; ``config`` None: its default."""

    name: str
    repository: str
    config: str | None
    split: str

    @property
    def place(self) -> str:
        return self.name


Source = File | Dataset


def listed(given: Given) -> list[str | Path]:
    """One or several, as a list."""
    return [given] if isinstance(given, str | Path) else list(given)


def find_sources(given: Given) -> list[Source]:
    """What ``given`` names, in this order; the files of a folder, and of the folders in it, by name.

    Raises ``ValueError`` for what is not there or cannot be text, by its name.
    """
    several = listed(given)
    if not several:
        raise ValueError("no text is given")
    if several.count(STANDARD_INPUT) > 1:
        raise ValueError("standard input (-) can be read only once")
    return [source for one in several for source in _find(str(one))]


def _find(given: str) -> list[Source]:
    if given == STANDARD_INPUT:
        return [File(None)]
    path = Path(given).expanduser()
    if given and path.is_dir():
        return _folder(path)
    if given and path.exists():
        return [_file(path)]
    dataset = _DATASET.fullmatch(given)
    if dataset is None:
        raise ValueError(f"{given}: no such text file")
    return [Dataset(given, dataset["repository"], dataset["config"] or None, dataset["split"] or "train")]


def _file(path: Path) -> File:
    suffix = _suffix(path)
    if suffix in _TABLES:
        raise ValueError(f"{path}: {suffix} files are not read as text; give {READABLE}")
    return File(path, KINDS.get(suffix))


def _folder(folder: Path) -> list[Source]:
    """Files that are hidden or a README.md are left out; any other that is no text is an error."""
    inside = sorted(p for p in folder.rglob("*") if p.is_file())
    paths = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    paths = [p for p in paths if p.name.lower() != "readme.md"]
    for path in paths:
        if _suffix(path) not in KINDS:
            raise ValueError(f"{path}: of a folder only {READABLE} are read; name the files that you mean")
    if not paths:
        raise ValueError(f"{folder}: the folder holds no text ({READABLE})")
    return [_file(path) for path in paths]


def _suffix(path: Path) -> str:
    """The last suffix but ``.gz``, in small letters."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix
