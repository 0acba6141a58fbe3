"""Real mount points for tests: a command in a mount namespace of its own, where the machine allows that."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

UNSHARE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]


@functools.cache
def _allowed() -> bool:
    script = "d=$(mktemp -d) && mount --bind $d $d"
    return subprocess.run([*UNSHARE, "sh", "-c", script], capture_output=True).returncode == 0


def run_with_mount(
    data: Path, place: Path, command: Sequence[object], **options: object
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` while the directory ``data`` is mounted at ``place``, as ``docker run -v`` does it."""
    if not _allowed():
        pytest.skip("no mount namespaces here")
    words = [str(word) for word in command]
    script = f"mount --bind {shlex.quote(str(data))} {shlex.quote(str(place))} && exec {shlex.join(words)}"
    return subprocess.run(
        [*UNSHARE, "sh", "-c", script], capture_output=True, text=True, timeout=300, **options
    )
