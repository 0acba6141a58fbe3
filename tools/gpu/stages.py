"""The stages of `tools/gpu/command.py`: what each runs, for how long, and when it counts as done.

Every stage is a child under a time limit (the tests: one per group) that writes its results as it goes and
keeps what an earlier call measured, so a call may end anywhere and the next one goes on.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.results import ROOT, fingerprint, kernel_sources, program, read
from benchmarks.common.supervise import Ended
from tools.gpu.build import stage_build, trap_library
from tools.gpu.run import Run

ALL_LAYERS = 300.0
"""Seconds from which on all layers of the benchmark are tuned, not only four."""
STARTING = 15.0
"""Seconds that a child may take before it counts its budget (torch and vLLM are imported), and to end."""
PRUNING = "benchmarks.pruning.pruning_time"
TAIL = 30
"""Last lines of a child that its record keeps."""


@dataclass(frozen=True)
class Stage:
    """``most``: seconds in a call of the usual length; ``least``: what it needs to be worth starting."""

    name: str
    about: str
    most: float
    least: float
    action: Callable[[Run, float], bool]
    default: bool = True
    needs: str = ""
    """A package without which it is skipped."""


class Stop(Exception):
    """Nothing that follows would mean anything; with the command's exit code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


CORE_IS_WRONG, DEVICE_IS_STUCK = 3, 4
FIRST = ("build", "first")
"""Nothing goes before them."""


def limit_of(stage: Stage, run: Run, stages: Sequence[Stage]) -> float:
    """Seconds that the stage may take now: a call with time for all its stages stretches them."""
    usual = sum(stage.most for stage in stages)
    return min(stage.most * max(1.0, run.budget / usual), run.left())


def run_stages(run: Run, stages: Sequence[Stage]) -> int:
    """Run them in order while there is time, those that hung last time last; the command's exit code."""
    good = True

    def hung(stage: Stage) -> bool:
        return stage.name not in FIRST and run.state(stage.name).get("state") == "hung"

    for stage in sorted(stages, key=hung):
        if run.left() < stage.least:
            run.say(f"SKIP {stage.name}: {run.left():.0f} s left; the same command goes on from here")
            good = False
            continue
        if stage.needs and not importlib.util.find_spec(stage.needs):
            run.say(f"SKIP {stage.name}: needs {stage.needs}")
            continue
        run.say(f"=== {stage.name}: {stage.about} ({run.left():.0f} s left)")
        try:
            good = stage.action(run, limit_of(stage, run, stages)) and good
        except Stop as stop:
            run.say(f"STOP {stage.name}: {stop}; nothing else is run")
            return stop.code
        if stage.name == "build" and not good:
            break
    run.say(f"{'all done' if good else 'not all done'} after {run.seconds():.0f} s; results in {run.results}")
    return 0 if good else 1


def child(
    run: Run, limit: float, module: str, *options: str, idle: float | None = None
) -> tuple[Ended, list[str]]:
    """A module under the limit, told to end a little before it; how it ended and its last lines."""
    tail = [""]

    def on_line(line: str) -> None:
        run.say(line)
        tail[:] = [*tail[-TAIL:], line]

    budget = f"{max(limit - STARTING, 2):.0f}"
    ended = run.child(
        [*program(module), *options, "--budget", budget],
        limit=limit,
        idle=idle,
        env={"PYTHONUNBUFFERED": "1", "SPENSE_TUNING_DIR": str(run.results)},
        cwd=ROOT,
        on_line=on_line,
    )
    return ended, tail


def source_of(module: str) -> Path:
    """The file of a module of this repository."""
    return ROOT / f"{module.replace('.', '/')}.py"


def finish(
    run: Run, stage: str, start: float, ended: Ended, tail: list[str], complete: bool, **content: Any
) -> bool:
    """Record and say how a child ended."""
    # Every child ends by itself when its budget is over.
    hung = "over its limit" in ended.reason or "silent for" in ended.reason
    state = "done" if complete else "partial" if ended.ok else "hung" if hung else "failed"
    run.save(stage, state, start, reason=ended.reason, tail=tail, **content)
    good = state in ("done", "partial")
    run.say(f"{'PASS' if good else 'FAIL'} {stage}: {state} {ended.reason}".rstrip())
    if "does not die" in ended.reason:
        raise Stop(DEVICE_IS_STUCK, "a process is stuck in the driver")
    return complete


def kept(run: Run, stage: str) -> bool:
    """Whether an earlier call has done all of it, on the same kernels."""
    old = run.state(stage)
    if old.get("state") != "done" or old.get("kernels") != kernel_sources():
        return False
    run.say(f"PASS {stage}: kept what was measured on {old['date']}")
    return True


# --- is it right? -------------------------------------------------------------------------------------------


def first_light_verdict(run: Run) -> dict[str, Any]:
    """The summary of the first light of these kernels, or an empty one."""
    path = run.file("first_light.jsonl")
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        verdict = json.loads(lines[-1]) if lines else {}
    except ValueError:  # it was ended while it wrote
        return {}
    ours = run.state("first").get("kernels") == kernel_sources() and verdict.get("event") == "summary"
    return verdict if ours else {}


