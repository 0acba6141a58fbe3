"""Sources to one text, read from its start to its end, and the record of what was read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_spense.format.files import storable
from vllm_spense.text.columns import choose, row_text
from vllm_spense.text.rows import (
    Row,
    dataset_rows,
    json_document,
    json_lines,
    kind_of,
    parquet_rows,
)
from vllm_spense.text.sources import Dataset, File, Source
from vllm_spense.text.streams import PIECE, opened, pieces_of

BETWEEN = "\n\n"
"""Between two documents of a text. Chats follow each other as the template ends and begins them."""


@dataclass(frozen=True)
class Piece:
    """Some characters; ``first``: a document begins here; ``chat``: they come from a chat template."""

    text: str
    first: bool
    chat: bool = False


@dataclass(frozen=True)
class TextRecord:
    """What provenance says of a text.

    ``sha256``: of the files' bytes one behind the other (of the text itself for a dataset of the hub).
    ``column`` and ``documents``: where it came from rows or several files. ``bos``: what opens its windows.
    ``pieces``: how many random pieces of a very long text were used; None for all of it.
    """

    source: str | list[str]
    sha256: str
    column: str | None = None
    documents: int | None = None
    pieces: int | None = None
    bos: str | None = None

    @classmethod
    def of(cls, sources: Sequence[Source]) -> TextRecord:
        """What can be said before anything is read."""
        names = [storable(source.name) for source in sources]
        return cls(names[0] if len(names) == 1 else names, "0" * 64)

    def dump(self) -> dict[str, Any]:
        """Only what there is to say: for a plain text file source and hash."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def names(self) -> str:
        """For a sentence: all of them, or the first where there are many."""
        if isinstance(self.source, str):
            return self.source
        some = ", ".join(self.source[:4])
        return some if len(self.source) <= 4 else f"{some}, … ({len(self.source)} files)"


class Text:
    """The text of ``sources``, which can be read once.

    ``tokenizer``: of the model, whose chat template is used; ``column``: of rows, None for the first known.
    """

    def __init__(self, sources: list[Source], tokenizer: Any, column: str | None = None) -> None:
        self.sources = sources
        self._tokenizer = tokenizer
        self._column = column
        self._digest = hashlib.sha256()
        self._columns: dict[str, None] = {}  # in the order in which they came
        self._documents = 0

    def pieces(self) -> Iterator[Piece]:
        """All documents, in pieces; those without a character that can be seen are left out.

        Raises ``ValueError`` for what cannot be read, naming file and row.
        """
        for source in self.sources:
            for piece in self._dataset(source) if isinstance(source, Dataset) else self._file(source):
                self._documents += piece.first
                yield piece

    def chunks(self) -> Iterator[str]:
        """The documents as one text, a blank line between them where they are not chats."""
        return joined(self.pieces())

    def record(self) -> TextRecord:
        """What was read, when it is at its end."""
        plain = len(self.sources) == 1 and not self._columns
        return replace(
            TextRecord.of(self.sources),
            sha256=self._digest.hexdigest(),
            column=", ".join(self._columns) or None,
            documents=None if plain else self._documents,
        )

    def _dataset(self, dataset: Dataset) -> Iterator[Piece]:
        before: Piece | None = None
        for piece in self._rows(dataset, dataset_rows(dataset, lambda names: self._needed(dataset, names))):
            self._digest.update((_between(before, piece) + piece.text).encode())
            before = piece
            yield piece

    def _file(self, file: File) -> Iterator[Piece]:
        with opened(file, self._digest) as stream:
            kind = kind_of(stream, file.kind)
            if kind == "text":
                for number, piece in enumerate(pieces_of(file, stream)):
                    yield Piece(piece, first=number == 0)
            elif kind == "parquet":
                if file.path is None or not file.path.is_file():
                    raise ValueError(f"{file.place}: parquet cannot be read from a pipe; name the file")
                while stream.read(PIECE):  # for its hash; pyarrow finds its own way through the file
                    pass
                yield from self._rows(file, parquet_rows(file, lambda names: self._needed(file, names)))
            else:
                read = json_document if kind == "json" else json_lines
                yield from self._rows(file, read(file, stream))

    def _needed(self, source: Source, names: list[str]) -> list[str]:
        """Those of a table's columns that the text is made of."""
        try:
            return list(choose(names, self._column))
        except ValueError as error:
            raise ValueError(f"{source.place}: {error}") from None

    def _rows(self, source: Source, rows: Iterator[Row]) -> Iterator[Piece]:
        for number, row in rows:
            try:
                if not isinstance(row, dict):
                    raise ValueError("an object with columns was expected")
                columns = choose(row, self._column)
                text, chat = row_text(row, columns, self._tokenizer)
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{source.place}, row {number}: half a surrogate pair is no text") from None
            except ValueError as error:
                raise ValueError(f"{source.place}, row {number}: {error}") from None
            self._columns["+".join(columns)] = None
            if text.strip():
                yield Piece(text, first=True, chat=chat)


def joined(pieces: Iterable[Piece]) -> Iterator[str]:
    """The text of ``pieces``, with what stands between documents."""
    before: Piece | None = None
    for piece in pieces:
        yield _between(before, piece) + piece.text
        before = piece


def _between(before: Piece | None, piece: Piece) -> str:
    return BETWEEN if piece.first and before is not None and not (before.chat and piece.chat) else ""
