"""Tokens per second of real vLLM on this CPU: Spense against the dense model in bf16 and in FP8.

usage: python benchmarks/serving_cpu.py [--models Llama-3.2-1B …] [--repeats 3] [--eager] [--report]

Shapes of real models, random weights (`--load-format dummy`), torch.compile on as by default. For each model
one engine per variant stays up; each point is measured in turn, and medians are compared. Decode: seconds of
33 tokens less those of one (dense FP8, whose CPU kernel is slow: of 3 tokens). Prefill: prompts of 512 tokens
with one token each. What is in the results with the same sources is kept, so the command goes on where it
stopped. Writes benchmarks/results/serving_cpu.json, and of it the table and the plot in docs/performance.md.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.frontier_report import insert
from benchmarks.kernel_shapes import Model as Shape
from benchmarks.results_file import ROOT, cpu_kernel_sources, entry_of, fingerprint, provenance, read, write
from benchmarks.serving_decode import elapsed
from benchmarks.serving_engine import Engine, Point
from benchmarks.serving_models import DENSE, ServedModel
from vllm_spense.ops.cpu_linear import describe_cpu, why_not_here

RESULTS = ROOT / "benchmarks" / "results" / "serving_cpu.json"
DOCUMENT = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "img" / "serving_cpu.png"
MODELS = {
    model.name: model
    for model in (
        ServedModel(Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 64), 16, 128256),
        ServedModel(Shape("Llama-3.2-3B", 3072, 8192, 24, 8), 28, 128256),
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


def measure(model: ServedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of every variant and point, and what the engines say of their start and memory."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines: dict[str, Engine] = {}
        ready = {}
        for variant in VARIANTS:
            directory = write_model(model, work / variant, variant)
            log = ROOT / "build" / "serving" / f"{model.name}-{variant}.log"
            eager = ["--eager"] if options.eager else []
            limits = ("--length", "1024", "--sequences", "16", "--chunk", "1024")
            engines[variant] = Engine(directory, log, *limits, *eager)
            stack.callback(engines[variant].stop)
            ready[variant] = engines[variant].wait(START)  # one after another: each compiles
            print(model.name, variant, ready[variant], flush=True)
        seconds: dict[str, dict[str, list[float]]] = {v: {name: [] for name in POINTS} for v in VARIANTS}
        for name, point in POINTS.items():
            for turn in range(options.repeats + 1):
                for variant, engine in engines.items():
                    taken = elapsed(engine, point_of(variant, point), START)
                    if turn:  # the first round warms up
                        seconds[variant][name].append(taken)
            print(model.name, name, {v: round(rate(v, name, seconds), 1) for v in VARIANTS}, flush=True)
    rates = {v: {name: rate(v, name, seconds) for name in POINTS} for v in VARIANTS}
    return {"engines": ready, "seconds": seconds, "tokens_per_second": rates}


def rate(variant: str, name: str, seconds: dict[str, dict[str, list[float]]]) -> float:
    return point_of(variant, POINTS[name]).tokens() / median(seconds[variant][name])


def write_model(model: ServedModel, out: Path, variant: str) -> Path:
    if variant != BF16:
        return model.write(out, variant)
    model.write(out, DENSE)
    config = {k: v for k, v in model.config(DENSE).items() if k != "quantization_config"}
    write(out / "config.json", config)
    return out


def table(results: dict[str, Any]) -> str:
    lines = [f"| model | tokens/s | {' | '.join(VARIANTS.values())} |", "|---|---|" + "---|" * len(VARIANTS)]
    for model, entry in results["models"].items():
        rates = entry["tokens_per_second"]
        for name in POINTS:
            base = rates[BF16][name]
            cells = [
                f"{rates[v][name]:,.1f}" + (f" ({rates[v][name] / base:.2f}×)" if v != BF16 else "")
                for v in VARIANTS
            ]
            lines.append(f"| {model} | {name} | {' | '.join(cells)} |")
        sizes = [MODELS[model].linear_bytes(DENSE) * 2] + [
            MODELS[model].linear_bytes(v) for v in list(VARIANTS)[1:]
        ]
        stored = [f"{size / 1e9:.2f} GB" for size in sizes]
        lines.append(f"| {model} | weights of the linear layers | {' | '.join(stored)} |")
    made = results["made"]
    return "\n".join(
        [*lines, "", f"{made['cpu']}; vLLM {made['versions']['vllm']}, torch {made['versions']['torch']}."]
    )


def plot(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = results["models"]
    figure, axes = pyplot.subplots(1, len(models), figsize=(5 * len(models), 3.4), sharey=True, squeeze=False)
    for axis, (model, entry) in zip(axes[0], models.items(), strict=True):
        rates = entry["tokens_per_second"]
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
    for name in [] if options.report else options.models:
        if not entry_of(RESULTS, "models", name, sources()):
            entry = {"sources": sources()} | measure(MODELS[name], options)
            results = read(RESULTS)
            results.setdefault("models", {})[name] = entry
            write(
                RESULTS,
                results
                | {"made": provenance() | {"cpu": f"{describe_cpu()}, {len(os.sched_getaffinity(0))} cores"}},
            )
    results = read(RESULTS)
    print(table(results))
    insert(DOCUMENT, "serving-cpu", table(results))
    plot(results)


if __name__ == "__main__":
    main()