def stage_first(run: Run, limit: float) -> bool:
    verdict, start = first_light_verdict(run), run.clock()
    if verdict.get("state") == "passed":
        run.say("PASS first: kept what an earlier call found")
        return True
    run.save("first", "running", start, kernels=kernel_sources())
    options = ["--library", str(trap_library()), "--results", str(run.file("first_light.jsonl"))]
    ended, tail = child(run, limit, "tools.gpu.first_light", *options)
    verdict = first_light_verdict(run)
    state = verdict.get("state", "failed")
    finish(run, "first", start, ended, tail, state != "failed", kernels=kernel_sources(), verdict=state)
    if state == "failed":
        raise Stop(CORE_IS_WRONG, verdict.get("reason") or ended.reason or "it said nothing")
    return state == "passed"


def test_sources(run: Run) -> str:
    """What test results depend on; a library with CUTLASS instances has more to test."""
    parts = [ROOT / "kernels", ROOT / "vllm_spense" / "ops", ROOT / "tests" / "gpu"]
    return fingerprint(parts) + ("+cutlass" if run.state("build").get("cutlass") else "")


def stage_test(run: Run, limit: float, core: bool = True) -> bool:
    """The core groups, or all of them."""
    from benchmarks.kernels.verdicts import first_light_entry
    from tools.gpu.groups import GROUPS, run_group, run_groups

    start, sources = run.clock(), test_sources(run)
    end, old = start + limit, run.state("test")
    done = dict(old.get("groups", {})) if old.get("sources") == sources else {}
    done.pop("first_light", None)
    first = first_light_entry(first_light_verdict(run))
    wanted = [group for group in GROUPS if group.core or not core]

    def save(groups: dict[str, Any], state: str = "running") -> None:
        run.save("test", state, start, sources=sources, groups=first | groups)

    groups = run_groups(
        wanted,
        done,
        left=lambda: end - run.clock(),
        save=save,
        say=run.say,
        jobs=run.jobs,
        run=run.group or run_group,
        thin=core,
        banned=[name for entry in first.values() for name in entry["broke"]],
    )
    bad = [name for name, entry in groups.items() if entry["state"] in ("failed", "partly", "errors")]
    open_ = [name for name, entry in groups.items() if entry["state"] in ("not run", "skipped")]
    save(groups, "failed" if bad else "partial" if open_ else "done")
    passed = sum(entry["state"] in ("passed", "clean") for entry in groups.values())
    lists = f"wrong: {', '.join(bad) or 'none'}; not run: {', '.join(open_) or 'none'}"
    run.say(f"{passed} of {len(groups)} groups pass; {lists}")
    if run.file("kernels.json").is_file():
        from benchmarks.kernels.entries import recheck

        run.say(recheck(run.file("kernels.json"), first | groups))
    return not bad and not open_


# --- how fast is it? ----------------------------------------------------------------------------------------


def stage_speed(run: Run, limit: float, core: bool = True) -> bool:
    """The rows that matter most beside torch's dense product, or all rows beside everything."""
    from benchmarks.kernels.verdicts import first_light_entry

    if run.state("test").get("sources") != test_sources(run):
        first = first_light_entry(first_light_verdict(run))
        run.save("test", "not run", run.clock(), sources=test_sources(run), groups=first)
    name, path, start = "speed" if core else "kernels", run.file("kernels.json"), run.clock()
    if kept(run, name):
        return True
    options = ["--results", str(path), "--tests", str(run.file("test.json"))]
    options += ["--core"] if core else []
    options += [*(["--fresh"] if run.fresh else []), *(["--only", *run.only] if run.only else [])]
    ended, tail = child(run, limit, "benchmarks.kernels.spense_linear", *options)
    rows = read(path).get("rows", [])
    for line in best_and_worst(rows):
        run.say(line)
    complete = ended.ok and "all rows" in tail[-1]
    return finish(run, name, start, ended, tail, complete, kernels=kernel_sources(), rows=len(rows))


def best_and_worst(rows: list[dict[str, Any]]) -> list[str]:
    known = sorted((r for r in rows if r.get("times_dense")), key=lambda r: r["times_dense"])
    return [
        f"{title}: {row['key']} ×{row['times_dense']:.2f} ({row['us']:.1f} µs, {row['config']})"
        for title, part in (("slowest against dense", known[:3]), ("fastest against dense", known[-3:][::-1]))
        for row in part
    ]


def stage_counters(run: Run, limit: float) -> bool:
    start = run.clock()
    if kept(run, "counters"):
        return True
    if not run.profiler():
        run.say("SKIP counters: Nsight Compute (ncu) is not installed")
        return True
    path = run.file(".counters.json")
    ended, tail = child(run, limit, "benchmarks.kernels.counters", "--results", str(path))
    read_out = read(path)
    path.unlink(missing_ok=True)
    found = read_out.get("kernels", {})
    return finish(run, "counters", start, ended, tail, bool(found), kernels=kernel_sources(), counters=found)


