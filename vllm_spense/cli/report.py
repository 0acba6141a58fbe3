"""``spense inspect``: what a checkpoint holds, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vllm_spense.cli.console import say, shown
from vllm_spense.format.report import CheckpointReport

if TYPE_CHECKING:
    from vllm_spense.evaluation.density import Density


def show_density(density: Density, console: Console, thresholds: Mapping[str, float] | None = None) -> None:
    """Print how much of each MLP the tokens of a text use, and the thresholds where there are."""
    table = Table()
    for column in ("module", "neurons", "used", "dead", *([] if thresholds is None else ["threshold"])):
        left = column == "module"
        table.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for name, layer in density.layers.items():
        row = (name, str(layer.neurons), f"{layer.density:.2%}", str(layer.dead))
        table.add_row(*row, *([] if thresholds is None else [f"{thresholds[name]:.4g}"]))
    console.print(table)
    say(
        console,
        f"{density.mean:.2%} of the hidden values are not zero, over {density.tokens} tokens; "
        f"{density.dead:.1%} of the neurons were never used",
    )


def show_report(report: CheckpointReport, as_json: bool, console: Console) -> None:
    """Print ``report``: each linear layer, then the sums."""
    if as_json:
        modules = [
            {
                "name": m.name,
                **m.spec.model_dump(),
                "dense_ratio": m.dense_ratio,
                "sparsity": m.sparsity,
                "bytes": m.stored_bytes,
                "loss": m.loss,
            }
            for m in report.modules
        ]
        summary = {
            "weight_dtype": report.weight_dtype,
            "tensor_parallel_sizes": report.tensor_parallel_sizes,
            "dense_ratio": report.dense_ratio,
            "sparsity": report.sparsity,
            "mlp_sparsity": report.mlp_sparsity,
            "bytes": report.stored_bytes,
            "dense_bytes": report.dense_bytes,
            "provenance": report.provenance,
        }
        print(json.dumps({**summary, "modules": modules}))
        return
    say(console, (shown(report.directory), "italic"))
    table = Table()
    for column in ("module", "split", "shape", "2:4", "dense", "zeros", "MiB", "loss"):
        left = column in ("module", "split")
        table.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for m in report.modules:
        s = m.spec
        loss = "" if m.loss is None else f"{m.loss:.4f}"
        row = (m.name, s.split, f"{s.out_features}×{s.in_features}", str(s.sparse), str(s.dense))
        table.add_row(*row, f"{m.sparsity:.1%}", f"{m.stored_bytes / 2**20:.2f}", loss)
    console.print(table)
    dtype = report.title
    hybrid, dense = len(report.hybrid), len(report.modules) - len(report.hybrid)
    saved = 1 - report.stored_bytes / report.dense_bytes if report.dense_bytes else 0.0
    say(
        console,
        f"{len(report.modules)} linear layers: {hybrid} hybrid with a 2:4 region ({report.sparsity:.1%} "
        f"zeros there), {dense} all-dense {dtype}\n"
        f"mean dense ratio of the hybrid MLP layers: {report.dense_ratio:.3f}\n"
        f"weights: {report.stored_bytes / 2**20:,.2f} MiB, as dense {dtype} "
        f"{report.dense_bytes / 2**20:,.2f} MiB ({saved:.1%} saved); files "
        f"{report.total_bytes / 2**20:,.2f} MiB\n"
        f"tensor parallel sizes: {', '.join(map(str, report.tensor_parallel_sizes))}",
    )
