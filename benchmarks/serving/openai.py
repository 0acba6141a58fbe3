"""The OpenAI-compatible server under `vllm bench serve`: throughput and latency against the request rate.

usage: python -m benchmarks.serving.openai --tokenizer DIR [--models Qwen3-32B …] [--ratios 0.5] [--dry-run]

Dense FP8 and Spense are served one after the other with random weights; DIR holds any tokenizer of at most
the model's vocabulary (that of SmolLM2 will do). Mixes: ``random``, 1024 tokens in and 128 out; ``chat``,
lengths that vary as much as conversations do. Rates double until throughput grows by less than 5 %. Points
that are in the results with the same sources are kept. `--models tiny --eager` runs anywhere, for nothing.
Writes benchmarks/results/gpu/serving_openai.json; `--report` draws docs/img/serving_openai.png from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.results import RESULTS, ROOT, entry_of, read, save_entry
from benchmarks.serving.decode import sources
from benchmarks.serving.models import DENSE, MODELS
from vllm_spense.cli.server import serve

PLOT = ROOT / "docs" / "img" / "serving_openai.png"
RATES = tuple(2.0**i for i in range(9))
TITLES = {"ttft": "time to first token", "itl": "between tokens"}
SATURATED = 1.05
"""Least growth of throughput that a doubled rate must bring to go on."""
SECONDS = 20
"""Length of the load at each rate: that many seconds' worth of requests."""


