"""``spense plan``: a prediction as tables, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_spense.cli.console import say, shown
from vllm_spense.cli.plot import new_figure, save_figure

if TYPE_CHECKING:
    from vllm_spense.planning.compare import Comparison
    from vllm_spense.planning.gain import Prediction

PLOT_CONTEXTS = (512, 2048, 8192, 32768)
PLOT_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def refuse_unprunable(model: str, dense_ratio: float | None) -> None:
    """Raise what ``spense prune`` raises for a directory that it refuses; Spense checkpoints pass.

    Without transformers only the files are looked at.
    """
    from vllm_spense.cli.progress import quiet_transformers
    from vllm_spense.sources import check_source

    directory = Path(model)
    if not directory.exists():  # a preset, or a mistake
        return
    spense = check_source(directory).get("quantization_config") is not None
    if not spense and find_spec("transformers") is not None:
        from vllm_spense.pruning import PruneConfig
        from vllm_spense.pruning.admission import admit

        quiet_transformers()
        ratio = 0.5 if dense_ratio is None else dense_ratio
        admit(directory, PruneConfig(preset="magnitude", dense_ratio=ratio))


def show_prediction(
    found: Prediction, as_json: bool, console: Console, compared: Sequence[Comparison] | None = None
) -> None:
    """Print ``found``, and ``compared`` behind it if there is a measured run."""
    if as_json:
        print(json.dumps(found.as_dict() | _errors(compared)))
        return
    console.print(_summary(found))
    console.print(_batches(found))
    console.print(_alternatives(found))
    for row in found.alternatives[1:]:
        say(console, f"- {row.name}: {row.speed_source}")
    for line in (found.source, *found.notes):
        say(console, f"- {line}")
    say(console, (found.verdict, "bold"))
    say(console, (found.advice, "bold"))
    if compared is not None:
        _show_comparison(compared, console)


def _show_comparison(compared: Sequence[Comparison], console: Console) -> None:
    """Print how far off each row of a measured run is predicted, and the mean."""
    from vllm_spense.planning.compare import mean_error

    table = Table(title="prediction against measurement")
    for column in ("step", "batch", "context", "measured", "predicted", "error", "dense t/s", "Spense t/s"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for c in compared:
        speeds = f"{c.measured_speedup:.3f}x", f"{c.predicted_speedup:.3f}x", f"{c.error:+.1%}"
        row = c.row.phase, str(c.row.batch), str(c.row.context), *speeds
        table.add_row(*row, f"{c.dense_error:+.1%}", f"{c.spense_error:+.1%}")
    console.print(table)
    say(console, f"mean error of the speed-up: {mean_error(compared):.1%} over {len(compared)} rows")


def plot_plan(found: Prediction, out: Path) -> None:
    """Draw decode speed-up against batch as ``out``, a line per context, as far as the KV cache holds it.

    Raises like :func:`~vllm_spense.cli.plot.new_figure` and :func:`~vllm_spense.cli.plot.save_figure`.
    """
    figure = new_figure(6, 3.6)
    axis = figure.subplots()
    axis.axhline(1, color="#999", linewidth=0.8)
    for context, points in speedups(found).items():
        if points:
            axis.plot(list(points), list(points.values()), "o-", markersize=3, label=f"context {context:,}")
    ratio = found.model.mlp_dense_ratio()
    axis.set_title(
        f"{shown(found.model.name)} on {found.tensor_parallel} × {found.gpu.name}, dense ratio {ratio:.2f}, "
        f"{found.kv_dtype} KV cache: predicted",
        fontsize=8,
        parse_math=False,
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(PLOT_BATCHES, [str(batch) for batch in PLOT_BATCHES])
    axis.set_xlabel("sequences decoding together", fontsize=8)
    axis.set_ylabel("decode speed-up over dense FP8", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    save_figure(figure, out)


def speedups(found: Prediction) -> dict[int, dict[int, float]]:
    """By context and batch: decode speed-up where both models' KV caches hold that many tokens."""
    from vllm_spense.planning.step import decode

    room = min(found.memory.dense_kv_tokens, found.memory.spense_kv_tokens)
    return {
        context: {
            batch: decode(
                *(found.model, found.gpu, found.tensor_parallel, batch, context, found.kv_dtype)
            ).speedup
            for batch in PLOT_BATCHES
            if batch * context <= room
        }
        for context in PLOT_CONTEXTS
    }


