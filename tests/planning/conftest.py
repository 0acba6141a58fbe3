"""No tuning table of this machine, or of the package, enters a test that did not write it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_spense.ops.linear import table


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of the user's tuning tables, empty."""
    directory = tmp_path / "tables"
    monkeypatch.setenv("SPENSE_TUNING_DIR", str(directory))
    monkeypatch.setattr(table, "PACKAGED", tmp_path / "packaged")
    table.measured.cache_clear()
    yield directory
    table.measured.cache_clear()
