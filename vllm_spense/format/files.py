"""Writing to a file system: errors that name a way on, and files that are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the file system refuses inside becomes an ``OSError`` that names ``path`` and a way on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # a message of our own
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"{path} cannot be written ({reason}): free space on its disk, or choose another output directory"
        ) from error


def sync(path: Path) -> None:
    """Bring a file, or a directory's list of names, to the disk, where the file system knows how to."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def open_to_all(path: Path) -> None:
    """Let everybody read ``path``, whatever the umask is, where the file system has modes."""
    with suppress(OSError):
        path.chmod(0o755 if path.is_dir() else 0o644)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that is whole or not there: under a hidden name beside ``path``, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(storable(text), encoding="utf-8")
    partial.replace(path)


def storable(text: str) -> str:
    """``text`` as UTF-8 can hold it, for what names of files bring.

    Python reads the bytes that a locale cannot decode as lone surrogates. They become the characters that
    they are in UTF-8, or else escapes.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that are no bytes of a name
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
