"""Markdown tables, and the markers between which documents take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without a line feed at its end."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def insert(path: Path, name: str, block: str) -> None:
    """:func:`fill` a file, if it has the markers."""
    text = path.read_text()
    if f"<!-- {name}:begin -->" in text and f"<!-- {name}:end -->" in text:
        path.write_text(fill(text, name, block))


def fill(text: str, name: str, block: str) -> str:
    """A document with ``block`` between ``<!-- name:begin -->`` and ``<!-- name:end -->``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end, 1)[1]}"
