"""What a layer costs on this CPU: Spense against the kernels that stock vLLM has for dense weights.

usage: python -m benchmarks.kernels.cpu_linear [--seconds 1] [--threads 1] [--isa avx512 avx512_bf16]
                                               [--layers 'Llama-3.2-1B down'] [--tokens 1 16] [--report]
                                               [--up-to avx512_bf16]

Microseconds per call of whole layers, activation quantisation included: vLLM's kernels (cpu_rivals.py) and
bitsandbytes' (cpu_four_bit.py), a plain read of as many bytes as a Spense layer's weights have, and Spense in
each codec that the kernels take.
Columns take turns, one call each, so that the noise of a shared machine hits all alike. Medians with 10th and
90th percentile, and beside wall time what the threads spent on a core. Weights come from memory: between two
calls on the same ones all others are read, 0.7 to 1.4 GB (more with many instruction sets).
``--up-to``: all columns as on a CPU whose best instructions these are, with this one's clock and memory,
under a name of its own. Writes benchmarks/results/cpu_linear.json, one entry per CPU with one record per
layer, each written when it is done, and of it the tables in docs/kernels.md (cpu_report.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import cpu_name, facts
from benchmarks.common.results import ROOT, cpu_kernel_sources, provenance, read, write
from benchmarks.kernels import cpu_four_bit, cpu_rivals
from benchmarks.kernels.cpu_report import DOCUMENT, report
from benchmarks.kernels.cpu_rivals import Call, Column
from benchmarks.kernels.shapes import LLAMA_1B, MODELS, SMOLLM2_135M, layer_spec
from vllm_spense.format.codecs import codec_names
from vllm_spense.format.linear import Codecs
from vllm_spense.ops import LinearArguments, LinearSpec
from vllm_spense.ops.linear.cpu import ISAS, CpuBackend, why_not_here
from vllm_spense.ops.linear.cpu import isas as isas_of
from vllm_spense.ops.linear.random import random_layer

RESULTS = ROOT / "benchmarks" / "results" / "cpu_linear.json"
LLAMA_8B = next(model for model in MODELS if model.name == "Llama-3.1-8B")
LAYERS = {
    f"{model.name} {layer}": (model, layer)
    for model, layers in ((SMOLLM2_135M, ["gate_up"]), (LLAMA_1B, ["gate_up", "down"]))
    for layer in layers
} | {f"{LLAMA_8B.name} {layer}": (LLAMA_8B, layer) for layer in ("gate_up", "down")}
TOKENS = (1, 4, 8, 16, 32, 64, 512)
SPENSE = (("fp8", 0.5), ("int8", 0.5))
"""Codec and dense ratio of our columns; a codec that is not registered is left out."""
MEMORY = 1.4e9
"""Most bytes of all weights of a layer's columns together, if one copy of each fits."""
READERS = 64
"""Rows that the plain read sums up, each by one thread."""
ROUNDS = 5
"""Fewest calls of each column."""
ONEDNN = {
    "avx2": "AVX2",
    "avx_vnni": "AVX2_VNNI",
    "avx512": "AVX512_CORE",
    "avx512_vnni": "AVX512_CORE_VNNI",
    "avx512_bf16": "AVX512_CORE_BF16",
}
"""What ONEDNN_MAX_CPU_ISA calls the instruction sets in front of AMX."""
Samples = list[tuple[float, float]]
"""Seconds of each call: on the clock, and of all threads on a core."""


def best(codec: str, limit: str) -> str:
    """The instruction set that the operator would pick if there were none behind ``limit``."""
    return next(name for name in reversed(isas_of(codec)) if ISAS.index(name) <= ISAS.index(limit))


def ours(layer: str, isas: Sequence[str], limit: str | None = None) -> Iterator[Column]:
    """Spense in every codec that there is, with the instructions that the operator picks, or these."""
    for codec, ratio in SPENSE:
        if codec not in codec_names():
            continue
        spec = replace(layer_spec(*LAYERS[layer], ratio), codecs=Codecs.of(codec))
        for isa in isas or [""]:
            picked = best(codec, limit) if limit else isa
            yield Column(
                *(f"Spense {codec} {ratio:g}" + (f", {isa}" if isa else ""), spec.weight_bytes),
                make=lambda seed, spec=spec, isa=picked: spense_call(spec, isa, seed),
                kind=f"Spense {codec}",
                chosen=not isa,
                why_not=CpuBackend().why_not(spec, torch.device("cpu")),
            )


def spense_call(spec: LinearSpec, isa: str, seed: int) -> Call:
    prepared = CpuBackend().prepare(spec, random_layer(spec, torch.device("cpu"), seed))
    layer = LinearArguments.of(spec, prepared, None, "strips").compiled()
    run, number = torch.ops.spense.linear_cpu, 1 + ISAS.index(isa) if isa else 0
    return lambda x: run(x, *layer, number)


