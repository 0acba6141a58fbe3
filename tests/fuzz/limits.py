"""What every judged step has to keep to: its time, its memory, and the form of its errors."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10.0
"""Per step (verify, serving); undamaged, both take less than 0.1 s."""
MEMORY = 1 << 30
"""Bytes that a step may add to the process."""
LONGEST = 4000
"""Characters of an error."""


class ViolationError(AssertionError):
    """A case that the product got wrong."""


class OvertimeError(ViolationError):
    """A step that took too long; every attempt to shrink it would, too."""


class StopError(BaseException):  # no Exception: the product must not swallow it
    """The time is over."""


@contextmanager
def limits(seconds: float = SECONDS) -> Iterator[None]:
    """Time and memory: what a bomb would take becomes an error here, not the machine's trouble."""

    def stop(*_: object) -> None:
        raise StopError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fault_of(text: str) -> str | None:
    """What is wrong with the form of an error, if anything."""
    if "MemoryError" in text or "allocate memory" in text:
        return "found out by taking all memory"
    if len(text) > LONGEST:
        return f"{len(text)} characters"
    if not text.isprintable():
        return "control characters or broken unicode from the file"
    return None
