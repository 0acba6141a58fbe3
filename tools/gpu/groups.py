"""The GPU tests in groups, each in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.results import ROOT
from benchmarks.common.supervise import Ended, stopping, supervise
from benchmarks.kernels.verdicts import config_of
from vllm_spense.ops.linear.configs import KernelConfig, label

LINEAR, TRITON = "tests/gpu/test_spense_linear.py", "tests/gpu/test_triton_linear.py"
FOUR_BIT, SPARSE_MLP = "tests/gpu/test_four_bit.py", "tests/gpu/test_sparse_mlp.py"
SILU_MUL, PRUNING = "tests/gpu/test_linear_silu_mul.py", "tests/gpu/test_pruning.py"
CONTEXT_LOST = 86  # tests/gpu/conftest.py
RESTARTS = 4
STARTING = 45.0
"""Seconds until the first test: several processes import torch at once."""


@dataclass(frozen=True)
class Group:
    """Tests that are run together. Skipped when one of ``needs`` failed outright; run after ``after``."""

    name: str
    tests: tuple[str, ...]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    file: str = LINEAR
    limit: float = 120.0
    silent: float = 15.0
    """Seconds without a word after which it hangs, from its first test on: most take less than one."""
    sanitizer: str = ""
    core: bool = False
    """Decides what may be timed: run first, in every call."""
    thin: bool = False
    """One case per configuration is enough for the core."""


BOTH_SPLITS = ("output_split", "input_split")
GROUPS = (
    Group("sparse_tile", ("test_the_library_matches_this_checkout", "test_sparse_tile"), core=True),
    Group("dense_tile", ("test_dense_tile",), after=("sparse_tile",), core=True),
    Group("output_split", ("test_output_split",), needs=("sparse_tile", "dense_tile"), core=True),
    Group("input_split", ("test_input_split",), needs=("sparse_tile", "dense_tile"), core=True),
    Group("split_k", ("test_split_k",), needs=("sparse_tile",), core=True),
    Group("multicast", ("test_multicast",), after=("sparse_tile",), core=True),
    Group("fused_shards", ("test_fused_shards",), needs=("output_split",), core=True, thin=True),
    Group("many_tiles", ("test_many_tiles",), needs=BOTH_SPLITS, core=True, thin=True),
    Group("ragged", ("test_ragged",), needs=BOTH_SPLITS, limit=180, core=True, thin=True),
    Group("dtypes", ("test_bias_and_output_dtypes",), needs=BOTH_SPLITS, core=True, thin=True),
    Group("memory", ("test_nothing_else_is_written",), needs=BOTH_SPLITS),
    Group("repeats", ("test_repeated_runs_give_the_same_bits",), needs=BOTH_SPLITS, core=True),
    Group("graphs", ("test_graph_replay", "test_side_stream"), needs=BOTH_SPLITS, core=True),
    Group(
        "overlap",
        ("test_chain_in_a_graph", "test_back_to_back_calls_into_one_output"),
        needs=BOTH_SPLITS,
        core=True,
    ),
    Group("accuracy", ("test_no_less_accurate_than_a_dense_fp8_product",), needs=BOTH_SPLITS),
    Group(
        "operator",
        ("test_operator", "test_back_end", "test_no_tokens", "test_opcheck"),
        needs=BOTH_SPLITS,
    ),
    Group("compile", ("test_compiled",), needs=BOTH_SPLITS, limit=180, silent=150),
    Group(
        "host",
        ("test_checkpoint_layout_runs_the_definition", "test_calls_that_make_no_sense_are_refused"),
        after=("sparse_tile",),
    ),
    Group(
        "triton",
        ("test_fp8_activations", "test_float_activations", "test_bias_and_output_dtypes"),
        after=("sparse_tile",),
        file=TRITON,
        limit=300,
        silent=90,
    ),
    Group(
        "four_bit",
        (
            "test_products",
            "test_matrices_are_the_definitions",
            "test_in_a_graph",
            "test_calls_that_make_no_sense_are_refused",
        ),
        after=("sparse_tile",),
        file=FOUR_BIT,
        limit=240,
        silent=90,
    ),
    Group(
        "sparse_mlp",
        (
            "test_mlps",
            "test_the_same_bits_every_time_and_in_a_graph",
            "test_words_are_the_definitions",
            "test_inputs_of_plain_layers",
            "test_a_gate_that_its_own_kernel_packs",
            "test_calls_that_make_no_sense_are_refused",
        ),
        after=("sparse_tile",),
        file=SPARSE_MLP,
        limit=240,
        silent=90,
    ),
    Group(
        "silu_mul",
        (
            "test_pairs",
            "test_operator_then_quantisation",
            "test_the_same_bits_every_time",
        ),
        needs=("output_split",),
        file=SILU_MUL,
        limit=180,
    ),
    Group(
        "pruning",
        ("test_hessian_of_halves", "test_solver_agrees_with_the_cpu", "test_devices_change_no_bit"),
        after=("sparse_tile",),
        file=PRUNING,
    ),
    *(
        Group(
            tool,
            ("test_small_cases_for_the_sanitizer",),
            after=("sparse_tile", "dense_tile", "output_split"),
            limit=150,
            sanitizer=tool,
        )
        for tool in ("memcheck", "racecheck", "synccheck")
    ),
)


def find_sanitizer() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    places = [shutil.which("compute-sanitizer"), *(f"{home}/bin/compute-sanitizer" for home in homes if home)]
    return next((place for place in places if place and Path(place).exists()), None)


def run_groups(
    groups: Iterable[Group],
    done: dict[str, Any],
    *,
    left: Callable[[], float],
    save: Callable[[dict[str, Any]], None],
    say: Callable[[str], None] = print,
    jobs: int = 4,
    run: Callable[..., dict[str, Any]] | None = None,
    thin: bool = False,
    banned: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the groups that ``done`` lacks, the first one alone; entries by name, saved as they come.

    Several processes share the device: right results do not depend on that, and it is half the time.
    ``thin``: one case per configuration in the groups for which that will do; configurations whose labels are
    ``banned`` are left out.
    """
    run = run or run_group
    run = partial(run, thin=thin, banned=banned)
    entries = {
        name: entry
        for name, entry in done.items()
        if entry.get("state") in ("passed", "clean") and (thin or not entry.get("thin"))
    }
    waiting = [group for group in groups if group.name not in entries]
    running: dict[Future, Group] = {}
    known = {group.name for group in waiting} | set(entries)
    with ThreadPoolExecutor(max(1, jobs)) as pool, _ends_children():
        while waiting or running:
            for group in list(waiting):
                failed = [n for n in group.needs if entries.get(n, {}).get("state") in ("failed", "skipped")]
                if failed:
                    entries[group.name] = {"state": "skipped", "reason": f"needs {', '.join(failed)}"}
                    say(f"SKIP {group.name}: {entries[group.name]['reason']}")
                elif left() < 15:
                    entries[group.name] = {"state": "not run", "reason": "no time left"}
                    say(f"SKIP {group.name}: no time left")
                elif len(running) < jobs and all(
                    name in entries for name in (*group.needs, *group.after) if name in known
                ):
                    running[pool.submit(run, group, left=left, say=say)] = group
                else:
                    continue
                waiting.remove(group)
            save(entries)
            if not running:
                continue
            for future in wait(running, timeout=5, return_when=FIRST_COMPLETED).done:
                group = running.pop(future)
                entries[group.name] = future.result()
                say(verdict_line(group.name, entries[group.name]))
    save(entries)
    return entries


