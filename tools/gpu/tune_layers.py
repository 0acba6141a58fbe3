"""Tune the layers of the kernel benchmark on this GPU, most wanted first, and write the dispatch table.

usage: python -m tools.gpu.tune_layers --directory DIR [--core] [--budget SECONDS] [--tests test.json]

`--core`: gate_up and down of the first model at two ratios, in the buckets that decide. Layers that the table
already holds are left alone; configurations that failed the GPU tests are not tried.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.results import RESULTS, read
from benchmarks.kernels.shapes import layer_specs
from benchmarks.kernels.verdicts import blocked
from vllm_spense.ops import LinearSpec
from vllm_spense.ops.linear import tune
from vllm_spense.ops.linear.table import TuningTable, read_table, shape_of, table_path

CORE_TOKENS = (1, 8, 16, 32, 64, 256, 2048, 8192)


def missing(
    specs: list[LinearSpec], table: TuningTable | None, tokens: Sequence[int] = tune.TOKENS
) -> list[LinearSpec]:
    """Layers of which the table lacks a bucket."""
    known = {(e.shape, e.tokens) for e in (table.entries if table else ())}
    return [s for s in specs if any((shape_of(s), count) not in known for count in tokens)]


def planned(core: bool) -> str:
    tokens = CORE_TOKENS if core else tune.TOKENS
    return f"{len(list(layer_specs(core)))} layers × {len(tokens)} numbers of tokens, the first ones first"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--core", action="store_true", help="four layers in eight buckets")
    arguments = parser.parse_args()
    tests = read(arguments.tests or arguments.directory / "test.json").get("groups", {})

    device = torch.cuda.get_device_name()
    tokens = CORE_TOKENS if arguments.core else tune.TOKENS
    specs = list(layer_specs(arguments.core))
    specs = missing(specs, read_table(table_path(device, arguments.directory)), tokens)
    print(f"{len(specs)} layers to tune on {device}", flush=True)
    path = tune.tune(
        specs,
        tokens,
        directory=arguments.directory,
        command="python -m tools.gpu.tune_layers",
        budget=arguments.budget,
        skip=lambda spec, config: blocked(tests, spec, config) is not None,
        progress=lambda line: print(line, flush=True),
    )
    print(f"{len(missing(specs, read_table(path), tokens))} of them left; {path}", flush=True)


if __name__ == "__main__":
    main()
