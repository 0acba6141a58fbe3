"""Watches the process that measures rows (worker.py), and turns its events into finished rows."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.results import ROOT, ClockLog, program
from benchmarks.common.supervise import Ended, supervise
from benchmarks.kernels.entries import describe_row, line_of
from benchmarks.kernels.shapes import Row
from benchmarks.kernels.worker import CONTEXT_LOST, EVENT
from vllm_spense.ops.linear.configs import KernelConfig

SILENT = 75.0
"""Seconds without an event after which it hangs: libraries take some to start and to search."""
OURS_SILENT = 15.0
"""The same while one of our own kernels is checked and timed."""
Parts = dict[str, KernelConfig | None]
"""What is measured for a row, by name; a configuration for ours, None for a baseline."""


class Recorder:
    """Turns events into rows; knows what broke, so that it is not tried again."""

    def __init__(
        self, plan: dict[str, tuple[Row, Parts]], skipped: dict[tuple[str, str], str], facts: dict[str, Any]
    ) -> None:
        self.plan, self.facts = plan, facts
        self.results: dict[str, dict[str, Any]] = {
            key: {name: {"skipped": skipped[key, name]} for name in parts if (key, name) in skipped}
            for key, (_, parts) in plan.items()
        }
        self.broken: dict[str, str] = {}
        self.current: tuple[str, str] | None = None
        self.bandwidth = 0.0
        self.clocks: dict[str, Any] = {}
        self.finished: list[str] = []

    def jobs(self) -> list[dict[str, Any]]:
        """What is left to measure, without parts that broke a process before."""
        left = []
        for key, (row, parts) in self.plan.items():
            if key in self.finished:
                continue
            for name in parts:
                if name in self.broken:
                    self.results[key].setdefault(name, {"skipped": self.broken[name]})
            todo = {n: c and dataclasses.asdict(c) for n, c in parts.items() if n not in self.results[key]}
            spec = row.spec
            left.append(
                {
                    "key": key,
                    "split": spec.split,
                    "out_features": spec.out_features,
                    "in_features": spec.in_features,
                    "sparse_sizes": spec.sparse_sizes,
                    "dense_sizes": spec.dense_sizes,
                    "tokens": row.tokens,
                    "parts": todo,
                }
            )
        return left

    def take(self, event: dict[str, Any], log: ClockLog) -> str | None:
        """Digest one event; the key of a row that is now complete."""
        kind, key = event["event"], event.get("key", "")
        if kind == "ready":
            self.bandwidth = event["bandwidth"]
        elif kind == "row":
            self.clocks = {"clocks_before": log.restart()}
        elif kind == "begin":
            self.current = key, event["part"]
        elif kind == "end":
            self.results[key][event["part"]] = event["result"]
            self.current = None
            if event.get("lost"):
                self.broken[event["part"]] = f"broke the device in {key}"
        elif kind == "done":
            self.clocks |= {"clocks_after": log.latest, "lowest_sm_mhz": log.lowest_sm_mhz}
            self.finished.append(key)
            return key
        return None

    def died(self, ended: Ended) -> None:
        """The measuring process is gone: what it was at is to blame."""
        if self.current is not None:
            key, name = self.current
            said = " ".join(line for line in ended.tail.splitlines() if not line.startswith(EVENT))
            self.results[key][name] = {"error": f"{ended.reason}: {said[-300:]}".rstrip(": ")}
            self.broken[name] = f"not tried: it hung or crashed in {key}"
            self.current = None

    def entry(self, key: str) -> dict[str, Any]:
        row, _ = self.plan[key]
        return describe_row(row, self.results[key], self.bandwidth, self.facts) | self.clocks


def measure_rows(
    recorder: Recorder,
    *,
    budget: float,
    save: Callable[[dict[str, Any]], None],
    say: Callable[[str], None] = print,
    command: Sequence[str] = tuple(program("benchmarks.kernels.worker")),
    silent: float = SILENT,
    ours_silent: float = OURS_SILENT,
    deaths: int = 12,
) -> str:
    """Measure all rows of the recorder within ``budget`` seconds; ``save`` gets each as it is complete.

    A process that hangs or dies is replaced, and goes on behind the part that did it. Returns how it ended.
    """
    end = time.monotonic() + budget

    def idle() -> float:
        ours = recorder.current is not None and recorder.current[1].startswith("ours:")
        return min(silent, ours_silent) if ours else silent

    def on_line(line: str) -> None:
        if not line.startswith(EVENT):
            if line.strip():
                say(f"  {line}")
            return
        key = recorder.take(json.loads(line[len(EVENT) :]), log)
        if key:
            entry = recorder.entry(key)
            save(entry)
            say(line_of(entry))

    with ClockLog() as log, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.json"
        for _ in range(deaths):
            jobs = recorder.jobs()
            if not jobs:
                return "all rows measured"
            if end - time.monotonic() < 3:
                return f"the {budget:.0f} s are over, {len(jobs)} rows are left"
            path.write_text(json.dumps(jobs))
            ended = supervise(
                [*command, str(path)],
                limit=end - time.monotonic(),
                idle=idle,
                cwd=ROOT,
                on_line=on_line,
            )
            if ended.ok:
                continue
            if "over its limit" in ended.reason:
                return f"the {budget:.0f} s are over, {len(recorder.jobs())} rows are left"
            if recorder.current is None and ended.returncode != CONTEXT_LOST:
                return f"the measuring process failed: {ended.reason}\n{ended.tail[-1500:]}"
            recorder.died(ended)
            say(f"  {ended.reason}; going on in a new process")
    return f"{deaths} measuring processes died"