@contextlib.contextmanager
def _ends_children() -> Iterator[None]:
    """Leaving by an exception ends the groups that run, instead of waiting for them."""
    try:
        yield
    except BaseException:
        stopping.set()
        raise


def verdict_line(name: str, entry: dict[str, Any]) -> str:
    counts = ", ".join(f"{entry[what]} {what}" for what in ("passed", "failed") if entry.get(what))
    error = f", largest error {entry['error']:.2e}" if entry.get("error") else ""
    reason = f" ({entry['reason']})" if entry.get("reason") else ""
    state, seconds = entry["state"].upper(), entry.get("seconds", 0)
    return f"{state} {name}: {counts}{error}{reason} [{seconds:.0f} s]"


def run_group(
    group: Group,
    *,
    left: Callable[[], float],
    say: Callable[[str], None],
    thin: bool = False,
    banned: Sequence[str] = (),
) -> dict[str, Any]:
    """Run one group; after a hang or a crash go on behind the test that did it, without its configuration."""
    if group.sanitizer:
        return run_sanitizer(group, left=left, say=say)
    start, thin = time.monotonic(), thin and group.thin
    ends: dict[str, dict[str, Any]] = {}
    broke: list[dict[str, Any]] = []
    left_out = [dataclasses.asdict(config_of(name)) for name in banned]
    reason, shown = "", [0]
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(RESTARTS):
            limit = min(group.limit - (time.monotonic() - start), left())
            if limit < 5:
                reason = reason or "no time left"
                break
            report = Path(folder) / f"report{attempt}.jsonl"
            skip = Path(folder) / "skip.json"
            configs = [*left_out, *(e["config"] for e in broke if e["config"])]
            skip.write_text(json.dumps({"tests": list(ends), "configs": configs}))
            ended = run_pytest(group, report, skip, limit, thin=thin)
            culprit = read_report(report, ends)
            for test, entry in ends.items():
                if entry["outcome"] == "failed" and not entry.get("shown"):
                    entry["shown"] = True
                    show_failure(group, test, entry["message"], shown, say)
            if ended.ok or ended.returncode in (1, 5):
                break
            reason = ended.reason
            if culprit is None or not (ended.killed or ended.returncode == CONTEXT_LOST):
                say(f"  {group.name}: {ended.reason}\n{ended.tail[-3000:]}")
                break
            message = f"{ended.reason}\n{ended.tail[-1500:]}"
            previous = ends.get(culprit["test"], {})
            ends[culprit["test"]] = {**culprit, **previous, "outcome": "failed", "shown": True}
            ends[culprit["test"]]["message"] = "\n".join(filter(None, (previous.get("message"), message)))
            broke.append(culprit)
            show_failure(group, culprit["test"], message, shown, say)
    entry = summary(ends, broke, reason, time.monotonic() - start)
    return entry | ({"thin": True} if thin else {})