def stage_tune(run: Run, limit: float) -> bool:
    start, sources = run.clock(), kernel_sources()
    if kept(run, "tune"):
        return True
    if run.state("tune").get("kernels") != sources:
        for table in run.results.glob("NVIDIA_*.json"):
            table.unlink()  # of other kernels
    options = ["--directory", str(run.results), "--tests", str(run.file("test.json"))]
    if limit < ALL_LAYERS:
        options.append("--core")
    ended, tail = child(run, limit, "tools.gpu.tune_layers", *options, idle=45.0)
    complete = ended.ok and any(line.startswith("0 of them left") for line in tail[-3:])
    return finish(run, "tune", start, ended, tail, complete, kernels=sources)


def stage_stack(run: Run, limit: float) -> bool:
    """Linear layers of 16 blocks, compiled, in one CUDA graph, without an engine."""
    return once(run, "stack", limit, "benchmarks.kernels.decode_stack", "decode_stack.json")


def stage_serving(run: Run, limit: float) -> bool:
    """16 layers of Qwen3-32B in vLLM, Spense against dense FP8."""
    options = (
        *("--models", "Qwen3-32B", "--layers", "16", "--ratios", "0.5", "--repeats", "2"),
        *("--points", "32x128+128", "1x8192+1", "1x128+128", "--capture-sizes", "1", "8", "32"),
        *("--logs", str(ROOT / "build" / "serving")),
    )
    return once(run, "serving", limit, "benchmarks.serving.decode", "serving_decode.json", *options)


def stage_four_bit(run: Run, limit: float) -> bool:
    """Dense layers of Llama-3.1-8B in NF4, beside bitsandbytes where it is installed."""
    return once(run, "four_bit", limit, "benchmarks.kernels.four_bit", "four_bit.json")


def stage_sparse_mlp(run: Run, limit: float) -> bool:
    """MLPs of SparseLM-2B and Llama-2-7B at six densities, beside dense ones."""
    return once(run, "sparse_mlp", limit, "benchmarks.kernels.sparse_mlp", "sparse_mlp.json")


def stage_pruning(run: Run, limit: float) -> bool:
    """The pruner's stages on two layers of Qwen3-32B."""
    sources = fingerprint([ROOT / "vllm_spense" / "pruning", source_of(PRUNING)])
    options = ("--shape", "qwen3-32b")
    return once(run, "pruning", limit, PRUNING, "pruning.json", *options, sources=sources)


def once(
    run: Run, stage: str, limit: float, module: str, file: str, *options: str, sources: str | None = None
) -> bool:
    """A benchmark that is done when it ends by itself, once per state of its sources."""
    start = run.clock()
    sources = sources or fingerprint([ROOT / "kernels", ROOT / "vllm_spense", source_of(module)])
    old = run.state(stage)
    if old.get("state") == "done" and old.get("sources") == sources:
        run.say(f"PASS {stage}: kept what was measured on {old['date']}")
        return True
    options = ("--results", str(run.file(file)), *options)
    ended, tail = child(run, limit, module, *options)
    complete = ended.ok and not any("points left" in line and line[0] != "0" for line in tail[-1:])
    return finish(run, stage, start, ended, tail, complete, sources=sources)


STAGES = (
    Stage("build", "the extension: accepted, or compiled", 120, 5, stage_build),
    Stage("first", "small exact cases: is it right at all?", 60, 30, stage_first),
    Stage("speed", "decode, then prefill of the MLP, beside torch's dense FP8", 75, 35, stage_speed),
    Stage("test", "tests/gpu, the groups that decide what may be timed", 100, 30, stage_test),
    Stage("counters", "hardware counters of three kernels (ncu)", 60, 45, stage_counters),
    Stage("tune", "the dispatch table of four layers", 90, 45, stage_tune),
    Stage("stack", "16 compiled layers without an engine", 80, 50, stage_stack),
    Stage("serving", "16 layers in vLLM, Spense against dense FP8", 280, 150, stage_serving, needs="vllm"),
    Stage(
        "tests",
        "tests/gpu, all groups, sanitizers and Triton among them",
        480,
        60,
        lambda run, limit: stage_test(run, limit, core=False),
        default=False,
    ),
    Stage(
        "kernels",
        "all rows of the kernel benchmark, beside every other way to run them",
        900,
        60,
        lambda run, limit: stage_speed(run, limit, core=False),
        default=False,
    ),
    Stage("four_bit", "layers in 4 bits beside bitsandbytes", 180, 60, stage_four_bit, default=False),
    Stage(
        "sparse_mlp", "MLPs that skip neurons, beside dense ones", 180, 60, stage_sparse_mlp, default=False
    ),
    Stage("pruning", "the pruner", 240, 60, stage_pruning, default=False, needs="transformers"),
    Stage(
        "cutlass",
        "compiles the CUTLASS instances as well; run tests and kernels again afterwards",
        500,
        200,
        lambda run, limit: stage_build(run, limit, cutlass=True),
        default=False,
    ),
)
