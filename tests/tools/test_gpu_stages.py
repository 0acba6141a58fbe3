"""`make gpu` without a GPU: stages, what is carried, and what first light allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import results as results_file
from benchmarks.common.results import ROOT, kernel_sources
from benchmarks.common.supervise import Ended, supervise
from benchmarks.kernels import counters
from benchmarks.kernels import shapes as kernel_shapes
from benchmarks.kernels.entries import describe_row, recheck
from benchmarks.kernels.verdicts import blocked, config_of, first_light_entry
from tools.find_cuda import find_cutlass, find_nvcc
from tools.gpu import build as gpu_build
from tools.gpu import bundle as gpu_bundle
from tools.gpu import bundle_vllm as gpu_bundle_vllm
from tools.gpu import command as gpu
from tools.gpu import stages as gpu_stages
from tools.gpu.first_light_cases import CORE, FAMILIES, cases, difference
from tools.gpu.groups import GROUPS
from tools.gpu.run import Run
from tools.gpu.stages import STAGES, limit_of, run_stages
from vllm_spense.ops.linear.configs import KernelConfig, label

STAGE = {stage.name: stage for stage in STAGES}
ROW = kernel_shapes.core_rows()[1]


# --- the command --------------------------------------------------------------------------------------------


def test_plan_says_what_to_bring_and_needs_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--plan", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("to bring: ")
    assert "_C.abi3.so" in lines[0] or ".gpu/" in lines[0]
    titles = [line.split(":")[0] for line in lines]
    assert [title for title in titles if title in STAGE] == [s.name for s in STAGES if s.default]
    assert sum(line.startswith("Qwen3-32B/") for line in lines) == len(kernel_shapes.core_rows())
    assert not any(part in " ".join(lines) for part in ("test_opcheck", "triton_linear", "memcheck"))


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["test", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_the_command_starts_without_the_packages_that_it_installs() -> None:
    absent = "sys.modules.update(torch=None, pydantic=None, vllm_spense=None)"
    code = f"import sys; {absent}; import tools.gpu.command"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_unknown_stages_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["tset"])
    assert "no such stage: tset" in capsys.readouterr().err


def test_limits_follow_the_time_that_is_left_and_stretch_with_the_budget(tmp_path: Path) -> None:
    now = [0.0]
    run = Run(tmp_path, 210, clock=lambda: now[0])
    default, speed = [stage for stage in STAGES if stage.default], STAGE["speed"]
    assert limit_of(speed, run, default) == speed.most
    now[0] = 150
    assert limit_of(speed, run, default) == pytest.approx(run.left())
    assert 50 < run.left() < 60
    assert limit_of(speed, Run(tmp_path, 3000, clock=lambda: 0.0), default) > 2 * speed.most
    assert limit_of(speed, Run(tmp_path, 300, clock=lambda: 0.0), [speed]) == pytest.approx(292)


def stage(name: str, action: Any) -> Any:
    return gpu_stages.Stage(name, "", 10, 5, action)


def test_stages_that_hung_come_last_and_a_stop_ends_the_call(tmp_path: Path) -> None:
    ran: list[str] = []

    def action(name: str, code: int = 0) -> Any:
        def run_it(run: Run, limit: float) -> bool:
            ran.append(name)
            if code:
                raise gpu_stages.Stop(code, "no")
            return True

        return stage(name, run_it)

    run = Run(tmp_path, 100)
    for name in ("first", "speed"):
        run.save(name, "hung", run.clock())
    assert run_stages(run, [action(name) for name in ("build", "first", "speed", "tune")]) == 0
    assert ran == ["build", "first", "tune", "speed"]
    assert run_stages(run, [action("first", 3), action("tune")]) == 3
    assert ran[4:] == ["first"]
    assert run_stages(Run(tmp_path, 12), [action("tune")]) == 1
    assert len(ran) == 5, "4 seconds are too few"


def test_a_pruning_benchmark_runs_once_per_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def pretend_child(command: list[str], **_: Any) -> Ended:
        commands.append(command)
        return Ended(0, "" if len(commands) > 1 else "exit code 1", 1.0, "")

    run = Run(tmp_path, 600, child=pretend_child)
    results = [gpu_stages.stage_pruning(run, 100) for _ in range(3)]
    assert results == [False, True, True], "a failure is not kept"
    assert len(commands) == 2
    assert float(commands[0][commands[0].index("--budget") + 1]) == 85, "it ends before it is ended"
    monkeypatch.setattr(gpu_stages, "fingerprint", lambda paths: "other")
    assert gpu_stages.stage_pruning(run, 100)
    assert len(commands) == 3


def test_another_results_directory_starts_from_what_is_known(tmp_path: Path) -> None:
    known = Run(tmp_path / "known", 100)
    known.save("test", "done", known.clock())
    known.save("tune", "done", known.clock())
    run = Run(tmp_path / "other", 100)
    run.seed(tmp_path / "known")
    assert (run.state("test")["state"], run.state("tune")["state"]) == ("done", "done")
    run.save("test", "partial", run.clock(), groups={})
    run.seed(tmp_path / "known")
    assert run.state("test")["state"] == "partial", "what is there is not overwritten"
    run.forget(["test"])
    assert (run.state("test"), run.state("tune")["state"]) == ({}, "done")


# --- what is carried ----------------------------------------------------------------------------------------


def test_a_library_is_accepted_by_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(gpu_build, "LIBRARY", library)
    record = {"library": gpu_build.library_digest(), "kernels": kernel_sources()}
    os.utime(library, (1, 1))
    assert gpu_build.library_fits(record) is not None
    other = record | {"kernels": "other"}
    assert gpu_build.library_fits(other) is None
    assert gpu_build.library_fits({}) is None, "older than the sources, and nothing vouches for it"
    os.utime(library, (time.time() + 100, time.time() + 100))
    assert "newer" in (gpu_build.library_fits({}) or "")
    assert gpu_build.library_fits(other) is None, "known to be made from other sources"
    assert gpu_build.library_fits({"library": gpu_build.library_digest(), "trap": True}) is None


@pytest.mark.parametrize("kernels", ["these", "others"])
def test_a_carried_library_is_used_if_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    bundle, library = tmp_path / ".gpu", tmp_path / "package" / "_C.abi3.so"
    for path, content in ((bundle / "_C.abi3.so", b"timing"), (bundle / "trap" / "_C.abi3.so", b"trap")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    library.parent.mkdir()
    digests = [gpu_build.library_digest(bundle / name) for name in ("_C.abi3.so", "trap/_C.abi3.so")]
    record = dict(zip(("library", "trap_library"), digests, strict=True))
    record["kernels"] = kernel_sources() if kernels == "these" else "others"
    results_file.write(bundle / "build.json", record)
    for name, value in (
        *(("LIBRARY", library), ("BUNDLE", bundle), ("carried", lambda: carried(bundle))),
        *(("ask_extension", lambda: (None, False)), ("find_nvcc", lambda: None)),
    ):
        monkeypatch.setattr(gpu_build, name, value)
    run = Run(tmp_path / "results", 100)
    if kernels == "others":
        assert not gpu_build.stage_build(run, 50)
        assert not library.exists()
        return
    assert gpu_build.stage_build(run, 50)
    assert library.read_bytes() == b"timing"
    assert "by the record" in run.state("build")["how"]
    assert gpu_build.stage_build(run, 50), "and again in the next call"


carried = gpu_build.carried


def test_first_light_takes_the_library_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap" / "_C.abi3.so"
    trap.parent.mkdir()
    trap.write_bytes(b"trap")
    (tmp_path / "_C.abi3.so").write_bytes(b"timing")
    record = {"kernels": kernel_sources(), "library": gpu_build.library_digest(tmp_path / "_C.abi3.so")}
    results_file.write(tmp_path / "build.json", record | {"trap_library": gpu_build.library_digest(trap)})
    assert gpu_build.trap_library(tmp_path) == trap
    trap.write_bytes(b"damaged")
    assert gpu_build.trap_library(tmp_path) == gpu_build.LIBRARY


def test_carried_wheels_are_installed_where_packages_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels").mkdir()
    info = "probe_of_spense-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "wheels" / "probe_of_spense-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("probe_of_spense.py", "ANSWER = 42\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: probe-of-spense\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    target = tmp_path / "site"
    assert gpu_build.install_wheels(tmp_path, target) is None
    assert not target.exists(), "nothing is missing"
    monkeypatch.setattr(gpu_build, "NEEDED", ("probe_of_spense",))
    assert gpu_build.install_wheels(tmp_path, target) is None
    assert not gpu_build.missing_packages()
    code = "import probe_of_spense; print(probe_of_spense.ANSWER)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "42\n"


def test_headers_are_found_where_cutlass_home_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "include" / "cutlass").mkdir(parents=True)
    (tmp_path / "include" / "cutlass" / "cutlass.h").touch()
    monkeypatch.setenv("CUTLASS_HOME", str(tmp_path))
    assert find_cutlass() == tmp_path


def test_the_bundle_says_what_it_weighs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "one.whl").write_bytes(b"1" * 3_000_000)
    total = gpu_bundle.sizes(tmp_path)
    assert total - gpu_bundle.tree() == 3_000_000
    assert "3.00 MB  wheels" in capsys.readouterr().out
    (tmp_path / "library").write_bytes(b"..GLIBC_2.9..GLIBC_2.34..GLIBC_2.4")
    assert gpu_bundle.newest_glibc(tmp_path / "library") == "2.34"


# --- what first light and the tests allow -------------------------------------------------------------------


def test_every_family_and_every_configuration_has_cases() -> None:
    found = cases()
    assert len({case.key for case in found}) == len(found)
    assert list(dict.fromkeys(case.family for case in found if case.family != "F7")) == [
        family for family in FAMILIES if family != "F7"
    ]
    single = {case.config for case in found if case.family == "F4"}
    assert {case.config for case in found if case.family == "F1"} == single
    assert {c.cluster for c in single} == {1}
    for family, multicast, clusters in (("F5", False, {2, 4, 8}), ("F6", True, {1, 2, 4})):
        tried = {case.config for case in found if case.family == family}
        assert {config.cluster for config in tried} == clusters
        assert {config.multicast for config in tried} == {multicast}
    assert {"F5", "F6"}.isdisjoint(CORE)


def test_a_difference_says_where() -> None:
    want = torch.zeros(3, 130)
    y = want.clone()
    assert difference(y, want) is None
    y[2, 128], y[1, 0] = 5, float("nan")
    text = difference(y, want) or ""
    assert "2 of 390 wrong, 1 NaN" in text
    assert "slabs of 64 rows [0, 2], tokens [1, 2]" in text
    assert "[2, 128] 5 for 0" in text


def test_what_first_light_bans_is_neither_tested_nor_timed() -> None:
    split, single = KernelConfig("sm90", 64, 16, 4), KernelConfig("sm90", 64, 16)
    assert config_of(label(split)) == split
    assert config_of("sm90-128x256-m2") == KernelConfig("sm90", 128, 256, 2, True)
    verdict = {"state": "partly", "reason": "", "seconds": 1.0, "banned": {label(split): "hang in F5/…"}}
    tests = first_light_entry(verdict)
    assert blocked(tests, ROW.spec, split) == "first light: hang in F5/…"
    assert blocked(tests, ROW.spec, single) is None
    assert first_light_entry({}) == {}


def test_core_groups_decide_about_timing_and_thin_ones_keep_every_configuration() -> None:
    core = {group.name for group in GROUPS if group.core}
    assert {"sparse_tile", "dense_tile", "split_k", "multicast", "repeats", "graphs", "overlap"} <= core
    assert core.isdisjoint({"triton", "compile", "operator", "pruning", "memcheck", "racecheck"})
    for group in GROUPS:
        assert not group.core or core >= {*group.needs, *group.after}, group.name

    def collected(thin: str) -> list[str]:
        options = ["--collect-only", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/gpu"]
        out = subprocess.check_output(
            [sys.executable, "-m", "pytest", *options, "tests/gpu/test_spense_linear.py::test_ragged"],
            cwd=ROOT,
            env=dict(os.environ) | {"SPENSE_THIN_TESTS": thin},
            text=True,
        )
        return [line for line in out.splitlines() if "::" in line]

    whole, thin = collected("0"), collected("1")
    configs = {line.rstrip("]").split("-sm90-")[-1] for line in whole}
    assert len(thin) == len(configs) < len(whole) / 4
    assert {line.rstrip("]").split("-sm90-")[-1] for line in thin} == configs


def test_times_of_what_a_test_fails_later_are_taken_back(tmp_path: Path) -> None:
    path, facts = tmp_path / "kernels.json", {"device": "NVIDIA H200", "kernels": kernel_sources()}
    results: dict[str, dict[str, Any]] = {
        "ours:sm90-64x16-c1": {"us": 70.0, "us_overlapped": 69.0},
        "ours:sm90-64x16-c4": {"us": 50.0, "us_overlapped": 49.0},
        "scaled_mm": {"us": 90.0},
    }
    doubtful = {ROW.key: ["sm90-64x16-c1", "sm90-64x16-c4"]}
    row = describe_row(ROW, results, 4.3e12, facts | {"untested": doubtful})
    assert (row["config"], row["tested"]) == ("sm90-64x16-c4", False)
    results_file.write(path, {"rows": [row]})
    tests: dict[str, Any] = {group.name: {"state": "passed"} for group in GROUPS}
    assert "no time taken out" in recheck(path, tests)
    assert results_file.read(path)["rows"][0]["tested"] is True
    tests["split_k"] = {"state": "failed"}
    assert f"{ROW.key} sm90-64x16-c4 taken out" in recheck(path, tests)
    again = results_file.read(path)["rows"][0]
    assert (again["us"], again["config"], again["times_dense"]) == (70.0, "sm90-64x16-c1", 1.286)
    assert "found wrong" in again["ours"]["sm90-64x16-c4"]["error"]


# --- what is measured ---------------------------------------------------------------------------------------


def test_core_rows_are_decode_then_the_question_of_prefill() -> None:
    rows = kernel_shapes.core_rows()
    assert [row.key for row in rows[:2]] == ["Qwen3-32B/gate_up/0.5/1", "Qwen3-32B/gate_up/0.5/16"]
    assert all(row.tokens <= 64 and row.ratio == 0.5 for row in rows[:8])
    question = rows[8:14]
    assert {(row.ratio, row.tokens) for row in question} == {
        (r, t) for r in (0, 1, 0.5) for t in (2048, 8192)
    }
    assert all(set(kernel_shapes.ASKED) <= set(kernel_shapes.configs(row)) for row in question)
    assert [sum(row.spec.sparse_sizes) for row in question[::2]] == [51200, 0, 25600]
    assert len(list(kernel_shapes.layer_specs(core=True))) == 4


def test_a_child_may_be_silent_for_longer_while_it_starts() -> None:
    code = "import time; print('up'); time.sleep(60)"
    heard: list[str] = []
    ended = supervise(
        [sys.executable, "-u", "-c", code], limit=60, idle=lambda: 1 if heard else 30, on_line=heard.append
    )
    assert heard == ["up"]
    assert ended.reason == "killed: silent for 1 s"


def test_counters_are_read_from_what_ncu_prints() -> None:
    text = (
        "==PROF== Connected\nsome library says hello\n"
        '"ID","Process ID","Kernel Name","dram__throughput.avg.pct_of_peak_sustained_elapsed","launch__x"\n'
        '"","","","%",""\n'
        '"0","77","linear_kernel","81.25","1,024"\n'
        '"1","77","linear_kernel","12.5","n/a"\n'
        "==PROF== Disconnected\n"
    )
    first, second = counters.parse(text)
    assert first == {"dram__throughput.avg.pct_of_peak_sustained_elapsed": 81.25, "launch__x": 1024.0}
    assert second == {"dram__throughput.avg.pct_of_peak_sustained_elapsed": 12.5}
    assert counters.parse("==ERROR== No kernels were profiled.") == []


def test_counters_are_skipped_without_ncu(tmp_path: Path) -> None:
    run = Run(tmp_path, 100, child=lambda *_, **__: pytest.fail("nothing to run"), profiler=lambda: None)
    assert gpu_stages.stage_counters(run, 50)
    assert "ncu) is not installed" in (tmp_path / "log.txt").read_text()


def test_results_are_json_lines_of_cases_and_a_summary(tmp_path: Path) -> None:
    """What stage_first reads back: only a summary of these kernels counts."""
    run = Run(tmp_path, 100)
    summary = {"event": "summary", "state": "passed", "reason": "", "banned": {}, "seconds": 1.0}
    run.file("first_light.jsonl").write_text(json.dumps(summary) + "\n")
    assert gpu_stages.first_light_verdict(run) == {}, "of unknown kernels"
    run.save("first", "done", run.clock(), kernels=kernel_sources())
    assert gpu_stages.first_light_verdict(run) == summary
    with run.file("first_light.jsonl").open("a") as file:
        file.write('{"key": "F1/one')
    assert gpu_stages.first_light_verdict(run) == {}, "ended while it wrote"


# --- vLLM to carry ------------------------------------------------------------------------------------------


def test_only_code_for_hopper_stays_in_a_library(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if not nvcc:
        pytest.skip("needs nvcc")
    source, library = tmp_path / "two.cu", tmp_path / "two.so"
    source.write_text("__global__ void twice(int* x) { x[threadIdx.x] *= 2; }\n")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    codes.append("-gencode=arch=compute_80,code=compute_80")
    command = [nvcc, "-shared", "-Xcompiler=-fPIC", "-cudart=none", *codes, str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    before = bytearray(library.read_bytes())
    fats = [fat for fat in gpu_bundle_vllm.images(before) if fat]
    kinds = {(kind, arch) for fat in fats for kind, arch, _, _ in fat}
    assert kinds == {(gpu_bundle_vllm.CUBIN, 80), (gpu_bundle_vllm.CUBIN, 90), (gpu_bundle_vllm.PTX, 80)}
    zeroed = gpu_bundle_vllm.keep_hopper(library)
    after = bytearray(library.read_bytes())
    assert len(after) == len(before)
    for kind, arch, place, size in (image for fat in fats for image in fat):
        same = after[place : place + size] == before[place : place + size]
        assert same == ((kind, arch) == (gpu_bundle_vllm.CUBIN, 90))
    assert zeroed == sum(size for fat in fats for _, arch, _, size in fat if arch == 80)


def test_a_carried_vllm_is_unpacked_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "made" / "site"
    site.mkdir(parents=True)
    (site / "carried_probe.py").write_text("ANSWER = 42\n")
    with tarfile.open(tmp_path / "vllm.tar.xz", "w:xz") as archive:
        archive.add(site, "site")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    bundle, target = tmp_path / "vllm.tar.xz", tmp_path / "there"
    monkeypatch.setattr(gpu_bundle_vllm, "find_spec", lambda name: object())
    assert gpu_bundle_vllm.unpack(bundle, target) is None, "it is installed"
    monkeypatch.setattr(gpu_bundle_vllm, "find_spec", lambda name: None)
    assert gpu_bundle_vllm.unpack(tmp_path / "none.tar.xz", target) is None
    assert gpu_bundle_vllm.unpack(bundle, target) == target / "site"
    code = "import carried_probe; print(carried_probe.ANSWER)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "42\n"