def floor(nbytes: int) -> Column:
    """A sum over as many bytes, eight at a time: what memory allows (in parts for each thread)."""

    def make(seed: int) -> Call:
        buffer = torch.full((READERS, nbytes // 8 // READERS), seed, dtype=torch.int64)
        return lambda x: buffer.sum(1)

    return Column("read", nbytes, make, kind="read")


def columns(layer: str, isas: Sequence[str], limit: str | None = None) -> list[Column]:
    """All of them, vLLM's first; the read is one of the first Spense column's bytes."""
    spec = layer_spec(*LAYERS[layer], 0.5)
    spense = list(ours(layer, isas, limit))
    n, k = spec.out_features, spec.in_features
    rivals = [
        *cpu_rivals.columns(n, k, False if limit else None),
        cpu_four_bit.bitsandbytes(n, k, bool(limit)),
    ]
    specs = {ratio: layer_spec(*LAYERS[layer], ratio) for *_, ratio in cpu_four_bit.SPENSE}
    four_bit = cpu_four_bit.ours(specs, isas, limit)
    return [*rivals, *(floor(column.nbytes) for column in spense[:1]), *spense, *four_bit]


def interleaved(calls: dict[str, list[Call]], x: torch.Tensor, seconds: float) -> dict[str, Samples]:
    """Every column's samples; they take turns, each through its own copies of the weights."""
    on_core = time.thread_time if torch.get_num_threads() == 1 else time.process_time
    copies = len(next(iter(calls.values())))
    for turn in range(copies):  # a kernel may prepare itself for each number of tokens
        for own in calls.values():
            own[turn](x)
    samples: dict[str, Samples] = {name: [] for name in calls}
    end, turn = time.perf_counter() + seconds * len(calls), 0
    while turn < ROUNDS or time.perf_counter() < end:
        for name, own in calls.items():
            call, wall, core = own[turn % copies], time.perf_counter(), on_core()
            call(x)
            samples[name].append((time.perf_counter() - wall, on_core() - core))
        turn += 1
    return samples


def cell(samples: Samples) -> dict[str, float]:
    """Microseconds: median, 10th and 90th percentile on the clock, median on a core; number of calls."""
    wall, core = (sorted(1e6 * each for each in part) for part in zip(*samples, strict=True))
    last = len(wall) - 1
    low, middle, high = (wall[round(share * last)] for share in (0.1, 0.5, 0.9))
    figures = {"us": middle, "p10": low, "p90": high, "core_us": core[round(0.5 * last)]}
    return {name: round(value, 2) for name, value in figures.items()} | {"calls": len(wall)}


def started(every: Sequence[Column], x: torch.Tensor) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """Calls of the columns that run, so many each that they come from memory, and why the others do not."""
    missing = {column.name: column.why_not for column in every if column.why_not}
    able = [column for column in every if not column.why_not]
    copies = max(1, int(MEMORY // sum(column.nbytes for column in able)))
    calls: dict[str, list[Call]] = {}
    for column in able:
        try:
            own = [column.make(seed) for seed in range(copies)]
            own[0](x)
        except RuntimeError as error:
            missing[column.name] = str(error).splitlines()[0][:200]
        else:
            calls[column.name] = own
    return calls, missing


def measure(
    layer: str, tokens: Sequence[int], isas: Sequence[str], seconds: float, limit: str | None = None
) -> dict[str, Any]:
    """The record of one layer."""
    every = columns(layer, isas, limit)
    k = layer_spec(*LAYERS[layer], 0.5).in_features
    calls, missing = started(every, torch.randn(1, k).bfloat16())
    cells: dict[str, dict[str, Any]] = {name: {} for name in calls}
    for m in tokens:
        samples = interleaved(calls, torch.randn(m, k).bfloat16(), seconds)
        for name, own in samples.items():
            cells[name][str(m)] = cell(own)
        print(layer, m, {name: round(cells[name][str(m)]["us"]) for name in cells}, flush=True)
    return {
        "columns": [column.name for column in every],
        "chosen": [column.name for column in every if column.chosen],
        "bytes": {column.name: column.nbytes for column in every},
        "copies": len(next(iter(calls.values()))),
        "threads": torch.get_num_threads(),
        "missing": missing,
        "cells": cells,
        "sources": cpu_kernel_sources(),
        "made": provenance(),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="per figure")
    parser.add_argument("--threads", type=int, help="default: all cores")
    instructions = parser.add_mutually_exclusive_group()
    instructions.add_argument(
        "--isa", nargs="+", choices=ISAS, help="of our kernels (default: the operator's choice)"
    )
    instructions.add_argument("--up-to", choices=ONEDNN, help="no column uses better instructions than these")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--report", action="store_true", help="only the tables, from the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not options.report:
        if reason := why_not_here():
            sys.exit(reason)
        if options.threads:
            torch.set_num_threads(options.threads)
        cpu = cpu_name(torch.get_num_threads())
        if options.up_to:
            os.environ["ONEDNN_MAX_CPU_ISA"] = ONEDNN[options.up_to]  # read at oneDNN's first call
            cpu = f"{cpu}, limited to {options.up_to}"
        for layer in options.layers:
            record = measure(layer, options.tokens, options.isa or [], options.seconds, options.up_to)
            results = read(options.results)
            entry = results.setdefault(cpu, {"records": {}})
            entry["records"][layer] = record
            entry["machine"] = facts()
            write(options.results, results)
    report(read(options.results), options.document)


if __name__ == "__main__":
    main()
