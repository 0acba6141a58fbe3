"""The table of both models: pairs of seeds, ratios, goals that are missed and said to be."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import frontier_goals, speeches_text
from benchmarks.accuracy.frontier_goals import Comparison, Setting, side_by_side
from benchmarks.accuracy.frontier_report import Figures


def run(wikipedia: float, novel: float, seconds: float = 100.0) -> dict[str, Any]:
    return {
        "cost": {"prune_seconds": seconds},
        "test/wikipedia": {"nll": 2.5 + wikipedia, "reference_nll": 2.5},
        "test/fiction": {"nll": 3.0 + novel},
        "valid/speeches": {"nll": 0.0},
    }


RUNS = {
    "dense/0": run(0.5, 0),  # as measured with other arithmetic: the reference of each run counts
    "guided0.5/0": run(0.10, 0.30, 150),
    "guided0.5/1": run(0.12, 0.20, 250),
    "guided0.5/2": run(9.0, 9.0, 200),  # nothing to hold it against
    "spensegpt+0.5/0": run(0.20, 0.25),
    "spensegpt+0.5/1": run(0.20, 0.25),
}
SETTING = Setting("smollm2", "Small", 0.5, 0.56)


def test_seeds_are_compared_in_pairs() -> None:
    found = Comparison(SETTING, Figures({"runs": RUNS}, "test"))
    assert found.ratio("wikipedia") == pytest.approx(0.55)
    assert found.ratio("fiction") == pytest.approx(1.0)
    assert found.ratio("speeches") is None, "measured on another split"
    assert found.worse() == 1
    assert found.seconds() == pytest.approx(2.0)


def test_a_missed_goal_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier_goals, "SETTINGS", [SETTING, Setting("gemma", "Other", 0.25, 0.5)])
    heading, _, line, empty = side_by_side({"smollm2": {"runs": RUNS}, "gemma": {"runs": {}}}).splitlines()
    assert heading.startswith("| model | seeds | SpenseGPT+, nats | `guided`, nats | Wikipedia:")
    assert line.startswith("| Small, 25 % | 2 | 0.200 | 0.110 ± 0.014 | 0.55 (goal 0.56: met)")
    assert line.endswith("| – | 1 of 4 | 2.0× (goal 2: met) |")
    assert empty == "| Other, 37.5 % | 0 | – | – | – | – | – | 0 of 0 | – |"
    monkeypatch.setattr(frontier_goals, "SETTINGS", [Setting("smollm2", "Small", 0.5, 0.54)])
    assert "0.55 (goal 0.54: **missed**)" in side_by_side({"smollm2": {"runs": RUNS}})


def archive(files: dict[str, str]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return content.getvalue()


def test_speeches_are_whole_words_of_the_middle() -> None:
    words = [f"w{i}" for i in range(1200)]
    words[610] = "end."
    files = {
        "package/data/1944_a_b.txt": "too old",
        "package/data/1961_c_d.json": "{}",
        "package/data/1961_c_d.txt": " ".join(words),
        "package/data/1999_e_f.txt": " ".join(f"v{i}" for i in range(300)),
        "package/data/../../1999_x.txt": "elsewhere",
    }
    found = speeches_text.read_addresses(archive(files))
    assert set(found) == {"1961_c_d.txt", "1999_e_f.txt"}
    paragraphs = speeches_text.joined(found).split("\n\n")
    by_start = {paragraph.split()[0]: paragraph.split() for paragraph in paragraphs}
    assert by_start["w611"] == words[611:1111]
    assert by_start["v150"] == [f"v{i}" for i in range(150, 300)], "no end of a sentence: from the middle"
    first = min(found, key=lambda name: hashlib.sha1(name.encode()).digest())
    assert paragraphs[0].split()[0] == {"1961_c_d.txt": "w611", "1999_e_f.txt": "v150"}[first]


def test_another_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / speeches_text.ARCHIVE
    path.parent.mkdir(parents=True)
    path.write_bytes(archive({"package/data/1961_c_d.txt": "text"}))
    monkeypatch.setattr(speeches_text, "REGISTRY", tmp_path.as_uri())
    with pytest.raises(RuntimeError, match="SHA-256"):
        speeches_text.fetch_speeches(tmp_path / "assets", lambda _: None)
    assert not list((tmp_path / "assets").iterdir())
    path.unlink()
    with pytest.raises(RuntimeError, match="did not arrive"):
        speeches_text.fetch_speeches(tmp_path / "assets", lambda _: None)
