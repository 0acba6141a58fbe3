"""How fast are the Spense kernels on this GPU, beside dense FP8 and beside the other ways to run 2:4?

usage: python -m benchmarks.kernels.spense_linear [--core] [--budget S] [--only TEXT …] [--dry-run | --report]

Times linear layers of four models, most wanted first, and writes one row of JSON per layer, dense ratio and
number of tokens: ours (every legal configuration, or the likeliest for many tokens), torch's and vLLM's dense
FP8 products, the paper's way (cuSPARSELt and a dense product), 6:8 by cuSPARSELt, and the roofline from the
copy bandwidth of this device. Weights are read from memory, not from L2: copies take turns. The median of
CUDA graph replays counts. Whatever does not run leaves its error in its row.

`--core` takes the rows that decide: decode of gate_up and down, then what 2:4 brings to prefill (2:4 alone
against dense alone, in the two tiles that ask for it), beside torch's dense product only.
Finished rows are kept: run it again to go on, `--fresh` to start over. `--report` makes tables, plot and the
summary in docs/kernels.md from the JSON and needs no GPU. `--dry-run` neither: it lists the plan with
predicted times.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import RESULTS, kernel_sources, provenance, read, write
from benchmarks.kernels import shapes
from benchmarks.kernels.baselines import BASELINES
from benchmarks.kernels.entries import finished
from benchmarks.kernels.recorder import Parts, Recorder, measure_rows
from benchmarks.kernels.shapes import Device, Row
from benchmarks.kernels.verdicts import blocked, untested
from vllm_spense.devices import MEMORY_RATE, fp8_peak
from vllm_spense.ops import extension
from vllm_spense.ops.kernel_config import KernelConfig, estimate, label
from vllm_spense.ops.tuning import read_table, shape_of, table_path

CORE_BASELINES = ("scaled_mm",)


def parts_of(
    row: Row, device: Device, tuned: dict[tuple, KernelConfig], baselines: Sequence[str] = tuple(BASELINES)
) -> Parts:
    chosen = shapes.configs(row, device.capability, device.processors, device.cutlass)
    extra = tuned.get((shape_of(row.spec), row.tokens))
    if extra and extra not in chosen:
        chosen.append(extra)
    return {f"ours:{label(config)}": config for config in chosen} | dict.fromkeys(baselines)


def tuned_configs(device: Device, directory: Path) -> dict[tuple, KernelConfig]:
    table = read_table(table_path(device.name, directory))
    return {(e.shape, e.tokens): e.config for e in (table.entries if table else ())}


def dry_run(rows: Sequence[Row], device: Device) -> None:
    """The plan with legality and predicted µs, without a GPU."""
    total = 0.0
    for row in rows:
        chosen = shapes.configs(row, device.capability, device.processors, device.cutlass)
        if not chosen:
            raise SystemExit(f"{row.key}: no legal configuration")
        predicted = {c: estimate(row.spec, row.tokens, c, device.processors) * 1e6 for c in chosen}
        best = min(predicted, key=lambda c: predicted[c])
        bound, by = shapes.spense_work(row.spec, row.tokens).bound(MEMORY_RATE, fp8_peak(device.name))
        total += predicted[best]
        print(
            f"{row.key:36s} {row.spec.split:6s} {row.spec.out_features:6d} x {row.spec.in_features:5d}  "
            f"{len(chosen):2d} configurations, predicted {predicted[best]:8.1f} µs with {label(best)}, "
            f"bound {bound:8.1f} µs ({by})"
        )
    print(f"{len(rows)} rows, {total / 1e6:.2f} s for one call of each; every row has a legal configuration")


def select(only: Sequence[str] | None, core: bool = False) -> list[Row]:
    every = shapes.core_rows() if core else shapes.rows()
    rows = [row for row in every if not only or any(text in row.key for text in only)]
    if not rows:
        raise SystemExit(f"no row contains any of {only}; a key is like {shapes.rows()[0].key}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--tests", type=Path, help="outcome of the GPU tests (default: beside the results)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--core", action="store_true", help="the rows that decide, beside torch only")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose key contains one of these")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the measuring process on the way out
    if arguments.report:
        from benchmarks.kernels.report import report

        return report(arguments.results)
    rows, device = select(arguments.only, arguments.core), Device.here()
    if arguments.dry_run:
        return dry_run(rows, device)
    if not torch.cuda.is_available():
        raise SystemExit("timing needs a CUDA device; --dry-run shows the plan, --report the last results")
    if reason := extension.why_not_loaded():
        raise SystemExit(reason)

    tests = read(arguments.tests or arguments.results.with_name("test.json")).get("groups", {})
    tuned, sources = tuned_configs(device, arguments.results.parent), kernel_sources()
    stored = {(r["device"], r["key"]): r for r in read(arguments.results).get("rows", [])}
    plan: dict[str, tuple[Row, Parts]] = {}
    skipped: dict[tuple[str, str], str] = {}
    doubtful: dict[str, list[str]] = {}
    baselines, vllm = tuple(BASELINES), bool(find_spec("vllm"))
    if arguments.core:
        baselines, vllm = CORE_BASELINES, False
    for row in rows:
        parts = parts_of(row, device, tuned, baselines)
        entry = stored.get((device.name, row.key), {})
        if not arguments.fresh and finished(entry, parts, sources, vllm=vllm):
            continue
        plan[row.key] = row, parts
        for name, config in parts.items():
            if config and (reason := blocked(tests, row.spec, config)):
                skipped[row.key, name] = reason
            if config and untested(tests, row.spec, config):
                doubtful.setdefault(row.key, []).append(label(config))
    print(f"{len(plan)} rows to measure on {device.name}, {len(rows) - len(plan)} are finished", flush=True)
    facts = {"device": device.name, "kernels": sources, "untested": doubtful} | provenance()

    def save(entry: dict[str, Any]) -> None:
        stored[entry["device"], entry["key"]] = entry
        write(arguments.results, {"rows": list(stored.values())})

    print(measure_rows(Recorder(plan, skipped, facts), budget=arguments.budget, save=save), flush=True)


if __name__ == "__main__":
    main()