CLIENT = """
from argparse import ArgumentParser
from vllm.benchmarks import serve
parser = ArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""
"""`vllm bench serve`; the command itself wants a distribution named vllm, which the CPU wheel is not."""


@dataclass(frozen=True)
class Mix:
    """Tokens in and out of a request; both vary by ± ``spread``, a share of themselves."""

    input: int
    output: int
    spread: float


MIXES = {"random": Mix(1024, 128, 0.0), "chat": Mix(256, 192, 0.9)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, help="directory with tokenizer.json")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[m for m in MODELS if m != "tiny"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5], help="dense ratios of the MLPs")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="requests per second")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving_openai.json")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "serving")
    parser.add_argument("--dry-run", action="store_true", help="only print what would run")
    parser.add_argument("--report", action="store_true", help="only draw the plot")
    options = parser.parse_args(arguments)
    if options.report:
        report(read(options.results))
        return
    wanted = [(name, v) for name in options.models for v in (DENSE, *(f"{r:g}" for r in options.ratios))]
    if options.dry_run:
        for name, variant in wanted:
            open_ = [mix for mix in options.mixes if not finished(options, name, variant, mix)]
            left = ", ".join(open_) or "nothing"
            print(f"{name}, {variant}: {left} left, up to {len(options.rates)} rates")
        return
    if options.tokenizer is None or not (options.tokenizer / "tokenizer.json").is_file():
        parser.error("--tokenizer needs a directory with tokenizer.json")
    end = time.monotonic() + options.budget
    for name, variant in wanted:
        if any(not finished(options, name, variant, mix) for mix in options.mixes):
            measure(options, name, variant, end)


def finished(options: argparse.Namespace, name: str, variant: str, mix: str) -> bool:
    return bool(known(options, name, variant).get(mix, {}).get("saturated"))


def known(options: argparse.Namespace, name: str, variant: str) -> dict[str, Any]:
    """The mixes measured with the present sources."""
    return entry_of(options.results, "servers", f"{name}/{variant}", sources()).get("mixes", {})


def measure(options: argparse.Namespace, name: str, variant: str, end: float) -> None:
    """Serve one variant and raise the rate in each open mix until it saturates, saving after each point."""
    mixes = known(options, name, variant)
    with tempfile.TemporaryDirectory() as work:
        model = MODELS[name].write(Path(work) / "model", variant)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(options.tokenizer / file, model)
        serving = ["--load-format", "dummy", "--max-model-len", "4096", "--no-enable-prefix-caching"]
        serving += ["--served-model-name", "served", *(["--enforce-eager"] if options.eager else [])]
        options.logs.mkdir(parents=True, exist_ok=True)
        log = options.logs / f"{name}-{variant}-server.log"
        with serve(model, log, arguments=serving) as server:
            for mix in options.mixes:
                points = mixes.setdefault(mix, {"points": [], "saturated": False})
                for rate in options.rates[len(points["points"]) :]:
                    if points["saturated"] or time.monotonic() > end:
                        break
                    point = load(server.port, model, MIXES[mix], rate, options.seconds, Path(work))
                    before = points["points"][-1]["output_throughput"] if points["points"] else 0.0
                    points["points"].append(point)
                    grew = point["output_throughput"] > SATURATED * before
                    points["saturated"] = not grew or rate == options.rates[-1]
                    entry = {"sources": sources(), "mixes": mixes, "start_seconds": server.start_seconds}
                    save_entry(options.results, "servers", f"{name}/{variant}", entry)
                    print(f"{name}, {variant}, {mix}, {rate:g}/s: {point}", flush=True)


def load(port: int, model: Path, mix: Mix, rate: float, seconds: float, work: Path) -> dict[str, float]:
    """One run of `vllm bench serve`: ms and tokens per second; ``RuntimeError`` if requests failed."""
    count = max(4, round(rate * seconds))
    command = [sys.executable, "-c", CLIENT, "--backend", "openai"]
    command += ["--model", "served", "--tokenizer", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dataset-name", "random", "--random-input-len", str(mix.input)]
    command += ["--random-output-len", str(mix.output), "--random-range-ratio", str(mix.spread)]
    command += ["--num-prompts", str(count), "--request-rate", str(rate), "--ignore-eos", "--disable-tqdm"]
    command += ["--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--save-result"]
    command += ["--result-dir", str(work), "--result-filename", "bench.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"vllm bench serve failed: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    result = json.loads((work / "bench.json").read_text())
    if result["completed"] != count:
        raise RuntimeError(f"{count - result['completed']} of {count} requests failed at {rate:g} per second")
    latencies = [f"p{percent}_{what}_ms" for what in ("ttft", "itl") for percent in (50, 99)]
    wanted = ("request_throughput", "output_throughput", *latencies)
    return {"rate": rate, "requests": count} | {key: result[key] for key in wanted}


def curves(results: dict[str, Any]) -> Iterator[tuple[str, str, str, list[dict[str, float]]]]:
    """Model, mix, variant and points of everything that was measured."""
    for key, entry in results.get("servers", {}).items():
        name, _, variant = key.rpartition("/")
        for mix, found in entry["mixes"].items():
            yield name, mix, variant, found["points"]


def report(results: dict[str, Any]) -> None:
    """Time to first token and between tokens against output tokens per second, a row per model and mix."""
    found = list(curves(results))
    if not found:
        sys.exit("no server was measured: run the benchmark first")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(dict.fromkeys((name, mix) for name, mix, *_ in found))
    figure, axes = pyplot.subplots(len(rows), 2, figsize=(9, 3 * len(rows)), squeeze=False)
    for name, mix, variant, points in found:
        label = "dense FP8" if variant == DENSE else f"Spense, dense ratio {variant}"
        for axis, what in zip(axes[rows.index((name, mix))], ("ttft", "itl"), strict=True):
            x = [point["output_throughput"] for point in points]
            (line,) = axis.plot(x, [p[f"p50_{what}_ms"] for p in points], marker="o", label=f"{label}, p50")
            axis.plot(x, [p[f"p99_{what}_ms"] for p in points], "--", color=line.get_color(), label="p99")
            axis.set_title(f"{name}, {mix}", fontsize=9)
            axis.set_ylabel(f"{TITLES[what]}, ms", fontsize=8)
            axis.set_xlabel("output tokens per second", fontsize=8)
            axis.set_yscale("log")
            axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=120)
    pyplot.close(figure)
    print(f"wrote {PLOT}")


if __name__ == "__main__":
    main()
