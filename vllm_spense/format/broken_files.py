"""What stands where a file should be: an LFS pointer, a web page, half a download, another format."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import NamedTuple

DOWNLOAD = "download or copy the model again"
_POINTERS = {
    b"version https://git-lfs": "a Git LFS pointer",
    b"# xet version": "a pointer of Xet",
    b"/annex/objects/": "a pointer of git-annex",
}
_CONTAINERS = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x80\x02": "a pickle",
}
_HEADER_LIMIT = 100_000_000
"""safetensors refuses longer headers."""


class Diagnosis(NamedTuple):
    """What is wrong with a file, and how it is mended."""

    problem: str
    fix: str


EMPTY = Diagnosis("the file is empty", DOWNLOAD)


def diagnose(path: Path) -> Diagnosis | None:
    """Why ``path`` cannot be what its name says, as far as its first bytes and its size tell; else None.

    Never raises and never waits: a pipe or a device is not opened. Of a safetensors file header and size are
    compared as well.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return None
        with path.open("rb") as stream:
            start = stream.read(512)
    except FileNotFoundError:
        if os.path.islink(path):
            problem = "the link leads to nothing: the download did not finish, or the cache was cleared"
            return Diagnosis(problem, DOWNLOAD)
        return Diagnosis("the file is missing", "give a Hugging Face model directory")
    except (OSError, ValueError):
        return None
    if not start:
        return EMPTY
    for magic, what in _POINTERS.items():
        if start.startswith(magic):
            fix = "fetch the files themselves (`git lfs install && git lfs pull`), or " + DOWNLOAD
            return Diagnosis(f"this is {what}, not the file itself", fix)
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return Diagnosis("this is a web page (an error or a login), not the file itself", DOWNLOAD)
    return _weights(path, start, status.st_size) if path.suffix == ".safetensors" else None


def _weights(path: Path, start: bytes, size: int) -> Diagnosis | None:
    for magic, what in _CONTAINERS.items():
        if start.startswith(magic):
            return Diagnosis(f"this is {what} under the name of a safetensors file", DOWNLOAD)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > _HEADER_LIMIT:
        return None  # no header to compare with; safetensors says so
    needed = 8 + length
    if size >= needed:
        try:
            with path.open("rb") as stream:
                header = json.loads(stream.read(needed)[8:])
            needed += max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return None
    if size < needed:
        problem = f"the file ends after {size} of {needed} bytes, as if a download was cut off"
        return Diagnosis(problem, DOWNLOAD)
    return None
