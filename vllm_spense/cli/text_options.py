"""Options about text, which several commands have."""

from __future__ import annotations

from typing import Annotated, Literal, overload

import typer

_SOURCES = "Text: .txt, .jsonl, .json, .parquet, .gz of these, a folder, - or a hub dataset; repeat for more"
CALIBRATION = typer.Option("--calibration", help=_SOURCES, show_default=False)
TEXT = typer.Option("--text", help=f"Held out. {_SOURCES}", show_default=False)
ColumnOption = Annotated[
    str | None,
    typer.Option(
        "--text-column",
        help="Of rows \\[default: text, messages, conversations, or prompt and completion]",
        show_default=False,
    ),
]
StartOption = Annotated[
    Literal["auto", "always", "never"],
    typer.Option("--bos", help="Start windows with the BOS token; auto: where serving does"),
]


@overload
def one_or_all(sources: list[str]) -> str | tuple[str, ...]: ...
@overload
def one_or_all(sources: list[str] | None) -> str | tuple[str, ...] | None: ...
def one_or_all(sources: list[str] | None) -> str | tuple[str, ...] | None:
    """One source as it is, several as a tuple."""
    if not sources:
        return None
    return sources[0] if len(sources) == 1 else tuple(sources)
