"""How much quality does each pruning method cost? Perplexity of SmolLM2-135M-Instruct on Wikipedia text.

usage: python -m benchmarks.accuracy.smollm2 [--rows spensegpt+0.5 …] [--plot-only]

Prunes the model's MLPs with every method (64 calibration windows of 512 tokens of the train split) and
scores 32 windows of 512 tokens of the test split: with bf16 weights, and pruned for FP8 and INT8 (each layer
is calibrated behind rounded ones), with weights only and with activations rounded too (W8A8). Finished
figures in benchmarks/results/accuracy_smollm2.json are kept: run it again to go on, `--again` to measure a
row once more. docs/accuracy_smollm2.md and its plot are made from that file. An hour and a half on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from math import log
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.common.markdown import table
from benchmarks.common.results import ROOT
from vllm_spense.demo_assets import fetch_model, fetch_text
from vllm_spense.evaluation import evaluate
from vllm_spense.pruning import PruneConfig, PruneProgress, prune

RESULTS = ROOT / "benchmarks" / "results" / "accuracy_smollm2.json"
TABLE = ROOT / "docs" / "accuracy_smollm2.md"
PLOT = ROOT / "docs" / "img" / "accuracy_smollm2.png"
COMMAND = "python -m benchmarks.accuracy.smollm2"
COLUMNS = {
    "bf16": "bf16 weights",
    "fp8": "FP8 weights",
    "w8a8": "FP8 weights + activations",
    "int8": "INT8 weights",
    "int8-w8a8": "INT8 weights + activations",
}
ROUNDED: dict[str, tuple[str, Literal["checkpoint", "none"]]] = {
    "fp8": ("fp8", "none"),
    "w8a8": ("fp8", "checkpoint"),
    "int8": ("int8", "none"),
    "int8-w8a8": ("int8", "checkpoint"),
}
"""Columns of a checkpoint in a codec; activations as the checkpoint says, or not rounded."""


@dataclass(frozen=True)
class Row:
    """One line of the table; ``options`` go to PruneConfig (None: the dense model)."""

    key: str
    label: str
    sparsity: str
    options: dict[str, Any] | None


ROWS = [
    Row("dense", "dense", "0", None),
    Row(
        "magnitude",
        "magnitude, strict 2:4",
        "50 %",
        {"method": "magnitude", "selection": "spensegpt", "dense_ratio": 0},
    ),
    Row("wanda", "Wanda, strict 2:4", "50 %", {"method": "wanda", "dense_ratio": 0}),
    Row("sparsegpt", "SparseGPT, strict 2:4", "50 %", {"preset": "sparsegpt"}),
    Row(
        "spensegpt+0.25",
        "SpenseGPT+, dense ratio 0.25",
        "37.5 %",
        {"preset": "spensegpt+", "dense_ratio": 0.25},
    ),
    Row(
        "spensegpt0.5",
        "SpenseGPT, dense ratio 0.5",
        "25 %",
        {"selection": "spensegpt", "dense_ratio": 0.5},
    ),
    Row("spensegpt+0.5", "SpenseGPT+, dense ratio 0.5", "25 %", {"preset": "spensegpt+", "dense_ratio": 0.5}),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=ROOT / ".cache" / "assets")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "accuracy")
    parser.add_argument("--rows", nargs="*", choices=[row.key for row in ROWS], metavar="ROW")
    parser.add_argument("--again", action="store_true", help="measure what is known already once more")
    parser.add_argument("--plot-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.plot_only:
        model, text = fetch_model(arguments.assets, print), fetch_text(arguments.assets, print)
        for row in ROWS:
            if not arguments.rows or row.key in arguments.rows:
                measure(row, model, text, arguments.work, arguments.again)
    results = load_results()
    write_table(results)
    write_plot(results)


def load_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}


def save_entry(row: Row, entry: dict[str, Any]) -> None:
    """Write one row into the results as they are now, so that two processes can share the rows."""
    results = load_results()
    results["rows"][row.key] = entry
    results |= {"command": COMMAND, "environment": environment()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def measure(row: Row, model: Path, text: Path, work: Path, again: bool) -> None:
    """Fill in the figures of one row that are missing, saving after each."""
    entry = load_results()["rows"].get(row.key, {})
    if again or not entry:
        entry = {"label": row.label, "mlp_sparsity": row.sparsity}
    for column, title in COLUMNS.items():
        if column in entry:
            continue
        codec, activations = ROUNDED.get(column, ("bf16", "checkpoint"))
        directory = model if row.options is None and codec == "bf16" else work / row.key / codec
        if not directory.is_dir():
            seconds = make(row, codec, model, text, directory)
            if codec == "bf16":
                entry["prune_seconds"] = round(seconds, 1)
        result = evaluate(directory, text / "test.txt", activations=activations)
        entry[column] = round(result.perplexity, 4)
        entry[f"{column}_seconds"] = round(result.seconds, 1)
        print(f"{row.label}, {title}: {result.perplexity:.3f}", flush=True)
        save_entry(row, entry)


def make(row: Row, codec: str, model: Path, text: Path, directory: Path) -> float:
    """Prune for a codec's weights (the dense model is only rounded); seconds that took."""
    options = row.options or {"method": "magnitude", "selection": "spensegpt", "dense_ratio": 1}
    train = None if row.key in ("dense", "magnitude") else str(text / "train.txt")
    config = PruneConfig(calibration=train, weight_dtype=codec, **options)
    return prune(model, directory, config, report).seconds


