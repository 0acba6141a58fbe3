"""Tokens per second of trained activation-sparse models on this CPU, in vLLM, against the same model dense.

usage: python -m benchmarks.serving.sparse_trained [--models SmolLM2-135M …] [--repeats 2] [--report]

Of SmolLM2-135M with thresholds (`spense sparsify --allocation uniform`: only down skips), and of the small
Llamas that relu_training.py trained (.cache/relu_training): real weights, real zeros. Prompts are random
tokens, whose density may differ from that of text. A point is measured as in cpu.py. Writes
benchmarks/results/serving_sparse_trained.json, one entry per CPU, and of it a table in docs/twell.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks.common.machine import cpu_name, facts
from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT
from benchmarks.serving.cpu_results import against, known, lacking, load, save
from benchmarks.serving.sparse_relu import measured, rate

RESULTS = ROOT / "benchmarks" / "results" / "serving_sparse_trained.json"
DOCUMENT = ROOT / "docs" / "twell.md"
CACHE = ROOT / ".cache"
SMOLLM2 = CACHE / "assets" / "SmolLM2-135M-Instruct"
THRESHOLDS = CACHE / "sparse_served"
SMALL = CACHE / "relu_training"
MODELS: dict[str, dict[str, Path]] = {
    "SmolLM2-135M": {
        "dense": SMOLLM2,
        "50 % of down skipped": THRESHOLDS / "SmolLM2-135M-0.5",
        "70 % of down skipped": THRESHOLDS / "SmolLM2-135M-0.7",
    },
    "4.7M parameters": {
        "dense": SMALL / "silu-0-1500",
        "ReLU": SMALL / "relu-0-1500",
        "ReLU + L1, 10⁻³": SMALL / "relu-0.001-0-1500",
    },
}
"""Directories by model and variant; the first is the one that the others are compared with."""
SHOWN = ("decode, 1 sequence", "decode, 4 sequences", "prefill, 512 tokens")


def make_thresholds(directory: Path) -> None:
    """SmolLM2 with thresholds, for the share that the directory's name ends with."""
    share = directory.name.rpartition("-")[2]
    text = CACHE / "assets" / "wikipedia" / "train.txt"
    command = [sys.executable, "-m", "vllm_spense.cli.app", "sparsify", str(SMOLLM2), "-o", str(directory)]
    command += ["--calibration", str(text), "--sparsity", share, "--allocation", "uniform"]
    subprocess.run(command, check=True, cwd=ROOT)


def rounds(options: Namespace, cpu: str) -> None:
    """The variants in turn, saving after each engine."""
    for model in options.models:
        for turn in range(1, options.repeats + 1):
            for variant, directory in MODELS[model].items():
                key = f"{model}/{variant}"
                entry = known(load(options.results), cpu, key)
                if points := lacking(entry, list(SHOWN), turn):
                    if directory.parent == THRESHOLDS and not directory.is_dir():
                        make_thresholds(directory)
                    log = options.logs / f"sparse-trained-{directory.name}.log"
                    entry["rounds"].append(
                        measured(directory, log, ["--load-format", "auto"], points, options.times)
                    )
                    save(options.results, cpu, facts(), key, entry)


def report(results: dict[str, Any], document: Path = DOCUMENT) -> None:
    """A line per model, variant and CPU: tokens per second, and against the dense model."""
    lines = []
    for cpu, entry in results.items():
        for model, variants in MODELS.items():
            dense = [rate(entry["models"].get(f"{model}/dense"), point) for point in SHOWN]
            for variant in variants:
                found = [rate(entry["models"].get(f"{model}/{variant}"), point) for point in SHOWN]
                if any(found):
                    cells = [against(value, base) for value, base in zip(found, dense, strict=True)]
                    lines.append([cpu, model, variant, *cells])
    insert(document, "serving-sparse-trained", table(["CPU", "model", "variant", *SHOWN], lines))


def parse(arguments: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=2, help="rounds of A B C")
    parser.add_argument("--times", type=int, default=2, help="measurements of a point in a round")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "serving")
    parser.add_argument("--report", action="store_true", help="only the table, from the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    missing = [d for m in options.models for d in MODELS[m].values() if d.parent == SMALL and not d.is_dir()]
    if missing and not options.report:
        sys.exit(f"{missing[0]} is missing: python -m benchmarks.accuracy.relu_training")
    if not options.report:
        rounds(options, cpu_name(len(os.sched_getaffinity(0))))
    report(load(options.results), options.document)


if __name__ == "__main__":
    main()
