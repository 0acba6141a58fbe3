"""What a layer costs on this CPU: the kernels on compressed weights against dense GEMMs.

usage: python -m benchmarks.kernels.cpu_linear [--seconds 0.5] [--report]

Microseconds per call (median) of whole layers, activation quantisation included, for each instruction set
with kernels, of the `cpu-fp32` back end, and of bare GEMMs on dense weights: bf16, fp32 and FP8
(`torch._scaled_mm`). Calls go through so many copies of a layer that weights come from memory, as in a model.
Writes benchmarks/results/cpu_linear.json, one entry per CPU, and the table in
docs/kernels.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT, provenance, read, write
from vllm_spense.format.layout import Split
from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.format.online import online_layout, prune_and_pack
from vllm_spense.ops import LinearArguments, LinearSpec, quantize_per_token
from vllm_spense.ops.linear.cpu import ISAS, CpuDenseBackend, describe_cpu, interleave, isas, why_not_here

RESULTS = ROOT / "benchmarks" / "results" / "cpu_linear.json"
DOCUMENT = ROOT / "docs" / "kernels.md"
LAYERS: dict[str, tuple[Split, int, int]] = {
    "SmolLM2-135M gate_up": ("output", 3072, 576),
    "Llama-3.2-1B gate_up": ("output", 16384, 2048),
    "Llama-3.2-1B down": ("input", 2048, 8192),
}
TOKENS = (1, 4, 8, 16, 64, 512)
DENSE = ("bf16 GEMM", "fp32 GEMM", "FP8 `_scaled_mm`", "`cpu-fp32`")
COLD = 400e6
"""Bytes of all copies of a layer: more than caches hold."""
Call = Callable[[torch.Tensor], object]


def median_us(calls: list[Call], x: torch.Tensor, seconds: float) -> float:
    times = []
    end = time.perf_counter() + seconds
    for call in itertools.cycle(calls):
        start = time.perf_counter()
        call(x)
        times.append(time.perf_counter() - start)
        if time.perf_counter() > end and len(times) >= 3:
            return statistics.median(times) * 1e6
    raise AssertionError("no calls")


def columns(split: Split, n: int, k: int) -> Iterator[tuple[str, list[Call]]]:
    """Names, and calls on ``x [M, K]`` bf16, each with weights of its own."""
    torch.manual_seed(0)
    layout = online_layout(split, n, k, 0.5)
    tensors = prune_and_pack(torch.randn(n, k), layout)
    spec = LinearSpec(split, n, k, (layout.sparse,), (layout.dense,), UNIFORM_FP8)
    fp32 = CpuDenseBackend()
    prepared = fp32.prepare(spec, tensors)
    wide, scale = prepared["weight_packed"], tensors["weight_scale"]

    def copies(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.clone() for _ in range(math.ceil(COLD / tensor.nbytes))]

    yield DENSE[0], [lambda x, w=w: x @ w.t() for w in copies(wide.bfloat16())]
    yield DENSE[1], [lambda x, w=w: x.float() @ w.t() for w in copies(wide)]

    def scaled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        xq, xs = quantize_per_token(x)
        return torch._scaled_mm(xq, w.t(), xs, scale[None], out_dtype=x.dtype)

    yield DENSE[2], [lambda x, w=w: scaled(x, w) for w in copies(wide.to(torch.float8_e4m3fn))]
    every = [prepared | {"weight_packed": w} for w in copies(wide)]
    yield DENSE[3], [lambda x, p=p: fp32.apply(spec, p, x, None) for p in every]
    count = math.ceil(COLD / spec.weight_bytes)

    def packed() -> tuple[Any, ...]:
        cloned = {name: tensor.clone() for name, tensor in tensors.items()}
        return interleave(spec, LinearArguments.of(spec, cloned)).compiled()

    every_packed = [packed() for _ in range(count)]
    run = torch.ops.spense.linear_cpu
    for name in isas():
        isa = ISAS.index(name) + 1
        yield f"`{name}`", [lambda x, p=p, i=isa: run(x, *p, i) for p in every_packed]


def measure(seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds by layer, column and number of tokens."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for layer, shape in LAYERS.items():
        found[layer] = {}
        for name, calls in columns(*shape):
            times = found[layer].setdefault(name, {})
            for m in TOKENS:
                x = torch.randn(m, shape[2]).bfloat16()
                median_us(calls, x, 0)  # warms up
                times[str(m)] = median_us(calls, x, seconds)
            print(layer, name, {m: round(us) for m, us in times.items()}, flush=True)
    return found


def tables(results: dict[str, Any]) -> str:
    parts = []
    for cpu, entry in results.items():
        names = list(next(iter(entry["layers"].values())))
        lines = [
            [layer, m, *(f"{found[name][m]:,.0f}" for name in names)]
            for layer, found in entry["layers"].items()
            for m in map(str, TOKENS)
        ]
        shown = table(["layer", "M", *names], lines)
        parts.append(f"{cpu}, torch {entry['made']['versions']['torch']}; µs:\n\n{shown}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="per figure")
    parser.add_argument("--report", action="store_true", help="only the table, from the results")
    options = parser.parse_args()
    results = read(RESULTS)
    if not options.report:
        if reason := why_not_here():
            sys.exit(reason)
        cpu = f"{describe_cpu()}, {torch.get_num_threads()} threads"
        results[cpu] = {"layers": measure(options.seconds), "made": provenance()}
        write(RESULTS, results)
    insert(DOCUMENT, "cpu-linear", tables(results))


if __name__ == "__main__":
    main()
