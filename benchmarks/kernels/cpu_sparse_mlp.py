"""What an activation-sparse MLP costs on this CPU, gate included, against dense ones.

usage: python -m benchmarks.kernels.cpu_sparse_mlp [--seconds 0.4] [--threads 2] [--layers SparseLM-2B]
                                                   [--densities 0.02 0.1] [--tokens 1 8] [--report]

Four columns: vLLM's dense bf16 MLP (its kernel for gate and up together, its SiLU·mul, its kernel for down),
the same with the `cpu` back end's FP8 layers, and `spense::sparse_mlp_cpu` behind a gate in bf16 (vLLM's
kernel) and behind one in FP8. Gates are random and so are tokens: neurons are active independently of each
other, the worst case for the union over tokens. A threshold lets the wanted share through; what was let
through is recorded. Columns take turns, one call each, as in cpu_linear.py, and weights come from memory.
Writes benchmarks/results/cpu_sparse_mlp.json, one entry per CPU with one record per layer, and of it the
tables and the plot in docs/twell.md (cpu_sparse_mlp_report.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import cpu_name, facts
from benchmarks.common.results import ROOT, cpu_kernel_sources, provenance, read, write
from benchmarks.kernels.cpu_linear import cell, interleaved, spense_call
from benchmarks.kernels.cpu_rivals import Call, bf16_onednn, codes, loaded
from benchmarks.kernels.cpu_sparse_mlp_report import BASE, DOCUMENT, report
from benchmarks.kernels.shapes import Model, layer_spec
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpSpec
from vllm_spense.ops.mlp.sparse_mlp_cpu import SparseMlpCpuBackend, why_not_here

RESULTS = ROOT / "benchmarks" / "results" / "cpu_sparse_mlp.json"
LAYERS = {
    model.name: model
    for model in (
        Model("SparseLM-2B", 2048, 5632, 32, 32, 64),
        Model("Llama-7B", 4096, 11008, 32, 32, 128),
    )
}
DENSITIES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 512)
MEMORY = 9e8
"""Most bytes of all weights of a layer's columns together, if one copy of each fits."""


@dataclass
class SparseMlp:
    """A gate's product and what follows it, with weights of its own; lets through ``density`` of the gate."""

    gate: Call
    spec: SparseMlpSpec
    seed: int
    tensors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        shape = self.spec.neurons, self.spec.in_features
        up, down = (codes(*shape, self.seed + i).bfloat16().mul_(1 / 64) for i in (1, 2))
        self.tensors = SparseMlpCpuBackend().prepare(self.spec, {"up": up, "down": down.t()})

    def calibrate(self, x: torch.Tensor, density: float) -> None:
        """The threshold that lets through this share of what the gate says of x."""
        values = self.gate(x).float().flatten()
        closed = max(1, round((1 - density) * values.numel()))
        threshold = max(0.0, float(values.kthvalue(closed).values))
        self.spec = replace(self.spec, activation=Activation("fatrelu", threshold))

    def active(self, x: torch.Tensor) -> torch.Tensor:
        return self.spec.activation.active(self.gate(x))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return SparseMlpCpuBackend().apply(self.spec, self.tensors, x, self.gate(x))


def dense(gate_up: Call, down: Call, neurons: int) -> Call:
    """An MLP of vLLM's own parts but for its products."""
    silu_and_mul = loaded() and torch.ops._C.silu_and_mul

    def call(x: torch.Tensor) -> torch.Tensor:
        hidden = x.new_empty(x.shape[0], neurons)
        silu_and_mul(hidden, gate_up(x))
        return down(hidden)

    return call


def bf16(n: int, k: int, seed: int) -> Call:
    return bf16_onednn(codes(n, k, seed))


def columns(model: Model, copies: int) -> dict[str, list[Any]]:
    """Calls of every column, so many copies each."""
    k, i = model.hidden, model.intermediate
    whole, down = (layer_spec(model, layer, 1.0) for layer in ("gate_up", "down"))
    gate = replace(whole, out_features=i, sparse_sizes=(0,), dense_sizes=(i,))
    spec = SparseMlpSpec(k, i, k, Activation("relu"))
    makers = {
        BASE: lambda seed: dense(bf16(2 * i, k, seed), bf16(k, i, seed + 1), i),
        "dense FP8": lambda seed: dense(spense_call(whole, "", seed), spense_call(down, "", seed), i),
        "sparse, bf16 gate": lambda seed: SparseMlp(bf16(i, k, seed), spec, seed),
        "sparse, FP8 gate": lambda seed: SparseMlp(spense_call(gate, "", seed), spec, seed),
    }
    return {name: [make(10 * copy) for copy in range(copies)] for name, make in makers.items()}


def nbytes(model: Model) -> int:
    """Of one copy of all columns' weights."""
    return model.hidden * model.intermediate * (6 + 3 + 6 + 5)


def measure(
    model: Model, densities: Sequence[float], tokens: Sequence[int], seconds: float, copies: int
) -> dict[str, Any]:
    """The record of one layer: cells by density, number of tokens and column."""
    calls = columns(model, copies)
    sparse = [mlp for own in calls.values() for mlp in own if isinstance(mlp, SparseMlp)]
    cells: dict[str, Any] = {}
    for m in tokens:
        x = torch.randn(m, model.hidden, generator=torch.Generator().manual_seed(m)).bfloat16()
        for density in densities:
            for mlp in sparse:
                mlp.calibrate(x, density)
            active = sparse[0].active(x)
            samples = interleaved(calls, x, seconds)
            found = {name: cell(own) for name, own in samples.items()}
            cells.setdefault(f"{density:g}", {})[str(m)] = {
                "active": round(float(active.float().mean()), 5),
                "union": round(float(active.any(0).float().mean()), 5),
                "columns": found,
            }
            shown = {name: round(figures["us"]) for name, figures in found.items()}
            print(model.name, m, f"{density:g}", shown, flush=True)
    return {
        "neurons": model.intermediate,
        "hidden": model.hidden,
        "copies": copies,
        "threads": torch.get_num_threads(),
        "cells": cells,
        "sources": cpu_kernel_sources(),
        "made": provenance(),
    }


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A record with the cells of an earlier one, made of the same sources, that were not measured again."""
    if old.get("sources") != new["sources"]:
        return new
    cells = {density: dict(row) for density, row in old["cells"].items()}
    for density, row in new["cells"].items():
        cells.setdefault(density, {}).update(row)
    return new | {"cells": cells}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.4, help="per figure")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--report", action="store_true", help="only tables and plot, from the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not options.report:
        if reason := why_not_here():
            sys.exit(reason)
        if isinstance(loaded(), str):
            sys.exit(loaded())
        if options.threads:
            torch.set_num_threads(options.threads)
        cpu = cpu_name(torch.get_num_threads())
        run = partial(measure, densities=options.densities, tokens=options.tokens, seconds=options.seconds)
        for name in options.layers:
            model = LAYERS[name]
            record = run(model, copies=max(1, int(MEMORY // nbytes(model))))
            results = read(options.results)
            entry = results.setdefault(cpu, {"records": {}})
            entry["records"][name] = merged(entry["records"].get(name, {}), record)
            entry["machine"] = facts()
            write(options.results, results)
    report(read(options.results), options.document)


if __name__ == "__main__":
    main()
