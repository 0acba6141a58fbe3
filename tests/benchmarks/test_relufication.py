"""The benchmark of ReLU gates in a SiLU model: rows of a tiny model, resuming, the table, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import relufication
from benchmarks.accuracy.relufication import Row
from benchmarks.common.results import read
from tests.tiny import make_llama
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.recovery.training import RecoveryError

ROWS = (Row(0), Row(12, 3e-4), Row(12, 3e-4, 0.5))


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(relufication, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(relufication, "ROWS", ROWS)
    monkeypatch.setattr(relufication, "TOKENS", {"wikipedia": 512, "novel": 256})
    monkeypatch.setattr(relufication, "WINDOW", 64)
    add_tokenizer(make_llama(tmp_path / "tiny", bias=False))
    texts = {name: tmp_path / name for name in ("wikipedia", "novel")}
    for text in texts.values():
        text.mkdir()
        for split in ("train", "test"):
            write_text(text / f"{split}.txt")

    def run() -> dict[str, Any]:
        relufication.measure(tmp_path / "tiny", texts, tmp_path / "work", list(ROWS))
        return read(tmp_path / "results.json")["tiny"]

    return run


def test_rows_and_table(measure: Any) -> None:
    found = measure()
    assert list(found) == ["dense", "0/0.0001/0", "12/0.0003/0", "12/0.0003/0.5"]
    untrained, trained, penalised = (found[row.key] for row in ROWS)
    assert untrained["wikipedia"] != found["dense"]["wikipedia"]
    assert trained["wikipedia"] != untrained["wikipedia"]
    assert 0 < penalised["density"] < trained["density"] < 1
    assert all(entry["least"] <= entry["density"] <= entry["most"] for entry in (untrained, trained))
    assert measure() == found
    lines = relufication.report({"tiny": found}).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("| tiny | 0 | – | – | ")
    assert lines[4].startswith("| tiny | 12 | 0.0003 | 0.5 | ")
    change = penalised["novel"] - found["dense"]["novel"]
    assert lines[4].endswith(f"| {change:+.3f} |")


def test_a_run_that_the_guard_refuses_is_a_row(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: object) -> None:
        raise RecoveryError("the loss rose")

    monkeypatch.setattr(relufication, "recover", refuses)
    found = measure()
    assert found["12/0.0003/0"]["refused"] == "the loss rose"
    assert "| tiny | 12 | 0.0003 | 0 | refused |" in relufication.report({"tiny": found})
