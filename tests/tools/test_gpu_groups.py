"""The groups of GPU tests without a GPU: order, resuming, crashes, sanitizers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.results import ROOT
from tools.gpu import groups as gpu_tests
from tools.gpu.groups import GROUPS, Group, run_group, run_groups


def test_groups_hold_every_gpu_test_and_nothing_else() -> None:
    for file in {group.file for group in GROUPS}:
        found = set(re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.M))
        assert {test for group in GROUPS if group.file == file for test in group.tests} == found
    assert {group.file for group in GROUPS} == {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py")
    }


def test_groups_come_after_what_they_need() -> None:
    names = [group.name for group in GROUPS]
    assert names[0] == "sparse_tile"
    assert len(names) == len(set(names))
    for i, group in enumerate(GROUPS):
        assert {*group.needs, *group.after} <= set(names[:i]), group.name


def entry(state: str, **fields: Any) -> dict[str, Any]:
    return {"state": state, "passed": 1, **fields}


def pretend(states: dict[str, str], ran: list[str]) -> Any:
    def run(group: Group, **_: Any) -> dict[str, Any]:
        ran.append(group.name)
        return entry(states.get(group.name, "passed"))

    return run


def test_a_failed_group_stops_only_what_needs_it() -> None:
    ran: list[str] = []
    saved: list[dict[str, Any]] = []
    entries = run_groups(
        GROUPS,
        {},
        left=lambda: 100,
        save=lambda e: saved.append(dict(e)),
        say=lambda line: None,
        run=pretend({"sparse_tile": "failed"}, ran),
        jobs=3,
    )
    assert ran[0] == "sparse_tile"
    assert {"dense_tile", "multicast", "host", "triton", "memcheck"} <= set(ran)
    assert {entries[n]["state"] for n in ("output_split", "split_k", "ragged", "operator")} == {"skipped"}
    assert saved[-1] == entries
    assert set(entries) == {group.name for group in GROUPS}


def test_a_partly_failed_group_stops_nothing() -> None:
    ran: list[str] = []
    run_groups(
        GROUPS,
        {},
        left=lambda: 100,
        save=lambda e: None,
        say=lambda line: None,
        run=pretend({"sparse_tile": "partly"}, ran),
    )
    assert sorted(ran) == sorted(group.name for group in GROUPS)


def test_passed_groups_are_kept_and_the_others_run_again() -> None:
    ran: list[str] = []
    done = {"sparse_tile": entry("passed"), "dense_tile": entry("failed"), "memcheck": entry("clean")}
    entries = run_groups(
        GROUPS[:3],
        done,
        left=lambda: 100,
        save=lambda e: None,
        say=lambda line: None,
        run=pretend({}, ran),
    )
    assert ran == ["dense_tile", "output_split"]
    assert entries["sparse_tile"] == done["sparse_tile"]


def test_without_time_groups_are_not_run() -> None:
    ran: list[str] = []
    entries = run_groups(
        GROUPS, {}, left=lambda: 3, save=lambda e: None, say=lambda line: None, run=pretend({}, ran)
    )
    assert not ran
    assert {e["state"] for e in entries.values()} <= {"not run"}


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """GPU tests run in child processes on the CPU, the definition in the kernel's place."""
    monkeypatch.setenv("SPENSE_GPU_REHEARSAL", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return monkeypatch


SMALL = Group("small", ("test_small_cases_for_the_sanitizer",), silent=60)


def test_a_group_goes_on_behind_a_crash_without_that_configuration(rehearsal: pytest.MonkeyPatch) -> None:
    rehearsal.setenv("SPENSE_GPU_REHEARSAL", "crash")
    said: list[str] = []
    result = run_group(SMALL, left=lambda: 100, say=said.append)
    assert result["state"] == "partly"
    assert result["broke"] == ["sm90-64x16-c2"]
    assert result["configs"]["sm90-64x16-c2"] == {"passed": 0, "failed": 1}
    assert result["configs"]["sm90-128x16-c2"]["passed"] > 1, "tests behind the crash ran"
    assert "died of SIGABRT" in result["failures"][0]["message"]
    assert any("SIGABRT" in line for line in said)


def test_a_wrong_kernel_fails_with_a_diagnosis(rehearsal: pytest.MonkeyPatch) -> None:
    rehearsal.setenv("SPENSE_GPU_REHEARSAL", "skip-column")
    said: list[str] = []
    group = Group("sparse", ("test_sparse_tile[128x256-t8-sm90-64x8-c1]",), silent=60)
    result = run_group(group, left=lambda: 100, say=said.append)
    assert (result["state"], result["failed"]) == ("failed", 1)
    assert re.search(r"k=5: \d+ of 128 rows", said[0])
    assert "wrong columns: 5" in said[0]
    assert result["error"] > 1e-2


def test_a_group_that_does_not_apply_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("SPENSE_GPU_REHEARSAL", raising=False)
    result = run_group(SMALL, left=lambda: 60, say=lambda line: None)
    assert result["state"] == "not run"
    assert "needs a CUDA device" in result["reason"]


def test_messages_of_sanitizers_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '========= Error: Device not supported'\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_tests, "find_sanitizer", lambda: str(tool))
    group = next(group for group in GROUPS if group.sanitizer == "memcheck")
    result = run_group(group, left=lambda: 60, say=lambda line: None)
    assert result["state"] == "unavailable"
    assert "not supported" in result["reason"]
    monkeypatch.setattr(gpu_tests, "find_sanitizer", lambda: None)
    assert run_group(group, left=lambda: 60, say=print)["state"] == "unavailable"
