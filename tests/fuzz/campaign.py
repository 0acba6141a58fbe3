"""Runs cases of every kind and counts how they ended; what violates the oracle is saved, shrunk."""

from __future__ import annotations

import faulthandler
import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis.strategies import SearchStrategy

from tests.fuzz.edits import Case, NotApplicableError
from tests.fuzz.limits import OvertimeError, ViolationError
from tests.fuzz.mutations import KINDS, cases

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where the damaged copies lie: thousands of short-lived files are no work for a disk."""
STUCK = 60.0
"""Seconds after which a case that no signal stops ends the process, with a traceback."""


@dataclass
class Result:
    """``counts`` by (kind, outcome); ``violations`` with the files that reproduce them."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: list[tuple[ViolationError, Path]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def table(self) -> str:
        """Counts per kind, one row each, as a Markdown table."""
        outcomes = sorted({outcome for _, outcome in self.counts})
        rows = [["kind", "cases", *outcomes], ["---"] * (2 + len(outcomes))]
        for kind in [*dict.fromkeys(kind for kind, _ in self.counts), "all"]:
            found = [
                sum(n for (k, o), n in self.counts.items() if o == x and kind in (k, "all")) for x in outcomes
            ]
            rows.append([kind, str(sum(found)), *map(str, found)])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


class Judge(Protocol):
    """What knows how a case must end."""

    def judge(self, case: Case) -> str:
        """The outcome; raises :class:`ViolationError`, or ``NotApplicableError``."""


class _EndError(BaseException):  # hypothesis lets it through, and does not try to shrink
    def __init__(self, violation: ViolationError) -> None:
        super().__init__()
        self.violation = violation


def run(
    oracle: Judge,
    bases: list[Any],
    number: int,
    first: int,
    found: Path,
    progress: Callable[[str], None] = lambda line: None,
    kinds: list[str] | None = None,
    shrink: bool = True,
    strategy: Callable[[str, list[Any]], SearchStrategy[Case]] = cases,
) -> Result:
    """``number`` cases in all, as many of each kind; ``first`` seeds them. Reproductions go to ``found``.

    ``strategy`` makes the cases of a kind out of ``bases``.
    """
    found.mkdir(parents=True, exist_ok=True)
    result, start, cpu = Result(), time.perf_counter(), time.process_time()
    names = kinds or list(KINDS)
    for i, kind in enumerate(names):
        share = (number - result.total + len(names) - i - 1) // (len(names) - i)
        try:
            _run_kind(oracle, strategy(kind, bases), kind, share, first, found, result, shrink)
        except ViolationError as violation:
            result.violations.append((violation, _keep(kind, found)))
            progress(f"VIOLATION in {kind}: {violation}\n  saved as {result.violations[-1][1]}")
        result.seconds, result.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        rate = result.total / result.seconds
        progress(f"{kind:24} {result.total:6} of {number} cases, {rate:5.1f} a second")
    return result


def _run_kind(
    oracle: Judge,
    strategy: SearchStrategy[Case],
    kind: str,
    number: int,
    first: int,
    found: Path,
    result: Result,
    shrink: bool,
) -> None:
    counted = Counter[tuple[str, str]]()

    @seed(f"{first} {kind}")
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        print_blob=False,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(strategy)
    def check(case: Case) -> None:
        (found / "running.json").write_text(case.text())
        faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            outcome = oracle.judge(case)
        except NotApplicableError:
            reject()
        except ViolationError as violation:
            (found / "smallest.json").write_text(case.text())
            if isinstance(violation, OvertimeError):
                raise _EndError(violation) from violation
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        counted[kind, outcome] += 1

    try:
        check()
    except _EndError as end:
        raise end.violation from None
    finally:
        result.counts += counted
        (found / "running.json").unlink(missing_ok=True)


def _keep(kind: str, found: Path) -> Path:
    """Name the smallest violation after its content."""
    text = (found / "smallest.json").read_text()
    path = found / f"{kind.replace(' ', '-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    (found / "smallest.json").rename(path)
    return path
