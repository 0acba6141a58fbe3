"""The benchmark of thresholds: rows of a tiny model, resuming, the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy import sparsify
from benchmarks.common.results import read
from tests.tiny import make_llama
from tests.tiny_text import add_tokenizer, write_text


def test_rows_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsify, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(sparsify, "LEVELS", (0.4,))
    monkeypatch.setattr(sparsify, "TOKENS", {"wikipedia": 512, "novel": 256})
    monkeypatch.setattr(sparsify, "WINDOW", 64)
    add_tokenizer(make_llama(tmp_path / "tiny", bias=False))
    texts = {name: tmp_path / name for name in ("wikipedia", "novel")}
    for text in texts.values():
        text.mkdir()
        for split in ("train", "test"):
            write_text(text / f"{split}.txt")
    sparsify.measure(tmp_path / "tiny", texts, tmp_path / "work")
    found = read(tmp_path / "results.json")
    assert list(found["tiny"]) == ["dense", "uniform/0.4", "loss/0.4"]
    for row in ("uniform/0.4", "loss/0.4"):
        assert found["tiny"][row]["skipped"] == pytest.approx(0.4, abs=0.05)
        assert found["tiny"][row]["divergence"] > 0
    assert found["tiny"]["uniform/0.4"]["most"] - found["tiny"]["uniform/0.4"]["least"] < 0.1
    sparsify.measure(tmp_path / "tiny", texts, tmp_path / "work")
    assert read(tmp_path / "results.json") == found
    lines = sparsify.report(found).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| tiny | 40% | the same share in each layer | ")
    change = found["tiny"]["loss/0.4"]["novel"] - found["tiny"]["dense"]["novel"]
    assert lines[3].endswith(f"| {change:+.3f} |")
