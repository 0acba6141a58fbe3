"""Points of a GPU benchmark: each measured once per state of the sources, as many as there is time for."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.common.results import RESULTS, ROOT, fingerprint, kernel_sources, provenance, read, write
from vllm_spense.ops.linear.timing import time_graph

Calls = list[Callable[[], object]]
Loaded = TypeVar("Loaded")


class Point(NamedTuple):
    """What a row goes by; the group whose weights it needs; what else ``measure`` gets."""

    key: str
    group: str
    arguments: tuple[Any, ...]


def parser(description: str | None, tokens: Sequence[int], results: str) -> argparse.ArgumentParser:
    """Options that all such benchmarks have: ``--tokens``, ``--budget`` and ``--results``, a file's name."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--tokens", type=int, nargs="+", default=list(tokens), metavar="N")
    made.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    made.add_argument("--results", type=Path, default=RESULTS / results)
    return made


def parse(
    made: argparse.ArgumentParser, arguments: Sequence[str] | None, most_tokens: int
) -> argparse.Namespace:
    """The options, after a check that there is something to measure and something to measure it on."""
    options = made.parse_args(arguments)
    if not set(options.tokens) <= set(range(1, most_tokens + 1)):
        made.error(f"--tokens: from 1 to {most_tokens}")
    if not torch.cuda.is_available():
        raise SystemExit("timing needs a CUDA device")
    return options


def times_of(parts: Mapping[str, Callable[[], Calls]]) -> dict[str, Any]:
    """Median µs by name, or why there are none."""
    found: dict[str, Any] = {}
    for name, make in parts.items():
        try:
            found[name] = round(time_graph(make()), 2)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return found


def line_of(key: str, times: Mapping[str, Any]) -> str:
    """What is printed of a row."""
    parts = (
        f"{name} {value:.1f} µs" if isinstance(value, float) else f"{name}: {value}"
        for name, value in times.items()
    )
    return f"{key:32s} {'  '.join(parts)}"


def sources_of(benchmark: str) -> str:
    """What figures depend on; ``benchmark``: its file."""
    return (
        f"{fingerprint([ROOT / 'vllm_spense' / 'ops', Path(benchmark), Path(__file__)])}/{kernel_sources()}"
    )


def run(
    points: Iterable[Point],
    load: Callable[[str], Loaded],
    measure: Callable[..., dict[str, Any]],
    options: argparse.Namespace,
    sources: str,
) -> None:
    """Fill in the rows that are missing or stale, in the order of ``points``, until the budget is used up.

    ``load(group)`` makes weights, which stay until another group comes; ``measure(loaded, *arguments)``
    gives times by name.
    """
    end = time.monotonic() + options.budget
    rows = read(options.results).get("rows", {})
    left = [point for point in points if rows.get(point.key, {}).get("sources") != sources]
    device = torch.cuda.get_device_name()
    loaded: dict[str, Loaded] = {}
    longest = 0.0
    while left and time.monotonic() + longest < end:
        began, point = time.monotonic(), left.pop(0)
        if point.group not in loaded:
            loaded.clear()
            torch.cuda.empty_cache()
            loaded[point.group] = load(point.group)
        times = measure(loaded[point.group], *point.arguments)
        rows[point.key] = {"sources": sources, "device": device, "us": times} | provenance()
        write(options.results, {"rows": rows})
        longest = max(longest, time.monotonic() - began)
        print(line_of(point.key, times), flush=True)
    print(f"{len(left)} points left")
