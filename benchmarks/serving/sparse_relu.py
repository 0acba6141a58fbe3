"""Tokens per second of activation-sparse models on this CPU, in vLLM, against the same shapes dense.

usage: python -m benchmarks.serving.sparse_relu [--layers 38] [--repeats 2] [--report]

The shape of SparseLM-2B (hidden 2048, inner 5632, 38 layers) with a planted density, served as its published
checkpoints are: gates in bf16, and rounded to FP8 at load. Beside it stands a Llama of the same shape in
stock vLLM: as many weights, SiLU instead of ReLU, every neuron. Variants take turns; a point is measured as
in cpu.py. Writes benchmarks/results/serving_sparse_relu.json, one entry per CPU, and of it a table in
docs/twell.md.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.machine import cpu_name, facts
from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT
from benchmarks.kernels.shapes import Model as Shape
from benchmarks.serving import sparse_relu_model
from benchmarks.serving.cpu_results import against, known, lacking, load, save, seconds
from benchmarks.serving.decode import elapsed
from benchmarks.serving.engine import Engine, Point

RESULTS = ROOT / "benchmarks" / "results" / "serving_sparse_relu.json"
DOCUMENT = ROOT / "docs" / "twell.md"
SHAPE, VOCAB, LAYERS = Shape("SparseLM-2B", 2048, 5632, 32, 32, 64), 49152, 38
STOCK = "stock"
VARIANTS: dict[str, tuple[str, float | None, str | None]] = {
    STOCK: ("dense bf16, stock vLLM", None, None),
    "0.02": ("2 % active, bf16", 0.02, None),
    "0.02-fp8": ("2 % active, gate FP8", 0.02, "spense"),
    "0.1": ("10 % active, bf16", 0.1, None),
}
"""Title, planted density and ``--quantization``, by name."""
POINTS = {
    "decode, 1 sequence": Point(1, 32, 33),
    "decode, 4 sequences": Point(4, 32, 33),
    "decode, 8 sequences": Point(8, 32, 33),
    "decode, 16 sequences": Point(16, 32, 33),
    "prefill, 512 tokens": Point(1, 512, 1),
}
LIMITS = ("--length", "1024", "--sequences", "32", "--chunk", "2048", "--cache", "1024")
"""Of an engine; a token of SparseLM-2B has 0.3 MB of keys and values."""
START, LIMIT = 900.0, 300.0
"""Most seconds until an engine is ready, and of one measurement."""


def write(out: Path, density: float | None, layers: int) -> Path:
    """The model's directory; the dense one has a configuration alone."""
    if density is not None:
        return sparse_relu_model.write(out, SHAPE, layers, VOCAB, density)
    out.mkdir(parents=True)
    dense = sparse_relu_model.config(SHAPE, layers, VOCAB)
    kept = {name: value for name, value in dense.items() if not name.startswith("sparsity_")}
    kept |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (out / "config.json").write_text(json.dumps(kept))
    return out


def measure(directory: Path, variant: str, points: list[str], options: Namespace) -> dict[str, Any]:
    """One round of a variant."""
    _, density, quantization = VARIANTS[variant]
    asked = ["--load-format", "dummy" if density is None else "auto"]
    asked += ["--quantization", quantization] if quantization else []
    log = options.logs / f"sparse-relu-{variant}.log"
    return measured(directory, log, asked, points, options.times)


def measured(directory: Path, log: Path, asked: list[str], points: list[str], times: int) -> dict[str, Any]:
    """The engine's start and the seconds of each point; ``asked``: options of engine.py."""
    engine = Engine(directory, log, *LIMITS, *asked)
    with ExitStack() as stack:
        stack.callback(engine.stop)
        start = engine.wait(START)["start_seconds"]
        seconds: dict[str, list[float]] = {}
        for name in points:
            elapsed(engine, POINTS[name], time.monotonic() + LIMIT)  # warms up
            seconds[name] = [elapsed(engine, POINTS[name], time.monotonic() + LIMIT) for _ in range(times)]
            print(log.stem, name, seconds[name], flush=True)
    return {"start_seconds": start, "seconds": seconds}


def rounds(options: Namespace, cpu: str) -> None:
    """The variants in turn, saving after each engine; models of one density are written once."""
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for turn in range(1, options.repeats + 1):
            for variant in options.variants:
                key = f"{SHAPE.name}-{options.layers}-layers/{variant}"
                entry = known(load(options.results), cpu, key)
                if points := lacking(entry, options.points, turn):
                    density = VARIANTS[variant][1]
                    directory = Path(work) / str(density)
                    if not directory.is_dir():
                        write(directory, density, options.layers)
                    entry["rounds"].append(measure(directory, variant, points, options))
                    save(options.results, cpu, facts(), key, entry)


def report(results: dict[str, Any], document: Path = DOCUMENT) -> None:
    """A table per CPU: tokens per second, and against stock vLLM."""
    parts = []
    for cpu, entry in results.items():
        lines = []
        for model in dict.fromkeys(key.partition("/")[0] for key in entry["models"]):
            for name in POINTS:
                found = {v: rate(entry["models"].get(f"{model}/{v}"), name) for v in VARIANTS}
                if not any(found.values()):
                    continue
                dense = found[STOCK]
                cells = [against(value, dense) for value in found.values()]
                lines.append([model, name, *cells])
        titles = [title for title, _, _ in VARIANTS.values()]
        parts.append(f"**{cpu}**\n\n{table(['model', 'point', *titles], lines)}")
    insert(document, "serving-sparse-relu", "\n\n".join(parts))


def rate(entry: dict[str, Any] | None, point: str) -> float | None:
    """Tokens per second at the median; None if it is not measured."""
    found = seconds(entry, point) if entry else []
    return POINTS[point].tokens() / median(found) if found and median(found) > 0 else None


def parse(arguments: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model; fewer for rehearsals")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--repeats", type=int, default=2, help="rounds of A B C")
    parser.add_argument("--times", type=int, default=2, help="measurements of a point in a round")
    parser.add_argument("--work", type=Path, help="where models of 4 GB are written for a while")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "serving")
    parser.add_argument("--report", action="store_true", help="only the table, from the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not options.report:
        rounds(options, cpu_name(len(os.sched_getaffinity(0))))
    report(load(options.results), options.document)


if __name__ == "__main__":
    main()
