"""Tokens per second of real vLLM: Spense against dense FP8, CUDA graphs and torch.compile on for both.

usage: python benchmarks/serving_decode.py [--models Qwen3-32B …] [--ratios 0.5 0.25] [--budget S] [--dry-run]

Weights are random (`--load-format dummy`). For each model and dense ratio two engines stay on the GPU, dense
FP8 (A) and Spense (B); each point is measured A B A B …, and medians are compared. Decode: seconds of
``--output`` tokens less those of one token, after prompts of 128 or 4096 tokens. Prefill: prompts of 8192
tokens with one token each. Also time to first token, bytes of the weights and start-up. Then the kernels of
a decode step and of a prefill are profiled (benchmarks/serving_profile.py). What is in the results with the
same sources is kept, so the command goes on where it stopped. `--models tiny --eager` runs anywhere, CPUs
included, and its numbers mean nothing. Writes benchmarks/results/gpu/serving_decode.json;
`python benchmarks/serving_report.py` makes tables and plot of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import RESULTS, ROOT, entry_of, fingerprint, kernel_sources, save_entry
from benchmarks.serving_engine import Engine, Point, ProfileError
from benchmarks.serving_models import DENSE, MODELS, ServedModel
from benchmarks.serving_profile import chosen, profile

START = 300.0
"""Most seconds until both engines are ready."""
LOADED = 150.0
"""Seconds that the plan takes for that."""
PROFILED = 4.0
"""Seconds that the plan takes for reading one profile."""


def points(output: int, length: int) -> list[Point]:
    """Most wanted first."""
    decode = [Point(batch, 128, output) for batch in (32, 1, 8, 128, 256)]
    prefill = [Point(1, 8192, 1), Point(1, 128, 1), Point(4, 8192, 1)]
    long = [Point(batch, 4096, output) for batch in (8, 32, 1)]
    wanted = [*decode[:1], *prefill[:1], *decode[1:], *long, *prefill[1:]]
    return [point for point in wanted if point.input + point.output <= length]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[m for m in MODELS if m != "tiny"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25], help="of the MLPs")
    parser.add_argument("--output", type=int, default=128, help="tokens to decode")
    parser.add_argument("--length", type=int, default=8200, help="longest prompt and answer together")
    parser.add_argument("--repeats", type=int, default=3, help="of A B")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--no-onednn", action="store_true", help="for rehearsals on CPUs (serving_engine.py)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving_decode.json")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "serving")
    parser.add_argument("--dry-run", action="store_true", help="only print what would run")
    options = parser.parse_args(arguments)
    pairs = [(MODELS[name], f"{ratio:g}") for name in options.models for ratio in options.ratios]
    if options.dry_run:
        for line in plan(pairs, options):
            print(line)
        return
    end = time.monotonic() + options.budget
    for model, ratio in pairs:
        if any(missing(model, ratio, options)) and end - time.monotonic() > LOADED:
            with ExitStack() as stack:
                compare(model, ratio, options, end, stack)
    left = [len(part) for pair in pairs for part in missing(*pair, options)]
    print(f"{sum(left)} points left, profiles among them")


def sources() -> str:
    """What the figures depend on."""
    package = ROOT / "vllm_spense"
    return f"{fingerprint([package / 'ops', package / 'serving'])}/{kernel_sources()}"


def missing(model: ServedModel, ratio: str, options: argparse.Namespace) -> tuple[list[Point], list[Point]]:
    """The points that are not timed, and those that are not profiled."""
    known = entry_of(options.results, "pairs", f"{model.name}/{ratio}", sources())
    wanted = points(options.output, options.length)
    return (
        [p for p in wanted if p.key not in known.get("points", {})],
        [p for p in chosen(wanted) if p.key not in known.get("profiles", {})],
    )


def compare(
    model: ServedModel, ratio: str, options: argparse.Namespace, end: float, stack: ExitStack
) -> None:
    """Start both engines, time the points and profile some of them, saving after each."""
    untimed, unprofiled = missing(model, ratio, options)
    work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    engines = {}
    for variant in (DENSE, ratio):
        directory = model.write(work / variant, variant)
        log = options.logs / f"{model.name}-{variant}.log"
        how = [f"--{flag}" for flag in ("eager", "no-onednn") if getattr(options, flag.replace("-", "_"))]
        engines[variant] = Engine(directory, log, "--length", str(options.length), *how)
        stack.callback(engines[variant].stop)
    key, new = f"{model.name}/{ratio}", {"sources": sources(), "points": {}}
    entry = entry_of(options.results, "pairs", key, sources()) or new
    entry["engines"] = {
        variant: engine.wait(min(START, end - time.monotonic())) for variant, engine in engines.items()
    }
    print(f"{model.name}, dense ratio {ratio}: ready, {entry['engines']}", flush=True)
    for point in untimed:
        if time.monotonic() > end:
            return
        times: dict[str, list[float]] = {variant: [] for variant in engines}
        for turn in range(options.repeats + 1):
            for variant, engine in engines.items():
                seconds = elapsed(engine, point, end - time.monotonic() + 60)
                if turn:  # the first round warms up
                    times[variant].append(seconds)
        entry["points"][point.key] = figures(point, times[DENSE], times[ratio])
        save_entry(options.results, "pairs", key, entry)
        print(f"{model.name}, {ratio}, {point.key}: {entry['points'][point.key]['speed_up']:.3f}", flush=True)
    profile_points(unprofiled, engines, entry, end, partial(save_entry, options.results, "pairs", key, entry))


def profile_points(
    wanted: list[Point],
    engines: dict[str, Engine],
    entry: dict[str, Any],
    end: float,
    save: Callable[[], None],
) -> None:
    """Kernels of the points into ``entry``; where that fails the reason, as the timings stay good."""
    profiles = entry.setdefault("profiles", {})
    for point in wanted:
        left, failed = end - time.monotonic(), None
        if left < 0:
            return
        try:
            profiles[point.key] = {v: profile(engine, point, left + 60) for v, engine in engines.items()}
        except RuntimeError as error:
            failed = error
            profiles[point.key] = {"error": str(error).splitlines()[-1][:300]}
        save()
        print(f"profile of {point.key}: {failed or 'done'}", flush=True)
        if failed and not isinstance(failed, ProfileError):
            return  # an engine is gone; the next call profiles the other points


def elapsed(engine: Engine, point: Point, timeout: float) -> float:
    """Seconds of the point's decoding (or prefill)."""
    whole = engine.time(point.batch, point.input, point.output, timeout)
    return whole - engine.time(point.batch, point.input, 1, timeout) if point.output > 1 else whole


