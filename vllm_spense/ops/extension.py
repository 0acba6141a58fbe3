"""The compiled CUDA extension: found, loaded once, and why not where it is not there."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def why_not_loaded() -> str | None:
    """Load the extension on first call; None when its operators are there, else the reason in one line."""
    libraries = sorted(_PACKAGE.glob("_C*.so"))
    if not libraries:
        return "the CUDA extension is not built (needs nvcc at install time, see README)"
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        return f"{libraries[0].name} does not load under torch {torch.__version__}: {error}"
    return None


def has_cutlass() -> bool:
    """Whether the CUTLASS instances were compiled in."""
    return why_not_loaded() is None and hasattr(torch.ops.spense, "linear_cutlass")
