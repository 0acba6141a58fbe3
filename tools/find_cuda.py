"""Where nvcc and the CUTLASS headers lie: for setup.py, the emulator of tests and `make gpu`.

Standard library only: setup.py imports it in build environments that hold nothing else.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

NO_NVCC = "no nvcc found (set CUDA_HOME)"
NO_CUTLASS = "no CUTLASS headers (pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_HOME)"


def find_nvcc() -> Path | None:
    """``NVCC``, ``CUDA_HOME/bin/nvcc``, nvcc on PATH or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [
        os.environ.get("NVCC"),
        home and f"{home}/bin/nvcc",
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((Path(p).resolve() for p in places if p and Path(p).exists()), None)


def find_package(name: str) -> Path | None:
    """Directory of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def find_cutlass() -> Path | None:
    """A tree with CUTLASS's ``include``: ``CUTLASS_HOME``, or what the package nvidia-cutlass carries."""
    if home := os.environ.get("CUTLASS_HOME"):
        tree = Path(home)
    elif package := find_package("cutlass_library"):
        tree = package / "source"
    else:
        return None
    return tree if (tree / "include" / "cutlass" / "cutlass.h").is_file() else None
