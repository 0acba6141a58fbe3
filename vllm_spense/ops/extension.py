"""The compiled extensions: found, loaded once, and why not where one is not there."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def why_not_loaded() -> str | None:
    """Load the CUDA kernels on first call; None when they are there, else the reason in one line."""
    return _load("_C", "the CUDA extension is not built (needs nvcc at install time, see docs/kernels.md)")


@functools.cache
def why_not_loaded_cpu() -> str | None:
    """The same of the CPU kernels."""
    return _load(
        "_cpu", "the CPU extension is not built (needs g++ on x86-64 at install time, see docs/kernels.md)"
    )


def _load(stem: str, missing: str) -> str | None:
    libraries = sorted(_PACKAGE.glob(f"{stem}*.so"))
    if not libraries:
        return missing
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        return f"{libraries[0].name} does not load under torch {torch.__version__}: {error}"
    return None


@functools.cache
def cutlass_capabilities() -> frozenset[tuple[int, int]]:
    """Compute capabilities that the CUTLASS instances were compiled for; empty without them."""
    if why_not_loaded() or not hasattr(torch.ops.spense, "linear_cutlass"):
        return frozenset()
    return frozenset(divmod(code, 10) for code in torch.ops.spense.cutlass_capabilities())


def sm90_clusters(
    rows: int, tokens: int, cluster: int, multicast: bool, paired: bool = False, packed: bool = False
) -> int:
    """How many clusters of this instance of the Hopper kernel the current CUDA device runs at once.

    ``paired``: of the one with SiLU·mul; ``packed``: of the one that writes TwELL's words. 0 where not a
    single one fits (a slice of a GPU may have too few multiprocessors in a row). ``RuntimeError`` for an
    instance that is not compiled, and with what CUDA says where it fails.
    """
    return int(torch.ops.spense.sm90_clusters(rows, tokens, cluster, multicast, paired, packed))
