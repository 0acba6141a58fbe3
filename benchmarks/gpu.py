"""All evidence from one GPU machine by one command: build, test, tune, time. `make gpu` runs it.

usage: python benchmarks/gpu.py [STAGE …] [--budget S] [--plan]

Runs the stages in this order (all but cutlass if none is named) within the budget; each writes
benchmarks/results/gpu/<stage>.json as it goes, so the same command continues after an interruption; what was
measured with other sources is done again. Test groups and measurements run in processes of their own under
time limits: a kernel that hangs costs seconds. Configurations that failed a test are not timed.

  build    compiles the extension, or accepts one that is there, loads, and fits the sources
  test     tests/gpu, in groups; a few small cases under compute-sanitizer where that works
  tune     the dispatch table for the benchmark's layers
  pruning  benchmarks/pruning_time.py: the pruner's stages on two layers of Qwen3-32B (needs transformers)
  kernels  benchmarks/kernel_spense_linear.py, then its report
  serving  benchmarks/serving_decode.py: Spense against dense FP8 in vLLM (needs vllm), then its report
  cutlass  compiles the CUTLASS instances as well (minutes per core); run test and kernels again afterwards

`SPENSE_TRAP=1 python benchmarks/gpu.py build test` finds out where a kernel hangs: it says so and stops.
Needs Python 3.11, torch with CUDA, triton, pydantic, safetensors, numpy and pytest; no network. `--plan`
shows what would run and what is missing, and needs no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import RESULTS, ROOT, fingerprint, kernel_sources, provenance, read, write
from benchmarks.supervise import supervise

STAGES = ("build", "test", "tune", "pruning", "kernels", "serving", "cutlass")
NEEDED = ("torch", "pydantic", "safetensors", "numpy", "pytest")
WANTED = {
    "triton": "the Triton tests and torch.compile",
    "matplotlib": "the plot",
    "transformers": "pruning",
    "vllm": "serving",
}
LIBRARY = ROOT / "vllm_spense" / "_C.abi3.so"
HEADERS = "set CUTLASS_HOME to a CUTLASS 4.2 tree, or pip install --no-deps nvidia-cutlass==4.2.0.0"
LONGEST = {"build": 300.0, "test": 480.0, "tune": 180.0, "pruning": 240.0, "cutlass": 500.0}
SHARE = {"tune": 0.25, "pruning": 0.3, "kernels": 0.5}
"""Of the time that is left, if there is a stage behind it that can run."""
SAVING = 8.0
"""Seconds kept for writing results and the report."""


class Run:
    """One call of the command: where results lie and how much time is left."""

    def __init__(self, results: Path, budget: float, fresh: bool, jobs: int, only: list[str]) -> None:
        self.results, self.fresh, self.jobs, self.only = results, fresh, jobs, only
        self.end = time.monotonic() + budget

    def left(self) -> float:
        return self.end - time.monotonic() - SAVING

    def limit(self, stage: str) -> float:
        last = stage == "kernels" and not importlib.util.find_spec("vllm")
        return min((1.0 if last else SHARE.get(stage, 1.0)) * self.left(), LONGEST.get(stage, float("inf")))

    def state(self, stage: str) -> dict[str, Any]:
        """What an earlier call left."""
        return {} if self.fresh else read(self.path(stage))

    def seed(self) -> None:
        """Start another results directory from what the repository holds."""
        self.results.mkdir(parents=True, exist_ok=True)
        for file in RESULTS.glob("*.json") if self.results != RESULTS else ():
            if not (self.results / file.name).exists():
                shutil.copy(file, self.results / file.name)

    def path(self, stage: str) -> Path:
        return self.results / f"{stage}.json"

    def save(self, stage: str, state: str, start: float, **content: Any) -> None:
        entry = {"stage": stage, "state": state, "seconds": round(time.monotonic() - start, 1)}
        write(self.path(stage), entry | provenance() | content)


# --- build --------------------------------------------------------------------------------------------------


def cutlass_headers() -> Path | None:
    """The directory that holds cutlass/cutlass.h: of CUTLASS_HOME, else of the installed package."""
    places = [Path(os.environ["CUTLASS_HOME"]) / "include"] if os.environ.get("CUTLASS_HOME") else []
    spec = importlib.util.find_spec("cutlass_library")
    if spec and spec.origin:
        places.append(Path(spec.origin).parent / "source" / "include")
    return next((place for place in places if (place / "cutlass" / "cutlass.h").is_file()), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = (os.environ.get("NVCC"), shutil.which("nvcc"), f"{home}/bin/nvcc")
    return next((place for place in places if place and Path(place).exists()), None)


def why_not_loaded() -> str | None:
    """The extension's own answer, from a process of its own: a library, once loaded, stays."""
    code = "from vllm_spense.ops import extension; print(extension.why_not_loaded() or '')"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        return f"vllm_spense.ops cannot be imported: {ran.stderr.strip().splitlines()[-1:]}"
    return ran.stdout.strip() or None


