"""The kernel benchmark without a GPU: a measuring process that hangs, dies or is slow, and what is kept."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import shapes as kernel_shapes
from benchmarks.kernels.entries import describe_row, finished
from benchmarks.kernels.recorder import Parts, Recorder, measure_rows
from benchmarks.kernels.shapes import Device, Row
from benchmarks.kernels.spense_linear import parts_of
from vllm_spense.ops.linear.configs import KernelConfig

WORKER = """
import json, os, sys, time
def emit(event, **fields): print("@@ " + json.dumps({"event": event} | fields), flush=True)
print("some library says hello", flush=True)
emit("ready", bandwidth=4.3e12)
for job in json.load(open(sys.argv[1])):
    emit("row", key=job["key"])
    for name in job["parts"]:
        emit("begin", key=job["key"], part=name)
        if name == BAD and job["tokens"] == 8:
            if HOW == "hang": time.sleep(600)
            if HOW == "crash": os.abort()
            emit("end", key=job["key"], part=name, result={"error": "illegal access"}, lost=True)
            os._exit(86)
        if HOW == "slow": time.sleep(0.3)
        result = {"error": "no such library"} if name == "paper" else {"us": 100.0 if ":" in name else 120.0}
        emit("end", key=job["key"], part=name, result=result)
    emit("done", key=job["key"])
"""


def worker(tmp_path: Path, how: str, bad: str = "") -> list[str]:
    """A stand-in for the measuring process that misbehaves at one part of the rows with 8 tokens."""
    path = tmp_path / "worker.py"
    path.write_text(f"HOW, BAD = {how!r}, {bad!r}\n{WORKER}")
    return [sys.executable, str(path)]


ROWS = kernel_shapes.rows()


H200 = Device()


FACTS = {"device": "Synthetic GPU, not a measurement", "kernels": "abc", "commit": "none", "versions": {}}


def recorder(count: int = 4, skipped: dict | None = None, facts: dict[str, Any] = FACTS) -> Recorder:
    plan: dict[str, tuple[Row, Parts]] = {row.key: (row, parts_of(row, H200, {})) for row in ROWS[:count]}
    return Recorder(plan, skipped or {}, facts)


@pytest.mark.parametrize("how", ["hang", "crash", "lost"])
def test_a_part_that_hangs_or_dies_costs_itself_only(tmp_path: Path, how: str) -> None:
    bad = "ours:sm90-64x8-c4"
    saved: list[dict[str, Any]] = []
    state = recorder()
    start = time.monotonic()
    end = measure_rows(
        state,
        budget=60,
        save=saved.append,
        say=lambda line: None,
        command=worker(tmp_path, how, bad),
        silent=1.5,
    )
    assert end == "all rows measured"
    assert time.monotonic() - start < 20
    assert [row["tokens"] for row in saved] == [1, 8, 16, 32]
    assert "us" in saved[0]["ours"]["sm90-64x8-c4"]
    message = {"hang": "silent for", "crash": "SIGABRT", "lost": "illegal access"}[how]
    assert message in saved[1]["ours"]["sm90-64x8-c4"]["error"]
    assert saved[1]["us"] == 100.0, "the row's other configurations were measured"
    assert saved[1]["baselines"]["paper"] == {"error": "no such library"}
    assert saved[1]["times_dense"] == 1.2


def test_what_broke_once_is_not_tried_again(tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    command = worker(tmp_path, "crash", "slide_sparse")
    measure_rows(recorder(), budget=60, save=saved.append, say=lambda line: None, command=command, silent=5)
    assert "error" in saved[1]["baselines"]["slide_sparse"]
    for row in saved[2:]:
        assert "crashed in Qwen3-32B/gate_up/0.5/8" in row["baselines"]["slide_sparse"]["skipped"]


def test_the_time_is_kept_and_finished_rows_are_saved(tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    start = time.monotonic()
    state = recorder(50)
    end = measure_rows(
        state, budget=7, save=saved.append, say=lambda line: None, command=worker(tmp_path, "slow")
    )
    assert time.monotonic() - start < 13
    assert "the 7 s are over" in end
    assert 1 <= len(saved) < 5
    assert f"{50 - len(saved)} rows are left" in end


def test_skipped_configurations_say_why(tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    key = ROWS[0].key
    skipped = {(key, "ours:sm90-64x8-c1"): "group sparse_tile failed"}
    measure_rows(
        recorder(1, skipped),
        budget=30,
        save=saved.append,
        say=lambda line: None,
        command=worker(tmp_path, ""),
    )
    assert saved[0]["ours"]["sm90-64x8-c1"] == {"skipped": "group sparse_tile failed"}
    assert saved[0]["us"] == 100.0


def test_a_measuring_process_that_cannot_start_is_not_tried_forever(tmp_path: Path) -> None:
    end = measure_rows(
        recorder(2),
        budget=30,
        save=print,
        say=lambda line: None,
        command=[sys.executable, "-c", "import nothing_of_that_name"],
    )
    assert "failed" in end
    assert "nothing_of_that_name" in end


def test_finished_rows_are_kept_until_the_kernels_change() -> None:
    row = ROWS[0]
    parts = parts_of(row, H200, {})
    results = {name: {"us": 1.0} for name in parts}
    stored = describe_row(row, results, 4e12, FACTS)
    assert finished(stored, parts, "abc")
    assert not finished(stored, parts, "other kernels")
    assert not finished(stored, parts | {"ours:new": KernelConfig("sm90", 64, 8)}, "abc")
    assert not finished({}, parts, "abc")
    stored["baselines"]["vllm_cutlass"] = {"error": "ModuleNotFoundError: No module named 'vllm'"}
    assert finished(stored, parts, "abc")
    assert not finished(stored, parts, "abc", vllm=True), "vLLM has come since"
