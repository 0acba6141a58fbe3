"""Tokens per second of real vLLM: Spense against dense FP8, CUDA graphs and torch.compile on for both.

usage: python -m benchmarks.serving.decode [--models Qwen3-32B …] [--ratios 0.5 0.25] [--budget S] [--dry-run]
in five minutes, with 16 of its layers: … --models Qwen3-32B --layers 16 --ratios 0.5 --repeats 2 --budget 280
                                        --points 32x128+128 1x8192+1 1x128+128 --capture-sizes 1 8 32

Weights are random (`--load-format dummy`). For each model and dense ratio two engines stay on the GPU, dense
FP8 (A) and Spense (B), started one after the other; each point is measured A B A B …, and medians are
compared. Decode: seconds of ``--output`` tokens less those of one token, after prompts of 128 or 4096 tokens.
Prefill: prompts of 8192 tokens with one token each. Also time to first token, bytes of the weights and
start-up. Then the kernels of a decode step and of a prefill are profiled (benchmarks/serving/profile.py).
Each point is written at once, and what is in the results with the same sources is kept, so the command goes
on where it stopped. `--models tiny --eager` runs anywhere, CPUs included; its numbers mean nothing. Writes
benchmarks/results/gpu/serving_decode.json; `python -m benchmarks.serving.report` makes tables and plot of it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.results import RESULTS, ROOT, entry_of, fingerprint, kernel_sources, save_entry
from benchmarks.serving.engine import Engine, NoAnswer, Point, ProfileError
from benchmarks.serving.models import DENSE, MODELS, ServedModel
from benchmarks.serving.profile import chosen, profile

START = 300.0
"""Most seconds until an engine is ready."""
LOADED = 150.0
"""Seconds that the plan takes for both."""
CACHE = 26 << 30
"""Most bytes of one engine's KV cache: two fit beside two sets of weights of the largest model on 141 GB."""
PROFILED = 4.0
"""Seconds that the plan takes for reading one profile."""


def points(output: int, length: int) -> list[Point]:
    """All of them, most wanted first."""
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
    parser.add_argument("--layers", type=int, help="only the first ones of each model")
    parser.add_argument("--points", nargs="+", metavar="BATCHxINPUT+OUTPUT", help="instead of all")
    parser.add_argument("--output", type=int, default=128, help="tokens to decode")
    parser.add_argument("--length", type=int, default=8200, help="longest prompt and answer together")
    parser.add_argument("--repeats", type=int, default=3, help="of A B")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--capture-sizes", nargs="+", metavar="N", help="of CUDA graphs (default: vLLM's)")
    parser.add_argument("--no-onednn", action="store_true", help="for rehearsals on CPUs (engine.py)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving_decode.json")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "serving")
    parser.add_argument("--dry-run", action="store_true", help="only print what would run")
    options = parser.parse_args(arguments)
    try:
        models = [
            MODELS[n] if options.layers is None else MODELS[n].cut(options.layers) for n in options.models
        ]
        for model in models:
            wanted(model, options)
    except ValueError as error:
        parser.error(str(error))
    pairs = [(model, f"{ratio:g}") for model in models for ratio in options.ratios]
    if options.dry_run:
        for line in plan(pairs, options):
            print(line)
        return
    end = time.monotonic() + options.budget
    for model, ratio in pairs:
        if any(missing(model, ratio, options)) and end - time.monotonic() > LOADED:
            try:
                with ExitStack() as stack:
                    compare(model, ratio, options, end, stack)
            except NoAnswer as error:
                if time.monotonic() < end:
                    raise
                print(f"{model.name}, {ratio}: the {options.budget:.0f} s are over; {error}", flush=True)
    left = [len(part) for pair in pairs for part in missing(*pair, options)]
    print(f"{sum(left)} points left, profiles among them")


def sources() -> str:
    """What the figures depend on."""
    package = ROOT / "vllm_spense"
    return f"{fingerprint([package / 'ops', package / 'serving'])}/{kernel_sources()}"


def wanted(model: ServedModel, options: argparse.Namespace) -> list[Point]:
    """Those asked for, or all that fit; ``ValueError`` for one that does not."""
    if options.points is None:
        return [p for p in points(options.output, options.length) if cache(model, p) <= CACHE]
    found = [Point.of(key) for key in options.points]
    for point in found:
        if point.input + point.output > options.length:
            raise ValueError(f"point {point.key} is longer than --length {options.length}")
        if cache(model, point) > CACHE:
            raise ValueError(
                f"point {point.key} needs more than {CACHE >> 30} GiB of KV cache in {model.name}"
            )
    return found


