"""Tables and plot of the kernel benchmark, made from its JSON alone; slower-than-dense rows included."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT, read
from benchmarks.kernels.baselines import BASELINES
from benchmarks.kernels.shapes import LAYERS, MODELS, RATIOS

NAMES = {
    "scaled_mm": "torch dense FP8",
    "vllm_cutlass": "vLLM dense FP8",
    "paper": "cuSPARSELt + dense",
    "slide_sparse": "6:8 (cuSPARSELt, 1.5 K)",
}
SUMMARY_TOKENS = (1, 16, 64, 256, 2048, 8192)
Rows = list[dict[str, Any]]


def report(results: Path, root: Path = ROOT) -> None:
    """Write docs/kernels_<device>.md, its plot, and the summary in docs/kernels.md."""
    rows: Rows = read(results).get("rows", [])
    if not rows:
        raise SystemExit(f"{results} holds no rows: run the benchmark first")
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        name = re.sub(r"[^a-z0-9]+", "_", device.lower().replace("nvidia", "")).strip("_")
        plot, document = root / "docs" / "img" / f"kernels_{name}.png", root / "docs" / f"kernels_{name}.md"
        plot.parent.mkdir(parents=True, exist_ok=True)
        write_plot(own, device, plot)
        document.write_text(write_document(own, device, f"img/{plot.name}"))
        fill_summary(root / "docs" / "kernels.md", summary(own, device, f"img/{plot.name}", document.name))
        print(f"{document}: {len(own)} rows")


def write_document(rows: Rows, device: str, plot: str) -> str:
    lines = [
        f"# Measured on {device}",
        "",
        "Made by `python -m benchmarks.kernels.spense_linear --report`; do not edit. µs per call: median of "
        "CUDA graph replays, weights read from memory. **× dense**: the time of the faster dense FP8 product "
        "(torch's, or vLLM's where it is installed) over ours; below 1 dense is faster. "
        "≤: what bytes (few tokens) or operations (many) allow at best.",
        "",
        f"![speed-up over dense FP8]({plot})",
        "",
        _facts(rows),
    ]
    for model in _present(rows, "model", [m.name for m in MODELS]):
        for layer in _present(rows, "layer", LAYERS):
            of_layer = [r for r in rows if (r["model"], r["layer"]) == (model, layer)]
            if of_layer:
                n, k = of_layer[0]["out_features"], of_layer[0]["in_features"]
                split = of_layer[0]["split"]
                lines += ["", f"## {model} {layer}: {n} × {k}, {split} split", "", *_table(of_layer)]
    notes = _notes(rows)
    return "\n".join([*lines, *(["", "## Notes", "", *notes] if notes else [])]) + "\n"


def _facts(rows: Rows) -> str:
    copies = sorted({row["copy_tbps"] for row in rows if row.get("copy_tbps")})
    clocks = [row["lowest_sm_mhz"] for row in rows if row.get("lowest_sm_mhz")]
    versions = dict(sorted((k, v) for row in rows for k, v in row.get("versions", {}).items()))
    wins = [row["times_dense"] for row in rows if row.get("times_dense")]
    text = [f"{len(rows)} rows, {sum(w > 1 for w in wins)} of {len(wins)} faster than dense."]
    if copies:
        text.append(f"Device copy: {copies[0]:.2f} to {copies[-1]:.2f} TB/s (read + write).")
    if clocks:
        text.append(f"Lowest SM clock during a row: {min(clocks):.0f} to {max(clocks):.0f} MHz.")
    if versions:
        text.append(", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    commits = ", ".join(sorted({str(row["commit"]) for row in rows if row.get("commit")}))
    dates = sorted({row["date"] for row in rows if row.get("date")})
    commands = ", ".join(f"`{c}`" for c in sorted({row["command"] for row in rows if row.get("command")}))
    return " ".join(
        [
            *text,
            f"Commit {commits or 'unknown'}, {dates[0] if dates else ''} … {dates[-1] if dates else ''}.",
            commands,
        ]
    )


def _table(rows: Rows) -> list[str]:
    others = [name for name in BASELINES if any(name in row["baselines"] for row in rows)]
    head = [
        "dense ratio",
        "tokens",
        "ours µs",
        "overlapped µs",
        "TB/s",
        "TFLOP/s",
        "× dense",
        "≤",
        "% of bound",
    ]
    head += [f"{NAMES[name]} µs" for name in others] + ["configuration"]
    lines = []
    order = {ratio: i for i, ratio in enumerate(RATIOS)}
    for row in sorted(rows, key=lambda r: (order.get(r["dense_ratio"], 9), r["tokens"])):
        limit = row["limit_by_bytes"] if row["bound_by"] == "memory" else row["limit_by_operations"]
        ratio = row.get("times_dense")
        cells = [f"{row['dense_ratio']:g}", str(row["tokens"]), _us(row.get("us"))]
        cells += [
            _us(row.get("us_overlapped")),
            _number(row.get("tbps"), 2),
            _number(row.get("tflops"), 0),
        ]
        cells += [
            f"**{ratio:.2f}**" if ratio else "–",
            f"{limit:.2f}",
            _number(row.get("percent_of_bound"), 0),
        ]
        cells += [_baseline(row["baselines"].get(name)) for name in others]
        untested = "" if row.get("tested", True) else " (not covered by a finished test)"
        cells.append(f"{row['config']}{untested}" if row.get("config") else _why_not(row))
        lines.append(cells)
    return table(head, lines).splitlines()


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _baseline(result: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    return _us(result["us"]) if "us" in result else "error" if "error" in result else "not tried"


def _why_not(row: dict[str, Any]) -> str:
    reasons = [r.get("error") or r.get("skipped") or "" for r in row["ours"].values()]
    return _cell(reasons[0]) if reasons else "no configuration"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:120]


def _notes(rows: Rows) -> list[str]:
    """What the figures leave out and what failed, each thing once."""
    found: dict[str, int] = {}
    for row in rows:
        for name, result in row["baselines"].items():
            for kind in ("note", "error", "skipped"):
                if result.get(kind):
                    text = re.sub(r"algorithm \d+, split K -?\d+", "algorithm by search", str(result[kind]))
                    key = f"{NAMES.get(name, name)}: {_cell(text)}"
                    found[key] = found.get(key, 0) + 1
        for name, result in row["ours"].items():
            if result.get("error"):
                key = f"ours, {name}: {_cell(result['error'])}"
                found[key] = found.get(key, 0) + 1
    lines = [f"- {text} ({count} rows)" for text, count in found.items()]
    overlapped = (
        "- overlapped µs: back to back with programmatic dependent launch: each call fetches weights while "
        "the one before computes. All other figures are without, as the baselines run."
    )
    return [overlapped, *lines]


def _present(rows: Rows, field: str, order: Sequence[str]) -> list[str]:
    return [name for name in order if any(row[field] == name for row in rows)]


def summary(rows: Rows, device: str, plot: str, document: str) -> list[str]:
    """Speed-up over dense of the MLP layers by tokens; every model and ratio that was measured."""
    head = ["layer", "dense ratio", *(f"M = {tokens}" for tokens in SUMMARY_TOKENS)]
    lines = []
    for model in _present(rows, "model", [m.name for m in MODELS]):
        for layer in ("gate_up", "down"):
            for ratio in RATIOS:
                of = {
                    r["tokens"]: r.get("times_dense")
                    for r in rows
                    if (r["model"], r["layer"], r["dense_ratio"]) == (model, layer, ratio)
                }
                if any(of.get(tokens) for tokens in SUMMARY_TOKENS):
                    cells = [f"{of[t]:.2f}×" if of.get(t) else "–" for t in SUMMARY_TOKENS]
                    lines.append([f"{model} {layer}", f"{ratio:g}", *cells])
    text = f"Time of dense FP8 over ours on one {device}, by layer and M tokens (above 1: Spense is faster):"
    return [
        text,
        "",
        table(head, lines),
        "",
        f"![speed-up over dense FP8]({plot})",
        "",
        f"All rows: [{document}]({document}).",
    ]


def fill_summary(document: Path, lines: Iterable[str]) -> None:
    """Between the markers, if the file has them."""
    if document.is_file():
        insert(document, "speed", "\n".join(lines))


def write_plot(rows: Rows, device: str, path: Path) -> None:
    """Speed-up over dense against tokens, one panel per layer; dashed: what bytes and operations allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = _present(rows, "model", [m.name for m in MODELS])
    layers = _present(rows, "layer", LAYERS)
    size = (3.2 * len(layers) + 0.6, 2.5 * len(models) + 0.9)
    figure, grid = pyplot.subplots(len(models), len(layers), figsize=size, squeeze=False, sharey=True)
    colours = dict(zip(RATIOS, ("#33658a", "#f6ae2d", "#c8553d"), strict=True))
    handles: dict[str, Any] = {}
    for axes, model in zip(grid, models, strict=True):
        for axis, layer in zip(axes, layers, strict=True):
            if not any((r["model"], r["layer"]) == (model, layer) for r in rows):
                axis.set_axis_off()
                continue
            axis.axhline(1, color="#999", linewidth=0.8)
            for ratio, colour in colours.items():
                points = sorted(
                    (r["tokens"], r.get("times_dense"), r["limit_by_bytes"], r["limit_by_operations"])
                    for r in rows
                    if (r["model"], r["layer"], r["dense_ratio"]) == (model, layer, ratio)
                )
                known = [(p[0], p[1]) for p in points if p[1]]
                if known:
                    (line,) = axis.plot(
                        *zip(*known, strict=True), "o-", color=colour, markersize=3, linewidth=1.2
                    )
                    handles[f"dense ratio {ratio:g}"] = line
                if points:
                    tokens = [p[0] for p in points]
                    (bytes_line,) = axis.plot(
                        tokens, [p[2] for p in points], "--", color=colour, linewidth=0.8, alpha=0.8
                    )
                    (operations_line,) = axis.plot(
                        tokens, [p[3] for p in points], ":", color=colour, linewidth=0.9, alpha=0.8
                    )
                    handles |= {"limit by bytes": bytes_line, "limit by operations": operations_line}
            axis.set_xscale("log", base=2)
            axis.set_xticks([1, 8, 64, 512, 4096, 32768], ["1", "8", "64", "512", "4K", "32K"])
            axis.set_title(f"{model} {layer}", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("× dense FP8", fontsize=7)
    for axis in grid[-1]:
        axis.set_xlabel("tokens", fontsize=7)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="lower center",
        ncol=len(handles) or 1,
        fontsize=7,
        frameon=False,
    )
    figure.suptitle(f"Spense layers against dense FP8 on {device} (above 1: faster)", fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 0.98))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
