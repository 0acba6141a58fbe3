"""Tokens per second of 4-bit models on this CPU: in vLLM with this plugin, and in transformers.

usage: python -m benchmarks.serving.four_bit [--models SmolLM2-135M …] [--repeats 2] [--report]

The variants of cpu.py that matter here (bf16, Spense FP8, NF4, Spense NF4), measured as there and taking
turns. A bitsandbytes checkpoint is served as `NF4, dense` is: the same layers. vLLM itself has nothing that
serves one on CPUs, so beside them stands what users have: `generate` of transformers on a real SmolLM2-135M
in 4 bits, one sequence (bitsandbytes' own CPU kernels; no engine). Writes
benchmarks/results/serving_four_bit.json, one entry per CPU, and of it a table in docs/performance.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import cpu_name, facts
from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT
from benchmarks.serving.cpu import rounds
from benchmarks.serving.cpu_results import (
    FOUR_BIT,
    POINTS,
    VARIANTS,
    against,
    known,
    load,
    point_of,
    rate,
    save,
)
from benchmarks.serving.models import BF16
from vllm_spense.ops.linear.four_bit_cpu import why_not_here

RESULTS = ROOT / "benchmarks" / "results" / "serving_four_bit.json"
DOCUMENT = ROOT / "docs" / "performance.md"
MODEL, THEIRS = "SmolLM2-135M", "transformers-bitsandbytes"
SHOWN = {
    **{variant: VARIANTS[variant] for variant in (BF16, "0.5", *FOUR_BIT)},
    THEIRS: "NF4 in transformers (bitsandbytes)",
}
ALONE = [name for name, point in POINTS.items() if point.batch == 1]
"""What transformers is asked for, too."""


def bitsandbytes(options: Namespace, cpu: str) -> None:
    """Seconds of transformers' ``generate``, for points of one sequence."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    entry = known(load(options.results), cpu, f"{MODEL}/{THEIRS}")
    if len(entry["rounds"]) >= options.repeats:
        return
    source = options.assets / "SmolLM2-135M-Instruct"
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    with tempfile.TemporaryDirectory() as work:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(work)
        model = AutoModelForCausalLM.from_pretrained(work, dtype=torch.bfloat16, device_map="cpu").eval()
    for _ in range(options.repeats):
        found = {name: times(model, name, options.times) for name in ALONE if name in options.points}
        print(MODEL, THEIRS, found, flush=True)
        entry["rounds"].append({"start_seconds": None, "seconds": found})
        save(options.results, cpu, facts(), f"{MODEL}/{THEIRS}", entry)


def times(model: Any, name: str, count: int) -> list[float]:
    """As cpu.py's: decode is all tokens less the first."""
    point = point_of(THEIRS, name)
    prompt = torch.randint(3, 40000, (1, point.input), generator=torch.Generator().manual_seed(0))

    def generate(tokens: int) -> float:
        started = time.perf_counter()
        model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - started

    generate(1)
    lone = [generate(1) for _ in range(count)]
    if point.output == 1:
        return lone
    return [generate(point.output) - min(lone) for _ in range(count)]


def report(results: dict[str, Any], document: Path = DOCUMENT) -> None:
    """A table per CPU: tokens per second, and against bf16 in vLLM."""
    parts = []
    for cpu, entry in results.items():
        models = dict.fromkeys(key.partition("/")[0] for key in entry["models"])
        lines = []
        for model in models:
            for point in POINTS:
                found = {v: rate(entry["models"].get(f"{model}/{v}"), v, point) for v in SHOWN}
                if not any(found.values()):
                    continue
                dense = found[BF16]
                cells = [against(value, dense) for value in found.values()]
                lines.append([model, point, *cells])
        parts.append(f"**{cpu}**\n\n{table(['model', 'point', *SHOWN.values()], lines)}")
    insert(document, "serving-four-bit", "\n\n".join(parts))


def parse(arguments: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[MODEL, "Llama-3.2-1B"])
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--repeats", type=int, default=2, help="rounds of A B C")
    parser.add_argument("--times", type=int, default=2, help="measurements of a point in a round")
    parser.add_argument("--limit", type=float, default=300.0, help="most seconds of one measurement")
    parser.add_argument("--assets", type=Path, default=ROOT / ".cache" / "assets")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "serving")
    parser.add_argument("--report", action="store_true", help="only the table, from the results")
    options = parser.parse_args(arguments)
    options.variants, options.eager = [v for v in SHOWN if v != THEIRS], False
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not options.report:
        if absent := why_not_here():
            sys.exit(absent)
        cpu = cpu_name(len(os.sched_getaffinity(0)))
        if MODEL in options.models:
            bitsandbytes(options, cpu)
        rounds(options, cpu)
    report(load(options.results), options.document)


if __name__ == "__main__":
    main()
