"""Results survive a kill, and fingerprints follow contents."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import results as results_file


def test_results_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    results_file.write(path, {"rows": [1]})
    assert results_file.read(path) == {"rows": [1]}
    path.write_text('{"rows": [')
    assert results_file.read(path) == {}
    assert results_file.read(tmp_path / "none.json") == {}


def test_fingerprints_follow_contents(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text("1")
    before = results_file.fingerprint([tmp_path])
    (tmp_path / "a.cu").write_text("2")
    assert results_file.fingerprint([tmp_path]) != before
    (tmp_path / "a.cu").write_text("1")
    (tmp_path / "notes.txt").write_text("does not count")
    assert results_file.fingerprint([tmp_path]) == before
