"""Tokens per second of real vLLM on this CPU: Spense against dense models in bf16, INT8 and FP8.

usage: python -m benchmarks.serving.cpu [--models Llama-3.2-1B …] [--variants bf16 0.5 …] [--repeats 3]
                                        [--points 'decode, 1 sequence' …] [--eager] [--report]

Shapes of real models, random weights (`--load-format dummy`), torch.compile on as by default. Variants take
turns, A B C, A B C: each round starts an engine of every variant, warms it up and measures each point twice,
so a slow minute of the machine hits one round and not one variant. Decode: seconds of 33 tokens less those of
one. Prefill: prompts of 512 or 2048 tokens with one token each. Dense FP8, whose CPU kernel is slow, has one
round of 3 tokens; a point that takes longer than --limit ends its variant, and the tables say so. What is in
the results with the same sources is kept, so the command goes on where it stopped. Writes
benchmarks/results/serving_cpu.json, one entry per CPU, and of it the tables and the plot in
docs/performance.md and the short table in README (cpu_report.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common.machine import cpu_name, facts
from benchmarks.common.results import ROOT
from benchmarks.serving.cpu_report import report
from benchmarks.serving.cpu_results import (
    MODELS,
    POINTS,
    RESULTS,
    SLOW,
    VARIANTS,
    known,
    lacking,
    load,
    point_of,
    save,
    variants,
)
from benchmarks.serving.decode import elapsed
from benchmarks.serving.engine import Engine, NoAnswer
from benchmarks.serving.models import ServedModel
from vllm_spense.ops.linear.cpu import why_not_here

START = 600.0
"""Most seconds until an engine is ready, which takes one or two minutes."""
LIMITS = ("--length", "2304", "--sequences", "32", "--chunk", "2048")


def measure(
    model: ServedModel, variant: str, points: list[str], options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, str]]:
    """One round: the engine's start and the seconds of each point; and why points are missing."""
    seconds: dict[str, list[float]] = {}
    log = options.logs / f"{model.name}-{variant}.log"
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory = model.write(work / "model", variant)
        engine = Engine(directory, log, *LIMITS, *(["--eager"] if options.eager else []))
        stack.callback(engine.stop)
        try:
            start = engine.wait(START)["start_seconds"]
        except RuntimeError as error:
            why = f"the engine did not start: {reason(error)}"
            return {"start_seconds": None, "seconds": {}}, dict.fromkeys(points, why)
        for name in points:
            try:
                seconds[name] = times(engine, variant, name, options)
            except RuntimeError as error:
                over = f"{name} took more than {options.limit:.0f} s"
                why = over if isinstance(error, NoAnswer) else f"{name}: {reason(error)}"
                left = points[points.index(name) :]
                return {"start_seconds": start, "seconds": seconds}, dict.fromkeys(left, why)
            print(model.name, variant, name, seconds[name], flush=True)
    return {"start_seconds": start, "seconds": seconds}, {}


def times(engine: Engine, variant: str, name: str, options: argparse.Namespace) -> list[float]:
    point, slow = point_of(variant, name), variant in SLOW
    if not slow:
        elapsed(engine, point, time.monotonic() + options.limit)  # warms up
    count = 1 if slow else options.times
    return [elapsed(engine, point, time.monotonic() + options.limit) for _ in range(count)]


def reason(error: RuntimeError) -> str:
    """The last error that an engine's log shows, in one line, or how long it was waited for."""
    if isinstance(error, NoAnswer):
        return str(error).partition(";")[0]
    lines = [line for line in str(error).splitlines() if "Error" in line] or str(error).splitlines()
    return lines[-1].rpartition("] ")[2].strip()[:160]


def rounds(options: argparse.Namespace, cpu: str) -> None:
    """Model by model, the variants in turn, saving after each engine."""
    for name in options.models:
        for turn in range(1, options.repeats + 1):
            for variant in options.variants:
                key = f"{name}/{variant}"
                entry = known(load(options.results), cpu, key)
                points = lacking(entry, options.points, 1 if variant in SLOW else turn)
                if points:
                    found, missing = measure(MODELS[name], variant, points, options)
                    entry["rounds"].append(found)
                    entry["missing"] |= missing
                    save(options.results, cpu, facts(), key, entry)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[m for m in MODELS if m != "tiny"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=variants())
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds of A B C")
    parser.add_argument("--times", type=int, default=2, help="measurements of a point in a round")
    parser.add_argument("--limit", type=float, default=300.0, help="most seconds of one measurement")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "serving")
    parser.add_argument("--root", type=Path, default=ROOT, help="of README and docs/")
    parser.add_argument("--report", action="store_true", help="only tables and plot, from the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not options.report:
        if absent := why_not_here():
            sys.exit(absent)
        rounds(options, cpu_name(len(os.sched_getaffinity(0))))
    report(load(options.results), options.root)


if __name__ == "__main__":
    main()
