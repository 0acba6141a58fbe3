"""Child processes that may hang or die: time limits, and an end for the whole process group."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a child ended; ``reason`` is empty if it exited by itself with code 0."""

    returncode: int | None
    reason: str
    seconds: float
    tail: str

    @property
    def ok(self) -> bool:
        return not self.reason

    @property
    def killed(self) -> bool:
        """Ended by a limit or a signal rather than by itself."""
        return self.returncode is None or self.returncode < 0 or self.reason.startswith("killed")


stopping = threading.Event()
"""Set it to end every child that any thread supervises."""


def supervise(
    command: Sequence[str],
    *,
    limit: float,
    idle: float | Callable[[], float] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] = print,
) -> Ended:
    """Run a child in its own process group; every line of its output goes to ``on_line``.

    Ended with all its own children after ``limit`` seconds, or once it has printed nothing for ``idle``
    seconds (a number, or a function that is asked for it). A process that survives SIGKILL (stuck in a
    driver) is left behind after 20 s.
    """
    start = time.monotonic()
    child = subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(os.environ) | dict(env or {}),
        cwd=cwd,
        process_group=0,
    )
    chunks: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_pump, args=(child, chunks), daemon=True).start()
    lines, pending, heard, reason, finished, quiet = [""], b"", start, "", False, 0
    try:
        while True:
            now = time.monotonic()
            if stopping.is_set():
                reason = "killed: interrupted"
                break
            if now - start > limit:
                reason = f"killed: over its limit of {limit:.0f} s"
                break
            patience = idle() if callable(idle) else idle
            if patience is not None and now - heard > patience:
                reason = f"killed: silent for {patience:.0f} s"
                break
            try:
                chunk = chunks.get(timeout=0.2)
            except queue.Empty:
                quiet += child.poll() is not None
                if quiet < 5:
                    continue
                chunk = None  # a grandchild may hold the pipe open: that is no reason to wait
            if chunk is None:
                break
            heard = time.monotonic()
            *whole, pending = (pending + chunk).split(b"\n")
            for line in whole:
                text = line.decode(errors="replace")
                lines = [*lines[-80:], text]
                on_line(text)
        if pending:
            lines.append(pending.decode(errors="replace"))
            on_line(lines[-1])
        finished = not reason
    finally:
        code = end_group(child, wait=10 if finished else 0)
    if code is None:
        reason = reason or "killed"
        reason += ", and does not die"
    if not reason and code:
        reason = f"exit code {code}" if code > 0 else f"died of {signal.Signals(-code).name}"
    return Ended(code, reason, time.monotonic() - start, "\n".join(lines).strip())


def _pump(child: subprocess.Popen, chunks: queue.Queue) -> None:
    assert child.stdout is not None
    while chunk := os.read(child.stdout.fileno(), 65536):
        chunks.put(chunk)
    chunks.put(None)


def end_group(child: subprocess.Popen, wait: float) -> int | None:
    """Let the child exit for ``wait`` seconds, then end its group; None if it lives on.

    SIGTERM comes first: a child that supervises others itself ends them.
    """
    for patience, sign in ((wait, signal.SIGTERM), (3, signal.SIGKILL)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
        if child.returncode is None or sign == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, sign)
    try:
        return child.wait(20)
    except subprocess.TimeoutExpired:
        return None