def show_failure(
    group: Group, test: str, message: str, shown: list[int], say: Callable[[str], None], most: int = 3
) -> None:
    """The first few in full: the others are in the results file."""
    shown[0] += 1
    if shown[0] <= most:
        say(f"FAIL {group.name} {test.split('::')[-1]}\n    " + message.strip().replace("\n", "\n    "))


def run_pytest(
    group: Group,
    report: Path,
    skip: Path,
    limit: float,
    prefix: tuple[str, ...] = (),
    thin: bool = False,
) -> Ended:
    environment = {
        "SPENSE_TEST_REPORT": str(report),
        "SPENSE_SKIP_TESTS": str(skip),
        "SPENSE_THIN_TESTS": str(int(thin)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if prefix:  # every tensor an allocation of its own, so that memcheck sees a step beyond it
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    options = ("-v", "--tb=short", "-p", "no:cacheprovider", "--confcutdir=tests/gpu", "-W", "ignore")
    tests = [f"{group.file}::{test}" for test in group.tests]
    return supervise(
        [*prefix, sys.executable, "-m", "pytest", *options, *tests],
        limit=limit,
        idle=None if prefix else lambda: group.silent if report.is_file() else max(STARTING, group.silent),
        env=environment,
        cwd=ROOT,
        on_line=lambda line: None,
    )


def read_report(report: Path, ends: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Adds the ends of a report to ``ends``; returns the test that was started last."""
    last = None
    for line in report.read_text().splitlines() if report.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:  # the process was killed while it wrote
            break
        if event["event"] == "start":
            last = {"test": event["test"], "config": event["config"]}
        else:
            ends[event["test"]] = event
    return last


def summary(
    ends: dict[str, dict[str, Any]], broke: list[dict[str, Any]], reason: str, seconds: float
) -> dict[str, Any]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    configs: dict[str, dict[str, int]] = {}
    for entry in ends.values():
        counts[entry["outcome"]] += 1
        if entry.get("config"):
            of_config = configs.setdefault(label(KernelConfig(**entry["config"])), {"passed": 0, "failed": 0})
            if entry["outcome"] in of_config:
                of_config[entry["outcome"]] += 1
    passed, failed = counts["passed"], counts["failed"]
    if failed or (reason and not passed):
        state = "partly" if passed else "failed"
    elif reason or not passed:
        state = "not run" if not passed else "partly"
    else:
        state = "passed"
    if not passed and not failed and not reason:
        reason = "; ".join(sorted({entry["message"] for entry in ends.values()}))[:300]
    errors = [entry["error"] for entry in ends.values() if isinstance(entry.get("error"), float)]
    failures = [
        {"test": t, "message": e["message"][:4000]} for t, e in ends.items() if e["outcome"] == "failed"
    ]
    return {
        "state": state,
        **counts,
        "reason": reason,
        "error": max(errors, default=None),
        "configs": configs,
        "broke": sorted({label(KernelConfig(**e["config"])) for e in broke if e["config"]}),
        "failures": failures[:40],
        "seconds": round(seconds, 1),
    }


_KERNEL_FILTERS = (
    ("--kernel-name", "kernel_substring=linear_kernel"),
    ("--kernel-regex", "kns=linear_kernel"),
    (),
)
"""compute-sanitizer renamed its filter; with it only our kernels are instrumented."""


def run_sanitizer(group: Group, *, left: Callable[[], float], say: Callable[[str], None]) -> dict[str, Any]:
    """The small cases under compute-sanitizer. Evidence, not a gate: no timing depends on it."""
    start = time.monotonic()
    tool = find_sanitizer()
    if not tool:
        return {"state": "unavailable", "reason": "compute-sanitizer is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        report, skip = Path(folder) / "report.jsonl", Path(folder) / "skip.json"
        skip.write_text("{}")
        for kernels in _KERNEL_FILTERS:
            prefix = (tool, "--tool", group.sanitizer, "--error-exitcode", "99", *kernels)
            ended = run_pytest(group, report, skip, min(group.limit, left()), prefix)
            if report.is_file() or ended.killed:
                break  # else it never came to a test: an unknown option, as a rule
        ends: dict[str, dict[str, Any]] = {}
        read_report(report, ends)
    lines = [line for line in ended.tail.splitlines() if "SUMMARY" in line or "not supported" in line]
    passed = sum(entry["outcome"] == "passed" for entry in ends.values())
    if any("not supported" in line for line in lines) or not ends:
        state = "unavailable" if not ended.killed else "not run"
    elif ended.ok:
        state = "clean"
    else:
        state = "not run" if ended.killed else "errors"
    if state == "errors":
        say(f"{group.sanitizer} found:\n{ended.tail[-3000:]}")
    return {
        "state": state,
        "passed": passed,
        "reason": "; ".join(filter(None, (ended.reason, *lines[-2:]))),
        "tail": ended.tail[-6000:],
        "seconds": round(time.monotonic() - start, 1),
    }
