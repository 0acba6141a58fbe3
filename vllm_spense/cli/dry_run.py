"""``spense prune --dry-run``: a plan as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vllm_spense.pruning import PruneConfig
    from vllm_spense.pruning.plan import DeviceModel, Plan


def show_plan(
    model: str, config: PruneConfig, device_model: DeviceModel, as_json: bool, console: Console
) -> None:
    """Print what pruning ``model`` under ``config`` would need."""
    from vllm_spense.pruning.plan import plan

    found = plan(model, config, device_model)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        console.print(_table(found))


def _table(plan: Plan) -> Table:
    """Equal layers share a row; the last rows are the whole run."""
    table = Table(title=f"spense prune on {plan.device} in {plan.dtype} (estimated)", show_lines=False)
    for column in ("layers", "memory at its peak", "file", "TFLOP", "time"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    if plan.gradient is not None:
        g = plan.gradient
        table.add_row("gradient pass", _size(g.device_bytes), "", f"{g.flop / 1e12:,.1f}", _time(g.seconds))
    at = 0
    for _, group in groupby(plan.layers, key=lambda layer: (layer.device_bytes, layer.output_bytes)):
        same = list(group)
        layer, count = same[0], len(same)
        name = f"{at + 1}" if count == 1 else f"{at + 1} to {at + count}, each"
        tflop = f"{(layer.flop + layer.flop_fp32) / 1e12:,.1f}"
        table.add_row(name, _size(layer.device_bytes), _size(layer.output_bytes), tflop, _time(layer.seconds))
        at += count
    table.add_section()
    whole = sum(layer.flop + layer.flop_fp32 for layer in plan.layers)
    whole += 0 if plan.gradient is None else plan.gradient.flop
    where = "device" if plan.device_bytes else "host"
    table.add_row(
        "whole run",
        f"{where} {_size(plan.device_bytes or plan.host_bytes)}",
        _size(plan.output_bytes),
        f"{whole / 1e12:,.0f}",
        _time(plan.seconds),
    )
    if plan.device_bytes:
        table.add_row("", f"host {_size(plan.host_bytes)}", "", "", "")
    kept = "host" if plan.activations == "host" else "disk"
    table.add_row("", f"activations ({kept}) {_size(plan.activation_bytes)}", "", "", "")
    return table


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.1f} s"
