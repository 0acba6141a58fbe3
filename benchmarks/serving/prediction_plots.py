"""The predicted plots of docs/performance.md: how cost grows, and a layer under its roofline.

`benchmarks/serving/prediction.py` draws them. Measured points of benchmarks/results/gpu/kernels.json, where
there are any, go into the roofline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_spense.cli.plot import new_figure
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.planning import GPUS, read_model
from vllm_spense.planning.shapes import ModelShape
from vllm_spense.planning.step import decode, layer_time, moved_bytes

MODEL, GPU = "Qwen3-32B", GPUS["H200"]
RATIOS = (1.0, 0.5, 0.25)
COLOURS = {1.0: "#3a3a3a", 0.5: "#33658a", 0.25: "#c8553d"}
NAMES = {ratio: "dense FP8" if ratio == 1 else f"Spense, dense ratio {ratio:g}" for ratio in RATIOS}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 512, 2048, 8192)
LAYERS = (16, 32, 48, 64, 80, 96)
TOKENS = tuple(2**i for i in range(15))


def deeper(model: ModelShape, layers: int) -> ModelShape:
    """The same model with another number of layers, all alike."""
    linears = tuple(replace(x, count=x.count * layers // model.layers) for x in model.linears)
    return replace(model, windows=(model.windows[0],) * layers, linears=linears)


def step_ms(ratio: float, layers: int = 64, batch: int = 32, context: int = 512) -> float:
    """One decode step on one GPU with a bf16 KV cache."""
    model = deeper(read_model(MODEL, 0.5 if ratio == 1 else ratio), layers)
    phase = decode(model, GPU, 1, batch, context, "bf16")
    return 1e3 * (phase.dense if ratio == 1 else phase.spense).total


def write_growth(path: Path) -> None:
    """ms per decode step against batch, context and layers."""
    panels: tuple[tuple[str, Sequence[int], Callable[[float, int], float]], ...] = (
        ("batch (context 512)", BATCHES, lambda ratio, n: step_ms(ratio, batch=n)),
        ("context (batch 32)", CONTEXTS, lambda ratio, n: step_ms(ratio, context=n)),
        ("layers (batch 32, context 512)", LAYERS, lambda ratio, n: step_ms(ratio, layers=n)),
    )
    figure = new_figure(9.6, 3.2)
    for axis, (title, sizes, cost) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for ratio in RATIOS:
            costs = [cost(ratio, size) for size in sizes]
            axis.plot(sizes, costs, "o-", markersize=3, color=COLOURS[ratio], label=NAMES[ratio])
        if sizes is not LAYERS:
            axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.set_ylim(0)
        finish(axis, title, "ms per decode step, predicted")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def gate_up(ratio: float) -> LinearSpec:
    """The largest layer of the model."""
    layers = read_model(MODEL, ratio).rank(1)
    return max((layer.spec for layer in layers), key=lambda spec: spec.in_features * spec.out_features)


def write_roofline(path: Path, measured: Sequence[dict[str, Any]]) -> None:
    """Operations of the dense matrix per second against those per byte; the roofs are the data sheet's."""
    figure = new_figure(6.4, 4)
    axis = figure.subplots()
    for ratio in RATIOS:
        spec, colour = gate_up(ratio), COLOURS[ratio]
        operations = 2 * spec.in_features * spec.out_features
        intensity = {m: operations * m / moved_bytes(spec, m) for m in TOKENS}
        peak = GPU.fp8_sheet_rate * 2 / (1 + ratio)
        roof = [min(peak, x * GPU.memory_sheet_rate) / 1e12 for x in intensity.values()]
        axis.plot(list(intensity.values()), roof, "--", color=colour, linewidth=0.8)
        rates = [operations * m / seconds(spec, m, ratio) / 1e12 for m in TOKENS]
        axis.plot(list(intensity.values()), rates, "o-", markersize=3, color=colour, label=NAMES[ratio])
        for row in measured:
            if row.get("us") and row["key"].startswith(f"{MODEL}/gate_up/{ratio:g}/"):
                x = operations * row["tokens"] / moved_bytes(spec, row["tokens"])
                axis.plot(x, operations * row["tokens"] / row["us"] / 1e6, "*", color=colour, markersize=9)
    axis.set_xscale("log")
    axis.set_yscale("log")
    finish(axis, "operations of the dense matrix per byte moved", "TFLOP/s, as of the dense matrix")
    note = "stars: measured" if measured else "predicted"
    axis.set_title(f"{MODEL} gate_up on an {GPU.name}, 1 to {TOKENS[-1]:,} tokens; {note}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def seconds(spec: LinearSpec, tokens: int, ratio: float) -> float:
    time = layer_time(spec, tokens, GPU)
    return time.dense if ratio == 1 else time.spense


def finish(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