def figures(point: Point, dense: list[float], spense: list[float]) -> dict[str, Any]:
    """Medians of both, and their ratio with the range of the ratios of neighbours in time."""
    ratios = [a / b for a, b in zip(dense, spense, strict=True)]
    return {
        "dense_seconds": dense,
        "spense_seconds": spense,
        "dense_tokens_per_second": point.tokens() / median(dense),
        "spense_tokens_per_second": point.tokens() / median(spense),
        "speed_up": median(dense) / median(spense),
        "speed_up_range": [min(ratios), max(ratios)],
    }


def plan(pairs: list[tuple[ServedModel, str]], options: argparse.Namespace) -> Iterator[str]:
    """What would run, how large it is and about how long it takes."""
    total = 0.0
    for model, ratio in pairs:
        untimed, unprofiled = missing(model, ratio, options)
        gigabytes = [model.linear_bytes(variant) / 1e9 for variant in (DENSE, ratio)]
        seconds = sum(guess(model, point) for point in untimed) * 2 * (options.repeats + 1)
        seconds += sum(guess(model, point) + 2 * PROFILED for point in unprofiled) * 2
        seconds += LOADED if untimed or unprofiled else 0
        total += seconds
        yield (
            f"{model.name}, dense ratio {ratio}: {gigabytes[0]:.1f} and {gigabytes[1]:.1f} GB of linear "
            f"weights, {len(untimed)} points ({', '.join(p.key for p in untimed)}), "
            f"{len(unprofiled)} profiles ({', '.join(p.key for p in unprofiled)}), about {seconds:.0f} s"
        )
    yield f"about {total:.0f} s in all, an estimate for an H200"


def guess(model: ServedModel, point: Point) -> float:
    """Seconds of one measurement: weights and cache at 3 TB/s per step, prompts at 600 TFLOP/s."""
    s = model.shape
    weights = model.linear_bytes(DENSE)
    cache = 4 * model.layers * s.kv_heads * s.head_size * point.input * point.batch
    prefill = 2 * weights * point.batch * point.input / 6e14
    return (2 if point.output > 1 else 1) * prefill + point.output * ((weights + cache) / 3e12 + 2e-3)


if __name__ == "__main__":
    main()
