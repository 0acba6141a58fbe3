"""One call of `tools/gpu/command.py`: how much time is left, and where results lie.

At most eight files: `state.json` (a record per stage), `test.json`, `first_light.jsonl`, `kernels.json`,
`decode_stack.json`, `serving_decode.json`, the tuning table of the device, and `log.txt`.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.results import RESULTS, provenance, read, write
from benchmarks.common.supervise import Ended, supervise
from benchmarks.kernels.counters import find_ncu

SAVING = 8.0
"""Seconds kept for ending a child and writing what it leaves."""
FILES = 8
OWN_FILE = ("test",)
"""Stages whose record is long."""

made = functools.cache(provenance)  # asking git and nvidia-smi each time would cost seconds


class Run:
    """Results, time and children of one call; a rehearsal passes its own clock, children, test groups and
    ``profiler``, which says where Nsight Compute lies, if it does."""

    def __init__(
        self,
        results: Path,
        budget: float,
        *,
        fresh: bool = False,
        jobs: int = 1,
        only: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
        child: Callable[..., Ended] = supervise,
        group: Callable[..., dict[str, Any]] | None = None,
        profiler: Callable[[], str | None] = find_ncu,
    ) -> None:
        self.results, self.budget, self.fresh, self.jobs = results, budget, fresh, jobs
        self.only, self.clock, self.child, self.group = only, clock, child, group
        self.profiler = profiler
        self.start = clock()

    def seconds(self) -> float:
        """Since the call began."""
        return self.clock() - self.start

    def left(self) -> float:
        return self.budget - self.seconds() - SAVING

    def say(self, line: str) -> None:
        """To the terminal and, with the time, to the log: what is lost with the machine is at most a line."""
        print(line, flush=True)
        self.results.mkdir(parents=True, exist_ok=True)
        with (self.results / "log.txt").open("a") as log:
            log.write(f"{self.seconds():6.1f} {line}\n")

    def file(self, name: str) -> Path:
        return self.results / name

    def state(self, stage: str) -> dict[str, Any]:
        """What an earlier call, or this one, left."""
        if stage in OWN_FILE:
            return read(self.file(f"{stage}.json"))
        return read(self.file("state.json")).get(stage, {})

    def save(self, stage: str, state: str, start: float, **content: Any) -> None:
        """``start``: by the run's clock."""
        entry = {"stage": stage, "state": state, "seconds": round(self.clock() - start, 1)}
        entry |= made() | content
        if stage in OWN_FILE:
            write(self.file(f"{stage}.json"), entry)
        else:
            write(self.file("state.json"), read(self.file("state.json")) | {stage: entry})

    def seed(self, known: Path = RESULTS) -> None:
        """Start another results directory from what the repository holds."""
        self.results.mkdir(parents=True, exist_ok=True)
        for file in known.iterdir() if self.results != known and known.is_dir() else ():
            if file.suffix in (".json", ".jsonl") and not self.file(file.name).exists():
                shutil.copy(file, self.file(file.name))

    def forget(self, stages: Sequence[str]) -> None:
        """Drop what earlier calls left of these stages."""
        state = read(self.file("state.json"))
        write(self.file("state.json"), {name: entry for name, entry in state.items() if name not in stages})
        for stage, name in (("test", "test.json"), ("tests", "test.json"), ("first", "first_light.jsonl")):
            if stage in stages:
                self.file(name).unlink(missing_ok=True)
