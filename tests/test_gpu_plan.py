"""The GPU tests and the kernel benchmark without a GPU: plans, limits, resuming, diagnosis, reports."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.diagnosis import probe_columns, wrong

from benchmarks import gpu_tests, kernel_shapes, kernel_spense_linear, results_file
from benchmarks.gpu_tests import GROUPS, Group, blocked, run_group, run_groups, untested
from benchmarks.kernel_report import report
from benchmarks.kernel_shapes import MODELS, Row, layer_spec
from benchmarks.kernel_spense_linear import Device, Parts, Recorder, finished, measure_rows, parts_of
from benchmarks.results_file import ROOT
from benchmarks.supervise import supervise
from benchmarks.tune_layers import missing
from vllm_spense.ops.linear.configs import KernelConfig, candidates, estimate, label

ROWS = kernel_shapes.rows()
H200 = Device()


def keys(rows: list[Row]) -> list[tuple[str, str, float]]:
    return list(dict.fromkeys((row.model, row.layer, row.ratio) for row in rows))


# --- what is measured, in which order -----------------------------------------------------------------------


def test_every_shape_ratio_and_token_count_is_planned_once() -> None:
    assert len(ROWS) == len({row.key for row in ROWS}) == 4 * 4 * 3 * 12
    assert set(Counter(keys(ROWS))) == {
        (model.name, layer, ratio)
        for model in MODELS
        for layer in ("gate_up", "down", "qkv", "o")
        for ratio in (0.5, 0.25, 0.0)
    }


def test_the_mlp_of_qwen_comes_first_decode_before_prefill() -> None:
    mlp = {("Qwen3-32B", layer, ratio) for layer in ("gate_up", "down") for ratio in (0.5, 0.25)}
    decode = [row for row in ROWS if row.tokens <= 64 and (row.model, row.layer, row.ratio) in mlp]
    prefill = [row for row in ROWS if 64 < row.tokens <= 8192 and (row.model, row.layer, row.ratio) in mlp]
    first = len(decode)
    assert {row.key for row in ROWS[:first]} == {row.key for row in decode}
    assert {row.key for row in ROWS[first : first + len(prefill)]} == {row.key for row in prefill}
    assert ROWS[0].key == "Qwen3-32B/gate_up/0.5/1"
    assert all(row.tokens == 32768 for row in ROWS[-48:])


def test_rows_of_one_layer_stay_together() -> None:
    """New weights cost more than their timing."""
    changes = sum(a.spec != b.spec for a, b in itertools.pairwise(ROWS))
    assert changes < 2.5 * len({row.spec for row in ROWS})


def test_shapes_are_the_models_own() -> None:
    qwen, seed = MODELS[:2]
    assert layer_spec(qwen, "gate_up", 0.5).sparse_shape == (25600, 5120)
    assert layer_spec(qwen, "down", 0.25).sparse_shape == (5120, 19200)
    assert layer_spec(qwen, "qkv", 0).sparse_sizes == (8192, 1024, 1024)
    assert (layer_spec(seed, "o", 0.5).out_features, layer_spec(seed, "o", 0.5).in_features) == (5120, 10240)


@pytest.mark.parametrize("cutlass", [False, True])
def test_every_row_has_a_legal_configuration_with_a_finite_estimate(cutlass: bool) -> None:
    for row in ROWS:
        chosen = kernel_shapes.configs(row, cutlass=cutlass)
        assert chosen, row.key
        times = [estimate(row.spec, row.tokens, config, 132) for config in chosen]
        assert all(0 < seconds < 1 for seconds in times), row.key
        bound, _ = kernel_shapes.spense_work(row.spec, row.tokens).bound(4.3e12, 1979e12)
        assert 0 < bound <= max(times) * 1e6
        if row.tokens <= 128:
            assert set(chosen) == set(candidates(row.spec, row.tokens, (9, 0), cutlass))
        assert len({label(config) for config in chosen}) == len(chosen), "labels name configurations"


def test_limits_are_those_of_bytes_and_operations() -> None:
    spec = layer_spec(MODELS[0], "gate_up", 0.5)
    sparse, dense = (work(spec, 1) for work in (kernel_shapes.spense_work, kernel_shapes.dense_work))
    assert dense.bytes / sparse.bytes == pytest.approx(1 / (1 - 0.375 * 0.5), rel=2e-3)
    assert dense.operations / sparse.operations == pytest.approx(4 / 3)


def test_tuned_configurations_join_the_plan() -> None:
    row = next(r for r in ROWS if r.tokens == 2048)
    unusual = KernelConfig("sm90", 64, 128, 1)
    tuned = {(kernel_spense_linear.shape_of(row.spec), row.tokens): unusual}
    assert f"ours:{label(unusual)}" not in parts_of(row, H200, {})
    parts = parts_of(row, H200, tuned)
    assert parts[f"ours:{label(unusual)}"] == unusual
    assert {"scaled_mm", "vllm_cutlass", "paper", "slide_sparse"} <= set(parts)


def test_a_layer_without_all_buckets_is_tuned_again() -> None:
    specs = list(kernel_shapes.layer_specs())
    assert len(specs) == len(set(specs)) == 48
    assert missing(specs, None) == specs


# --- children under limits ----------------------------------------------------------------------------------


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-u", "-c", code, *arguments]


def alive(marker: str) -> bool:
    commands = (p / "cmdline" for p in Path("/proc").iterdir() if p.name.isdigit())
    for command in commands:
        try:
            if marker.encode() in command.read_bytes():
                return True
        except OSError:
            continue
    return False


def test_a_hanging_child_and_its_children_are_killed_at_the_limit(tmp_path: Path) -> None:
    marker = f"sleeper-{tmp_path.name}-{time.time_ns()}"
    sleep = "import sys, time; time.sleep(600)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {sleep!r}, {marker!r}]); "
    start = time.monotonic()
    ended = supervise(python(code + "print('up'); time.sleep(600)"), limit=2, on_line=lambda line: None)
    assert time.monotonic() - start < 10
    assert (ended.ok, ended.killed) == (False, True)
    assert "over its limit of 2 s" in ended.reason
    while alive(marker) and time.monotonic() - start < 10:  # signalled, but a busy machine takes its time
        time.sleep(0.1)
    assert not alive(marker)


def test_a_silent_child_is_killed_before_its_limit() -> None:
    start = time.monotonic()
    ended = supervise(
        python("print('one'); import time; time.sleep(600)"), limit=60, idle=1, on_line=lambda line: None
    )
    assert time.monotonic() - start < 10
    assert "silent for 1 s" in ended.reason
    assert ended.tail == "one"


def test_a_child_that_ignores_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(600)"
    ended = supervise(python(code), limit=1.5, on_line=lambda line: None)
    assert ended.killed
    assert ended.seconds < 12


def test_lines_codes_and_signals_of_a_child() -> None:
    lines: list[str] = []
    assert supervise(python("print('a'); print('b', end='')"), limit=20, on_line=lines.append).ok
    assert lines == ["a", "b"]
    assert supervise(python("raise SystemExit(7)"), limit=20, on_line=print).reason == "exit code 7"
    crash = supervise(python("import os; os.abort()"), limit=20, on_line=print)
    assert crash.reason == "died of SIGABRT"
    assert crash.killed


# --- test groups --------------------------------------------------------------------------------------------


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


def test_failed_configurations_are_not_timed() -> None:
    spec, single = layer_spec(MODELS[0], "gate_up", 0.5), KernelConfig("sm90", 64, 16)
    split, multicast = KernelConfig("sm90", 64, 16, 4), KernelConfig("sm90", 128, 256, 2, True)
    ok = {group.name: entry("passed") for group in GROUPS}
    assert all(blocked(ok, spec, config) is None for config in (single, split, multicast))
    assert not untested(ok, spec, single)

    outright = ok | {"split_k": entry("failed")}
    assert blocked(outright, spec, split) == "group split_k failed"
    assert blocked(outright, spec, single) is None
    assert blocked(ok | {"sparse_tile": entry("failed")}, spec, multicast) is None

    one = ok | {"fused_shards": entry("partly", configs={label(split): {"passed": 3, "failed": 1}})}
    assert blocked(one, spec, split) == "wrong in group fused_shards"
    assert blocked(one, spec, single) is None
    assert blocked(one, layer_spec(MODELS[0], "down", 0.5), split) is None, "down has one shard"

    hung = ok | {"ragged": entry("partly", broke=[label(multicast)])}
    assert blocked(hung, spec, multicast) == "broke the device or hung in group ragged"
    assert untested({}, spec, single)


# --- measuring ----------------------------------------------------------------------------------------------

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
        command=python("import nothing_of_that_name"),
    )
    assert "failed" in end
    assert "nothing_of_that_name" in end


def test_finished_rows_are_kept_until_the_kernels_change() -> None:
    row = ROWS[0]
    parts = parts_of(row, H200, {})
    results = {name: {"us": 1.0} for name in parts}
    stored = kernel_spense_linear.describe_row(row, results, 4e12, FACTS)
    assert finished(stored, parts, "abc")
    assert not finished(stored, parts, "other kernels")
    assert not finished(stored, parts | {"ours:new": KernelConfig("sm90", 64, 8)}, "abc")
    assert not finished({}, parts, "abc")
    stored["baselines"]["vllm_cutlass"] = {"error": "ModuleNotFoundError: No module named 'vllm'"}
    assert finished(stored, parts, "abc")
    assert not finished(stored, parts, "abc", vllm=True), "vLLM has come since"


def test_results_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    results_file.write(path, {"rows": [1]})
    assert results_file.read(path) == {"rows": [1]}
    path.write_text('{"rows": [')
    assert results_file.read(path) == {}
    assert results_file.read(tmp_path / "none.json") == {}


# --- reports ------------------------------------------------------------------------------------------------


def synthetic(path: Path) -> list[dict[str, Any]]:
    """Invented times: dense at 1 µs per 4 MB or 1 TFLOP/ms, ours a little faster or slower by row."""
    facts = FACTS | {"date": "2000-01-01 00:00", "command": "python invented.py"}
    rows = []
    for i, row in enumerate(ROWS[:120]):
        dense = kernel_shapes.dense_work(row.spec, row.tokens).bytes / 4e6 + row.tokens
        results: dict[str, dict[str, Any]] = {
            "ours:sm90-64x8-c1": {"us": dense * (0.8 if i % 7 else 1.5), "us_overlapped": dense * 0.7},
            "ours:sm90-64x8-c2": {"error": "RuntimeError: invented | with a bar"},
            "scaled_mm": {"us": dense},
            "vllm_cutlass": {"error": "ModuleNotFoundError: No module named 'vllm'"},
            "paper": {"us": dense * 1.1, "note": "two calls; algorithm 7, split K 1"},
            "slide_sparse": {"skipped": "not tried: it hung or crashed in another row"},
        }
        rows.append(kernel_spense_linear.describe_row(row, results, 4.3e12, facts))
    results_file.write(path, {"rows": rows})
    return rows


def test_report_holds_every_row_the_losing_ones_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    rows = synthetic(tmp_path / "kernels.json")
    summary = tmp_path / "docs" / "kernels.md"
    summary.parent.mkdir()
    summary.write_text("before\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nafter\n")
    report(tmp_path / "kernels.json", tmp_path)
    name = "kernels_synthetic_gpu_not_a_measurement"
    plot = tmp_path / "docs" / "img" / f"{name}.png"
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert plot.stat().st_size > 10_000
    text = (tmp_path / "docs" / f"{name}.md").read_text()
    table = [line for line in text.splitlines() if re.match(r"\| [0-9.]+ \| \d+ \|", line)]
    assert len(table) == len(rows)
    assert any("**0.67**" in line for line in table), "rows slower than dense are shown"
    assert len({line.count("|") for line in table}) == 1, "no cell breaks the table"
    assert "No module named 'vllm'" in text
    assert "invented / with a bar" in text
    filled = summary.read_text()
    assert filled.startswith("before\n<!-- speed:begin -->\n")
    assert filled.endswith("<!-- speed:end -->\nafter\n")
    assert "old" not in filled
    assert "Qwen3-32B gate_up | 0.5 |" in filled
    assert "120 rows" in capsys.readouterr().out


def test_report_leaves_a_page_without_markers_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    synthetic(tmp_path / "kernels.json")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "kernels.md").write_text("nothing to fill in\n")
    report(tmp_path / "kernels.json", tmp_path)
    assert (tmp_path / "docs" / "kernels.md").read_text() == "nothing to fill in\n"


# --- fingerprints and diagnosis ----------------------------------------------------------------------------


def test_fingerprints_follow_contents(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text("1")
    before = results_file.fingerprint([tmp_path])
    (tmp_path / "a.cu").write_text("2")
    assert results_file.fingerprint([tmp_path]) != before
    (tmp_path / "a.cu").write_text("1")
    (tmp_path / "notes.txt").write_text("does not count")
    assert results_file.fingerprint([tmp_path]) == before


def test_the_metric_sees_small_faults() -> None:
    expected = torch.randn(40, 640, generator=torch.Generator().manual_seed(0)).double()
    expected[7] *= 1e-3
    good = expected.bfloat16()
    assert wrong(good, expected) is None
    for damage in (
        lambda y: y[3].__setitem__(100, float("nan")),
        lambda y: y[3].__setitem__(100, y[3, 100] + 1),
        lambda y: y[7].mul_(-1),
        lambda y: y[:, 128:192].zero_(),
    ):
        y = good.clone()
        damage(y)
        assert wrong(y, expected) is not None
    y = good.clone()
    y[:, 128:192] = 0
    assert "slab of 64 rows: 2: 0.9" in (wrong(y, expected) or "")


def test_the_probe_names_the_column_that_is_there_instead() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(64, 32, generator=generator) * 8).to(torch.float8_e4m3fn).double()
    order = list(range(32))
    order[5], order[20] = 20, 5
    shuffled = weight[:, order]

    def call(x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ shuffled.T).bfloat16()

    text = probe_columns(call, weight, range(32), 8, boundary=16)
    assert "2 of 32 columns wrong" in text
    assert re.search(r"k=5 \(2:4\): .* most like k=20", text)
    assert re.search(r"k=20 \(dense\): .* most like k=5", text)
    shuffled = weight
    assert "all right" in probe_columns(call, weight, range(32), 8)


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


def test_rows_are_json(tmp_path: Path) -> None:
    rows = synthetic(tmp_path / "kernels.json")
    assert json.loads(json.dumps(rows)) == rows
    assert all(math.isfinite(row["us"]) for row in rows)