def has_cutlass() -> bool:
    code = "from vllm_spense.ops import extension; print(bool(extension.cutlass_capabilities()))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return ran.stdout.strip() == "True"


def library_digest() -> str:
    return hashlib.sha256(LIBRARY.read_bytes()).hexdigest()[:16] if LIBRARY.is_file() else ""


def library_fits(record: dict[str, Any]) -> str | None:
    """Why the extension that is there need not be compiled, or None."""
    if not LIBRARY.is_file():
        return None
    if record.get("library") == library_digest():
        if record.get("kernels") == kernel_sources():
            return "made from these sources, by the record of the build stage"
        if record.get("kernels") or record.get("trap"):
            return None
    newest = max(path.stat().st_mtime for path in (ROOT / "kernels").iterdir())
    return "newer than every file of kernels/" if LIBRARY.stat().st_mtime > newest else None


def stage_build(run: Run, cutlass: bool = False) -> bool:
    """True if an extension is there that loads; whether it fits the sources is in the record."""
    start, stage = time.monotonic(), "cutlass" if cutlass else "build"
    trap = os.environ.get("SPENSE_TRAP") == "1"
    fits = None if run.fresh or cutlass or trap else library_fits(run.state("build"))
    reason = why_not_loaded() if LIBRARY.is_file() else "not built"
    if fits and reason is None:
        how, stale = f"accepted {LIBRARY.name}: {fits}", False
    elif find_nvcc() and cutlass_headers():
        print(
            f"compiling the extension ({reason or 'the one that is there is older than kernels/'})",
            flush=True,
        )
        archs = os.environ.get("SPENSE_CUDA_ARCHS", "90a")
        cores = os.cpu_count() or 2
        jobs = os.environ.get("MAX_JOBS") or str(max(1, min(cores, _memory_gb() // 6) if cutlass else cores))
        environment = {"SPENSE_CUTLASS": str(int(cutlass)), "SPENSE_CUDA_ARCHS": archs, "MAX_JOBS": jobs}
        ended = supervise(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            limit=run.limit(stage),
            env=environment,
            cwd=ROOT,
        )
        reason = why_not_loaded() if ended.ok else f"compiling failed: {ended.reason}"
        how, stale = f"compiled in {ended.seconds:.0f} s", not ended.ok
    else:
        missing = "nvcc" if not find_nvcc() else f"the CUTLASS headers ({HEADERS})"
        how, stale = f"not compiled, missing: {missing}", True
        if reason is None:
            print(
                f"NOTE {LIBRARY.name} loads, but nothing says that it was made from these kernels/",
                flush=True,
            )
    if trap:
        print(
            "NOTE kernels with SPENSE_TRAP say where they would hang, and are slower: not for timing",
            flush=True,
        )
    content = {"library": library_digest(), "how": how, "stale": stale, "trap": trap}
    content["kernels"] = None if stale or trap else kernel_sources()  # the next call builds again
    state = "failed" if reason else "done"
    run.save("build", state, start, **content, reason=reason, cutlass=reason is None and has_cutlass())
    print(f"{'FAIL' if reason else 'PASS'} {stage}: {how}{f' ({reason})' if reason else ''}", flush=True)
    return reason is None


def _memory_gb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30


# --- test, tune, pruning, kernels ---------------------------------------------------------------------------


def test_sources() -> str:
    """What test results depend on; a library with CUTLASS instances has more to test."""
    parts = [ROOT / "kernels", ROOT / "vllm_spense" / "ops", ROOT / "tests" / "gpu"]
    return fingerprint(parts) + ("+cutlass" if has_cutlass() else "")


def stage_test(run: Run) -> bool:
    from benchmarks.gpu_tests import GROUPS, run_groups

    start, sources, end = time.monotonic(), test_sources(), time.monotonic() + run.limit("test")
    old = run.state("test")
    done = old.get("groups", {}) if old.get("sources") == sources else {}

    def save(groups: dict[str, Any], state: str = "running") -> None:
        run.save("test", state, start, sources=sources, groups=groups)

    groups = run_groups(GROUPS, done, left=lambda: end - time.monotonic(), save=save, say=_say, jobs=run.jobs)
    bad = [name for name, entry in groups.items() if entry["state"] in ("failed", "partly", "errors")]
    open_ = [name for name, entry in groups.items() if entry["state"] in ("not run", "skipped")]
    save(groups, "failed" if bad else "partial" if open_ else "done")
    passed = sum(entry["state"] in ("passed", "clean") for entry in groups.values())
    lists = f"wrong: {', '.join(bad) or 'none'}; not run: {', '.join(open_) or 'none'}"
    print(f"{passed} of {len(groups)} groups pass; {lists}")
    return not bad and not open_


def stage_tune(run: Run) -> bool:
    start, sources, limit = time.monotonic(), kernel_sources(), run.limit("tune")
    if run.state("tune").get("kernels") != sources:
        for table in run.results.glob("NVIDIA_*.json"):
            table.unlink()  # of other kernels
    tail: list[str] = []
    ended = supervise(
        [
            *(sys.executable, "benchmarks/tune_layers.py", "--directory", str(run.results)),
            *("--tests", str(run.path("test")), "--budget", str(max(limit - 45, 5))),
        ],
        limit=limit,
        idle=90,
        env={"PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
        on_line=lambda line: _say(line) or tail.append(line),  # type: ignore[func-returns-value]
    )
    complete = ended.ok and any(line.startswith("0 of them left") for line in tail[-3:])
    state = "done" if complete else "partial" if ended.ok or "limit" in ended.reason else "failed"
    run.save("tune", state, start, kernels=sources, reason=ended.reason, tail=tail[-30:])
    print(f"{'PASS' if ended.ok else 'FAIL'} tune: {state} {ended.reason}", flush=True)
    return complete


def stage_pruning(run: Run) -> bool:
    """Times all presets at least once, and again while there is time. Done once per state of the pruner."""
    sources, name, limit = pruner_sources(), "pruning_run", run.limit("pruning")
    start, old = time.monotonic(), run.state(name)
    if old.get("state") == "done" and old.get("sources") == sources:
        print(f"PASS pruning: kept what was measured on {old['date']}")
        return True
    if not importlib.util.find_spec("transformers"):
        print("SKIP pruning: needs transformers")
        return True
    ended = supervise(
        [
            *(sys.executable, "benchmarks/pruning_time.py", "--shape", "qwen3-32b"),
            *("--results", str(run.path("pruning")), "--budget", str(max(limit - 20, 5))),
        ],
        limit=limit,
        env={"PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
        on_line=_say,
    )
    run.save(name, "done" if ended.ok else "failed", start, sources=sources, reason=ended.reason)
    print(f"{'PASS' if ended.ok else 'FAIL'} pruning: {ended.reason or run.path('pruning')}", flush=True)
    return ended.ok


def pruner_sources() -> str:
    return fingerprint([ROOT / "vllm_spense" / "pruning", ROOT / "benchmarks" / "pruning_time.py"])


def stage_kernels(run: Run) -> bool:
    path = run.path("kernels")
    command = [sys.executable, "benchmarks/kernel_spense_linear.py", "--results", str(path)]
    options = [*(["--fresh"] if run.fresh else []), *(["--only", *run.only] if run.only else [])]
    limit, tail = run.limit("kernels"), [""]
    ended = supervise(
        [*command, *options, "--budget", str(max(limit - 25, 5)), "--tests", str(run.path("test"))],
        limit=limit,
        env={"PYTHONUNBUFFERED": "1", "SPENSE_TUNING_DIR": str(run.results)},
        cwd=ROOT,
        on_line=lambda line: _say(line) or tail.append(line),  # type: ignore[func-returns-value]
    )
    rows = read(path).get("rows", [])
    print(f"{'PASS' if ended.ok else 'FAIL'} kernels: {len(rows)} rows in {path} {ended.reason}", flush=True)
    write(
        run.path("kernels_run"),
        {"reason": ended.reason, "tail": tail[-30:], "rows": len(rows)} | provenance(),
    )
    _best_and_worst(rows)
    if rows:
        report = supervise([*command, "--report"], limit=60, cwd=ROOT)
        print(f"report: {report.reason or 'written'}", flush=True)
    return ended.ok and "all rows" in tail[-1]


def stage_serving(run: Run) -> bool:
    if not importlib.util.find_spec("vllm"):
        print("SKIP serving: needs vllm")
        return True
    path, limit, tail, start = run.path("serving_decode"), run.limit("serving"), [""], time.monotonic()
    ended = supervise(
        [
            *(sys.executable, "benchmarks/serving_decode.py", "--results", str(path)),
            *("--logs", str(run.results / "logs"), "--budget", str(max(limit - 90, 5))),
        ],
        limit=limit,
        env={"PYTHONUNBUFFERED": "1", "SPENSE_TUNING_DIR": str(run.results)},
        cwd=ROOT,
        on_line=lambda line: _say(line) or tail.append(line),  # type: ignore[func-returns-value]
    )
    complete = ended.ok and tail[-1].startswith("0 points left")
    state = "done" if complete else "partial" if ended.ok else "failed"
    run.save("serving_run", state, start, reason=ended.reason, tail=tail[-30:])
    print(f"{'PASS' if ended.ok else 'FAIL'} serving: {state} {ended.reason}", flush=True)
    if read(path).get("pairs"):
        command = [sys.executable, "benchmarks/serving_report.py", "--results", str(path)]
        report = supervise(command, limit=60, cwd=ROOT)
        print(f"report: {report.reason or 'written'}", flush=True)
    return complete


def _best_and_worst(rows: list[dict[str, Any]]) -> None:
    known = sorted((r for r in rows if r.get("times_dense")), key=lambda r: r["times_dense"])
    for title, part in (("slowest against dense", known[:5]), ("fastest against dense", known[-5:][::-1])):
        for row in part:
            print(f"{title}: {row['key']} ×{row['times_dense']:.2f} ({row['us']:.1f} µs, {row['config']})")


def _say(line: str) -> None:
    print(line, flush=True)


# --- plan ---------------------------------------------------------------------------------------------------


def missing_packages() -> list[str]:
    return [name for name in NEEDED if not importlib.util.find_spec(name)]


def to_bring() -> str:
    """One line: what a machine without network must be given to run this checkout."""
    fits = library_fits(read(RESULTS / "build.json"))
    packages = f"Python packages {', '.join(NEEDED[1:])}"
    if fits and why_not_loaded() is None:
        return f"{LIBRARY.relative_to(ROOT)} ({fits}; nothing is compiled then) and {packages}"
    found = cutlass_headers()
    where = f"here in {found}" if found else HEADERS
    return f"the CUTLASS headers ({where}) or a built {LIBRARY.relative_to(ROOT)}, and {packages}"


def show_plan(run: Run, stages: list[str]) -> None:
    """What would run, with limits, without touching a GPU."""
    from benchmarks import kernel_spense_linear as kernels
    from benchmarks import serving_decode
    from benchmarks.gpu_tests import GROUPS, find_sanitizer

    print(f"to bring: {to_bring()}")
    absent = [f"{name} ({why})" for name, why in WANTED.items() if not importlib.util.find_spec(name)]
    print(f"missing here: {', '.join(missing_packages() + absent) or 'nothing'}")
    print(f"nvcc: {find_nvcc() or 'none'}; compute-sanitizer: {find_sanitizer() or 'none'}")
    for stage in stages:
        record = f"{stage}_run" if stage in ("pruning", "serving") else stage
        state = run.state(record).get("state", "not run yet") if stage != "kernels" else ""
        limit = LONGEST.get(stage)
        text = f"up to {limit:.0f} s" if limit else "what is left"
        print(f"\n{stage}: {text}{f', {state}' if state else ''}")
        if stage == "test":
            for group in GROUPS:
                needs = f", needs {', '.join(group.needs)}" if group.needs else ""
                print(f"  {group.name:14s} {group.limit:4.0f} s  {', '.join(group.tests)}{needs}")
        if stage == "tune":
            from benchmarks.kernel_shapes import layer_specs
            from vllm_spense.ops.tune import TOKENS

            print(
                f"  {len(list(layer_specs()))} layers × {len(TOKENS)} numbers of tokens, the first ones first"
            )
        if stage == "serving":
            serving_decode.main(["--dry-run", "--results", str(run.path("serving_decode"))])
        if stage == "kernels":
            kernels.dry_run(kernels.select(run.only or None), kernels.Device.here())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--budget", type=float, default=24 * 60, metavar="SECONDS")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="ignore what earlier calls left")
    parser.add_argument("--jobs", type=int, default=max(1, min(4, (os.cpu_count() or 2) // 3)))
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows of the benchmark")
    parser.add_argument("--plan", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # running children are ended on the way out
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))} (known: {', '.join(STAGES)})")
    stages = [s for s in STAGES if s in arguments.stages] if arguments.stages else list(STAGES[:-1])
    run = Run(arguments.results.resolve(), arguments.budget, arguments.fresh, arguments.jobs, arguments.only)
    if arguments.plan:
        show_plan(run, stages)
        return 0
    if missing := missing_packages():
        print(f"FAIL missing Python packages: {', '.join(missing)}; to bring: {to_bring()}")
        return 2
    if set(stages) - {"build", "cutlass"} and not import_module("torch").cuda.is_available():
        print(
            f"FAIL {sys.executable} has no CUDA device (or a torch without CUDA); --plan shows what would run"
        )
        return 2
    run.seed()
    good = True
    actions: dict[str, Callable[[Run], bool]] = {
        "build": stage_build,
        "test": stage_test,
        "tune": stage_tune,
        "pruning": stage_pruning,
        "kernels": stage_kernels,
        "serving": stage_serving,
        "cutlass": lambda run: stage_build(run, cutlass=True),
    }
    for stage in stages:
        if run.left() < 20:
            print(f"SKIP {stage}: no time left; the same command goes on from here")
            good = False
            continue
        print(f"\n=== {stage} ({run.left():.0f} s left)", flush=True)
        good = actions[stage](run) and good
        if stage == "build" and not good:
            break
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
