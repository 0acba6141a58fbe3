"""The loop over points of GPU benchmarks, without a GPU: what is kept, measured again and loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.common.results import read, write
from benchmarks.kernels import four_bit, points, sparse_mlp
from benchmarks.kernels.points import Point, line_of, times_of

POINTS = [Point("a/1", "a", (1,)), Point("a/2", "a", (2,)), Point("b/1", "b", (1,))]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs points; gives what was loaded and measured, in order, and the rows."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def run(sources: str, budget: float = 60.0) -> tuple[list[str], dict[str, Any]]:
        events: list[str] = []

        def load(group: str) -> str:
            events.append(f"load {group}")
            return group

        def measure(loaded: str, tokens: int) -> dict[str, Any]:
            events.append(f"{loaded} {tokens}")
            return {"ours": 10.0 * tokens}

        options = argparse.Namespace(budget=budget, results=tmp_path / "rows.json")
        points.run(POINTS, load, measure, options, sources)
        return events, read(options.results).get("rows", {})

    return run


def test_each_point_is_measured_and_weights_stay_within_a_group(done: Any) -> None:
    events, rows = done("one")
    assert events == ["load a", "a 1", "a 2", "load b", "b 1"]
    assert {key: row["us"] for key, row in rows.items()} == {
        "a/1": {"ours": 10.0},
        "a/2": {"ours": 20.0},
        "b/1": {"ours": 10.0},
    }
    assert all(row["device"] == "a GPU" and row["sources"] == "one" for row in rows.values())


def test_rows_of_the_same_sources_are_kept_and_others_are_not(done: Any, tmp_path: Path) -> None:
    done("one")
    assert done("one")[0] == []
    rows = read(tmp_path / "rows.json")
    rows["rows"]["a/2"]["sources"] = "older"
    write(tmp_path / "rows.json", rows)
    assert done("one")[0] == ["load a", "a 2"]


def test_nothing_begins_when_the_budget_is_used_up(done: Any, capsys: pytest.CaptureFixture[str]) -> None:
    events, rows = done("one", budget=0.0)
    assert events == []
    assert rows == {}
    assert "3 points left" in capsys.readouterr().out


def test_what_fails_makes_a_cell_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "time_graph", lambda calls: 1.23456)

    def fails() -> points.Calls:
        raise ValueError("wrong\nresult " + "x" * 400)

    times = times_of({"ours": list, "theirs": fails})
    assert times["ours"] == 1.23
    assert times["theirs"].startswith("ValueError: wrong result x")
    assert len(times["theirs"]) == 300
    line = line_of("layer/1", times)
    assert "ours 1.2 µs" in line
    assert "theirs: ValueError" in line


@pytest.mark.parametrize("benchmark", [four_bit, sparse_mlp])
@pytest.mark.parametrize("tokens", ["0", "513"])
def test_token_counts_that_are_not_there(
    benchmark: ModuleType, tokens: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--tokens", tokens])
    assert stop.value.code == 2
    assert "--tokens: from 1 to" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", [four_bit, sparse_mlp])
def test_without_a_gpu_nothing_is_measured(benchmark: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="timing needs a CUDA device"):
        benchmark.main([])