def _summary(found: Prediction) -> Table:
    where = f"{found.tensor_parallel} × {found.gpu.name}"
    ratio = found.model.mlp_dense_ratio()
    table = Table(title=Text(f"{shown(found.model.name)} on {where}, dense ratio {ratio:.3f} (predicted)"))
    for column in ("", "dense FP8", "Spense", "gain"):
        table.add_column(column, justify="right" if column else "left")
    phases = (
        (f"decode, batch {found.batch}, context {found.context}", found.decode),
        (f"prefill, {found.prefill.tokens} tokens", found.prefill),
    )
    for name, p in phases:
        rates = f"{p.dense_tokens_per_s:,.0f} tokens/s", f"{p.spense_tokens_per_s:,.0f} tokens/s"
        table.add_row(name, *rates, f"{p.speedup:.2f}x")
    m = found.memory
    sizes = f"{m.dense_bytes / 1e9:.2f} GB", f"{m.spense_bytes / 1e9:.2f} GB"
    table.add_row("weights per GPU", *sizes, f"{m.saved:.1%} saved")
    tokens = max(0, m.dense_kv_tokens), max(0, m.spense_kv_tokens)
    more = f"{tokens[1] - tokens[0]:+,} tokens"
    table.add_row(f"KV cache ({found.kv_dtype})", *(f"{count:,} tokens" for count in tokens), more)
    return table


def _batches(found: Prediction) -> Table:
    table = Table(title=f"decode at context {found.context}, by batch: where a step's time goes (predicted)")
    columns = ("batch", "dense ms", "Spense ms", "speed-up", "MLP weights", "KV cache", "other")
    for column in columns:
        table.add_column(column, justify="right")
    if max(found.batches) * found.context > found.memory.dense_kv_tokens:
        table.caption = "* more tokens than the dense model's KV cache holds"
    for batch, p in found.batches.items():
        kv = p.dense.attention / p.dense.total
        times = f"{p.dense.total * 1e3:.2f}", f"{p.spense.total * 1e3:.2f}", f"{p.speedup:.3f}x"
        held = batch * found.context <= found.memory.dense_kv_tokens
        table.add_row(
            f"{batch}" if held else f"* {batch}",
            *times,
            f"{p.mlp_share:.0%}",
            f"{kv:.0%}",
            f"{1 - p.mlp_share - kv:.0%}",
        )
    return table


def _alternatives(found: Prediction) -> Table:
    table = Table(title="other formats that vLLM serves on this GPU, all linear layers in them (predicted)")
    for column in (
        "format",
        "decode ms",
        "gain",
        "prefill ms",
        "gain",
        "weights GB",
        "quality, as published",
    ):
        table.add_column(column, justify="left" if column in ("format", "quality, as published") else "right")
    for row in found.alternatives:
        decode = f"{row.decode_seconds * 1e3:.2f}", f"{row.decode_speedup:.2f}x"
        prefill = f"{row.prefill_seconds * 1e3:.1f}", f"{row.prefill_speedup:.2f}x"
        table.add_row(row.name, *decode, *prefill, f"{row.weight_bytes / 1e9:.2f}", row.quality)
    return table


def _errors(compared: Sequence[Comparison] | None) -> dict[str, Any]:
    if compared is None:
        return {}
    from vllm_spense.planning.compare import mean_error

    rows = [
        {
            **c.row.model_dump(),
            "predicted_speedup": c.predicted_speedup,
            "measured_speedup": c.measured_speedup,
            "error": c.error,
            "dense_error": c.dense_error,
            "spense_error": c.spense_error,
        }
        for c in compared
    ]
    return {"comparison": {"rows": rows, "mean_error": mean_error(compared)}}
