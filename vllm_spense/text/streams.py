"""Bytes of a file, unpacked and decoded: plain text in pieces, lines, or the whole of it."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, BinaryIO

from vllm_spense.text.sources import File

PIECE = 1 << 20
"""Characters of a plain text that are in memory at once."""
_GZIP = b"\x1f\x8b"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class _Hashed(io.RawIOBase):
    """A stream whose bytes go into ``digest`` as they are read."""

    def __init__(self, stream: BinaryIO, digest: Any) -> None:
        self._stream, self._digest = stream, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._digest.update(data)
        return len(data)


@contextmanager
def opened(file: File, digest: Any) -> Iterator[io.BufferedReader]:
    """The bytes of ``file``, unpacked if it is a gzip file, with a ``peek``.

    What is read of the file itself goes into ``digest``. Inside, whatever the file's content makes
    impossible is a ``ValueError`` that names it.
    """
    try:
        with _raw(file) as raw:
            stream: Any = io.BufferedReader(_Hashed(raw, digest), PIECE)
            if stream.peek(2)[:2] == _GZIP:
                stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), PIECE)
            yield stream
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.place}: the text is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file.place}: the gzip file is damaged ({error})") from None
    except OSError as error:
        raise ValueError(f"{file.place}: the text cannot be read ({error.strerror or error})") from None


def text_of(file: File, stream: io.BufferedReader) -> io.TextIOWrapper:
    """``stream`` decoded: UTF-8 with or without a byte-order mark, every kind of line end as ``\\n``."""
    if stream.peek(2)[:2] in _UTF16:
        raise ValueError(f"{file.place}: the text is not UTF-8 (it looks like UTF-16: save it as UTF-8)")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=None)


def pieces_of(file: File, stream: io.BufferedReader) -> Iterator[str]:
    """A plain text, :data:`PIECE` by piece. Raises ``ValueError`` for binary files."""
    text = text_of(file, stream)
    while piece := text.read(PIECE):
        if "\0" in piece:
            raise ValueError(f"{file.place}: this is a binary file, not text")
        yield piece


def _raw(file: File) -> AbstractContextManager[BinaryIO]:
    if file.path is not None:
        return file.path.open("rb")
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("standard input (-) is no file and no pipe: give it a text")
    return nullcontext(sys.stdin.buffer)
