"""Options about text, which several commands have."""

from __future__ import annotations

from typing import Annotated, overload

import typer

from vllm_spense.cli.options import option
from vllm_spense.pruning.config import CALIBRATION, PruneConfig
from vllm_spense.text.bos import Bos

TEXT = typer.Option("--text", help=f"Held out. {CALIBRATION}", show_default=False)
ColumnOption = Annotated[
    str | None, option("text_column", PruneConfig.model_fields["text_column"], show_default=False)
]
StartOption = Annotated[Bos, option("bos", PruneConfig.model_fields["bos"])]


@overload
def one_or_all(sources: list[str]) -> str | tuple[str, ...]: ...
@overload
def one_or_all(sources: list[str] | None) -> str | tuple[str, ...] | None: ...
def one_or_all(sources: list[str] | None) -> str | tuple[str, ...] | None:
    """One source as it is, several as a tuple."""
    if not sources:
        return None
    return sources[0] if len(sources) == 1 else tuple(sources)
