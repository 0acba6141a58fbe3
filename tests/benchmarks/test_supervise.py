"""Child processes that hang or die end at their limits, with their own children."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.common.supervise import supervise


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