def report(progress: PruneProgress) -> None:
    losses = " ".join(f"{loss:.4f}" for loss in progress.losses.values())
    print(
        f"  layer {progress.layer}/{progress.layers} loss {losses}, {progress.remaining:.0f} s left",
        flush=True,
    )


def environment() -> dict[str, Any]:
    cpu, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", info.read_text(), re.MULTILINE))
        cpu, flags = fields.get("model name", cpu), fields.get("flags", "")
    return {
        "cpu": cpu,
        "amx": "amx_bf16" in flags.split(),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("torch", "transformers", "vllm-spense")},
        "date": time.strftime("%Y-%m-%d"),
    }


def write_table(results: dict[str, Any]) -> None:
    """The page in docs/; each FP8 figure with its distance from bf16."""
    lines = []
    for row in ROWS:
        entry = results["rows"].get(row.key, {})
        cells = []
        for column in COLUMNS:
            value, base = entry.get(column), entry.get("bf16")
            if value is None:
                cells.append("–")
            else:
                change = "" if column == "bf16" else f" ({log(value / base):+.3f})"
                cells.append(f"{value:.2f}{change}")
        lines.append([row.label, row.sparsity, *cells])
    note = (
        "# What rounding to FP8 and INT8 costs\n\n"
        "Perplexity of SmolLM2-135M-Instruct on the Wikipedia test split (32 windows of 512 tokens); only "
        "the MLPs are pruned;\ncalibration: 64 windows of 512 tokens of the train split. FP8 and INT8 "
        "columns are `spense prune --weight-dtype fp8`\n(the default) and `int8`, attention rounded too; in "
        "brackets nats over the same row's bf16 weights. "
        f"Made by `{COMMAND}`.\n\n"
    )
    shown = table(["method", "MLP sparsity", *COLUMNS.values()], lines)
    picture = f"![perplexity against MLP sparsity](img/{PLOT.name})"
    TABLE.write_text(f"{note}{shown}\n\n{picture}\n")
    print(shown)


def write_plot(results: dict[str, Any]) -> None:
    """Bars of perplexity per method; bars beyond the axis are cut and labelled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in ROWS if "bf16" in results["rows"].get(row.key, {})]
    limit = 95.0
    figure, axis = pyplot.subplots(figsize=(8, 5.4))
    colours = dict(zip(COLUMNS, ("#33658a", "#86bbd8", "#f6ae2d", "#9bc53d", "#5b7f2b"), strict=True))
    height = 0.8 / len(COLUMNS)
    for i, column in enumerate(COLUMNS):
        entries = [results["rows"][row.key] for row in rows]
        known = [(j, entry[column]) for j, entry in enumerate(entries) if column in entry]
        values = [value for _, value in known]
        places = [j + (i - (len(COLUMNS) - 1) / 2) * height for j, _ in known]
        shown = [min(value, limit) for value in values]
        axis.barh(places, shown, 0.96 * height, color=colours[column], label=COLUMNS[column])
        for place, value, width in zip(places, values, shown, strict=True):
            text = f"{value:.1f}" if value < limit else f"{value:,.0f} (off the scale)"
            inside = value >= limit
            axis.text(
                width + (-1 if inside else 0.6),
                place,
                text,
                va="center",
                ha="right" if inside else "left",
                color="white" if inside and i == 0 else "black",
                fontsize=6.5,
            )
    axis.set_yticks(range(len(rows)), [f"{row.label}\n{row.sparsity} zeros" for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, limit)
    axis.set_xlabel("perplexity (lower is better)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=130)


if __name__ == "__main__":
    main()