def cache(model: ServedModel, point: Point) -> int:
    """Bytes of KV cache that a point takes: sequences fill up blocks of up to 64 tokens, vLLM keeps some."""
    return model.cache_bytes(point.batch * (point.input + point.output + 64) + 1024)


def missing(model: ServedModel, ratio: str, options: argparse.Namespace) -> tuple[list[Point], list[Point]]:
    """The points that are not timed, and those that are not profiled."""
    known = entry_of(options.results, "pairs", f"{model.name}/{ratio}", sources())
    every = wanted(model, options)
    return (
        [p for p in every if p.key not in known.get("points", {})],
        [p for p in chosen(every) if p.key not in known.get("profiles", {})],
    )


def compare(
    model: ServedModel, ratio: str, options: argparse.Namespace, end: float, stack: ExitStack
) -> None:
    """Start both engines, time the points and profile some of them, saving after each."""
    untimed, unprofiled = missing(model, ratio, options)
    work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    key = f"{model.name}/{ratio}"
    entry = entry_of(options.results, "pairs", key, sources()) or {"sources": sources(), "points": {}}
    entry["engines"] = {}
    engines: dict[str, Engine] = {}
    for variant in (DENSE, ratio):
        directory = model.write(work / variant, variant)
        log = options.logs / f"{model.name}-{variant}.log"
        engines[variant] = Engine(directory, log, *limits(model, options))
        stack.callback(engines[variant].stop)
        entry["engines"][variant] = engines[variant].wait(min(START, end - time.monotonic()))
        print(f"{model.name}, {variant}: ready, {entry['engines'][variant]}", flush=True)
    save_entry(options.results, "pairs", key, entry)
    for point in untimed:
        if time.monotonic() + turns(options) * guess(model, point) > end:
            continue
        times: dict[str, list[float]] = {variant: [] for variant in engines}
        for turn in range(options.repeats + 1):
            for variant, engine in engines.items():
                seconds = elapsed(engine, point, end)
                if turn:  # the first round warms up
                    times[variant].append(seconds)
        entry["points"][point.key] = figures(point, times[DENSE], times[ratio])
        save_entry(options.results, "pairs", key, entry)
        print(f"{model.name}, {ratio}, {point.key}: {entry['points'][point.key]['speed_up']:.3f}", flush=True)
    profile_points(unprofiled, engines, entry, end, partial(save_entry, options.results, "pairs", key, entry))


def limits(model: ServedModel, options: argparse.Namespace) -> list[str]:
    """Options of both engines: room for the largest point and the longest sequence, and no more."""
    every = [*wanted(model, options), Point(1, options.length, 0)]
    flags = [f"--{flag}" for flag in ("eager", "no-onednn") if getattr(options, flag.replace("-", "_"))]
    return [
        *("--length", str(options.length), "--sequences", str(max(point.batch for point in every))),
        *("--cache", str(-(-max(cache(model, point) for point in every) >> 20))),
        *(["--capture-sizes", *options.capture_sizes] if options.capture_sizes else []),
        *flags,
    ]


def turns(options: argparse.Namespace) -> int:
    """Measurements of one point: A and B, once to warm up."""
    return 2 * (options.repeats + 1)


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
            profiles[point.key] = {v: profile(engine, point, left) for v, engine in engines.items()}
        except NoAnswer:
            raise
        except RuntimeError as error:
            failed = error
            profiles[point.key] = {"error": str(error).splitlines()[-1][:300]}
        save()
        print(f"profile of {point.key}: {failed or 'done'}", flush=True)
        if failed and not isinstance(failed, ProfileError):
            return  # an engine is gone; the next call profiles the other points


def elapsed(engine: Engine, point: Point, end: float) -> float:
    """Seconds of the point's decoding (or prefill)."""
    whole, *first = (
        engine.time(point.batch, point.input, output, end - time.monotonic())
        for output in ([point.output, 1] if point.output > 1 else [1])
    )
    return whole - sum(first)


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
        seconds = sum(guess(model, point) for point in untimed) * turns(options)
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
    weights = model.linear_bytes(DENSE)
    read = model.cache_bytes(point.input * point.batch)
    prefill = 2 * weights * point.batch * point.input / 6e14
    return (2 if point.output > 1 else 1) * prefill + point.output * ((weights + read) / 3e12 + 2e-3)


if __name__ == "__main__":
    main()
