"""How fast are the Spense kernels on this GPU, beside dense FP8 and beside the other ways to run 2:4?

usage: python benchmarks/kernel_spense_linear.py [--core] [--budget S] [--only TEXT …] [--dry-run | --report]

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
import dataclasses
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import kernel_shapes as shapes
from benchmarks.gpu_tests import blocked, untested
from benchmarks.kernel_baselines import BASELINES, DENSE
from benchmarks.kernel_shapes import Device, Row
from benchmarks.kernel_worker import CONTEXT_LOST, EVENT
from benchmarks.results_file import RESULTS, ClockLog, kernel_sources, provenance, read, write
from benchmarks.supervise import Ended, supervise
from vllm_spense.ops import extension
from vllm_spense.ops.linear.configs import KernelConfig, candidates, estimate, label
from vllm_spense.ops.linear.table import read_table, shape_of, table_path

SILENT = 75.0
"""Seconds without an event after which it hangs: libraries take some to start and to search."""
OURS_SILENT = 15.0
"""The same while one of our own kernels is checked and timed."""
CORE_BASELINES = ("scaled_mm",)
FACTS = ("device", "kernels", "command", "commit", "date", "versions")
"""Fields of a row that say where it comes from."""
Parts = dict[str, KernelConfig | None]
"""What is measured for a row, by name; a configuration for ours, None for a baseline."""


def parts_of(
    row: Row, device: Device, tuned: dict[tuple, KernelConfig], baselines: Sequence[str] = tuple(BASELINES)
) -> Parts:
    chosen = shapes.configs(row, device.capability, device.processors, device.cutlass)
    extra = tuned.get((shape_of(row.spec), row.tokens))
    if extra and extra not in chosen:
        chosen.append(extra)
    return {f"ours:{label(config)}": config for config in chosen} | dict.fromkeys(baselines)


# --- the process that plans, watches and writes -------------------------------------------------------------


class Recorder:
    """Turns events into rows; knows what broke, so that it is not tried again."""

    def __init__(
        self, plan: dict[str, tuple[Row, Parts]], skipped: dict[tuple[str, str], str], facts: dict[str, Any]
    ) -> None:
        self.plan, self.facts = plan, facts
        self.results: dict[str, dict[str, Any]] = {
            key: {name: {"skipped": skipped[key, name]} for name in parts if (key, name) in skipped}
            for key, (_, parts) in plan.items()
        }
        self.broken: dict[str, str] = {}
        self.current: tuple[str, str] | None = None
        self.bandwidth = 0.0
        self.clocks: dict[str, Any] = {}
        self.finished: list[str] = []

    def jobs(self) -> list[dict[str, Any]]:
        """What is left to measure, without parts that broke a process before."""
        left = []
        for key, (row, parts) in self.plan.items():
            if key in self.finished:
                continue
            for name in parts:
                if name in self.broken:
                    self.results[key].setdefault(name, {"skipped": self.broken[name]})
            todo = {n: c and dataclasses.asdict(c) for n, c in parts.items() if n not in self.results[key]}
            spec = row.spec
            left.append(
                {
                    "key": key,
                    "split": spec.split,
                    "out_features": spec.out_features,
                    "in_features": spec.in_features,
                    "sparse_sizes": spec.sparse_sizes,
                    "dense_sizes": spec.dense_sizes,
                    "tokens": row.tokens,
                    "parts": todo,
                }
            )
        return left

    def take(self, event: dict[str, Any], log: ClockLog) -> str | None:
        """Digest one event; the key of a row that is now complete."""
        kind, key = event["event"], event.get("key", "")
        if kind == "ready":
            self.bandwidth = event["bandwidth"]
        elif kind == "row":
            self.clocks = {"clocks_before": log.restart()}
        elif kind == "begin":
            self.current = key, event["part"]
        elif kind == "end":
            self.results[key][event["part"]] = event["result"]
            self.current = None
            if event.get("lost"):
                self.broken[event["part"]] = f"broke the device in {key}"
        elif kind == "done":
            self.clocks |= {"clocks_after": log.latest, "lowest_sm_mhz": log.lowest_sm_mhz}
            self.finished.append(key)
            return key
        return None

    def died(self, ended: Ended) -> None:
        """The measuring process is gone: what it was at is to blame."""
        if self.current is not None:
            key, name = self.current
            said = " ".join(line for line in ended.tail.splitlines() if not line.startswith(EVENT))
            self.results[key][name] = {"error": f"{ended.reason}: {said[-300:]}".rstrip(": ")}
            self.broken[name] = f"not tried: it hung or crashed in {key}"
            self.current = None

    def entry(self, key: str) -> dict[str, Any]:
        row, _ = self.plan[key]
        return describe_row(row, self.results[key], self.bandwidth, self.facts) | self.clocks


def measure_rows(
    recorder: Recorder,
    *,
    budget: float,
    save: Callable[[dict[str, Any]], None],
    say: Callable[[str], None] = print,
    command: Sequence[str] = (sys.executable, str(Path(__file__).with_name("kernel_worker.py"))),
    silent: float = SILENT,
    ours_silent: float = OURS_SILENT,
    deaths: int = 12,
) -> str:
    """Measure all rows of the recorder within ``budget`` seconds; ``save`` gets each as it is complete.

    A process that hangs or dies is replaced, and goes on behind the part that did it. Returns how it ended.
    """
    end = time.monotonic() + budget

    def idle() -> float:
        ours = recorder.current is not None and recorder.current[1].startswith("ours:")
        return min(silent, ours_silent) if ours else silent

    def on_line(line: str) -> None:
        if not line.startswith(EVENT):
            if line.strip():
                say(f"  {line}")
            return
        key = recorder.take(json.loads(line[len(EVENT) :]), log)
        if key:
            entry = recorder.entry(key)
            save(entry)
            say(line_of(entry))

    with ClockLog() as log, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.json"
        for _ in range(deaths):
            jobs = recorder.jobs()
            if not jobs:
                return "all rows measured"
            if end - time.monotonic() < 3:
                return f"the {budget:.0f} s are over, {len(jobs)} rows are left"
            path.write_text(json.dumps(jobs))
            ended = supervise([*command, str(path)], limit=end - time.monotonic(), idle=idle, on_line=on_line)
            if ended.ok:
                continue
            if "over its limit" in ended.reason:
                return f"the {budget:.0f} s are over, {len(recorder.jobs())} rows are left"
            if recorder.current is None and ended.returncode != CONTEXT_LOST:
                return f"the measuring process failed: {ended.reason}\n{ended.tail[-1500:]}"
            recorder.died(ended)
            say(f"  {ended.reason}; going on in a new process")
    return f"{deaths} measuring processes died"


def describe_row(
    row: Row, results: dict[str, dict[str, Any]], bandwidth: float, facts: dict[str, Any]
) -> dict[str, Any]:
    """One row of the file: what was measured, and the figures that follow from it."""
    spec, tokens = row.spec, row.tokens
    ours = {
        name.removeprefix("ours:"): result for name, result in results.items() if name.startswith("ours:")
    }
    others = {name: result for name, result in results.items() if not name.startswith("ours:")}
    peak = shapes.fp8_peak(facts["device"])
    work, dense = shapes.spense_work(spec, tokens), shapes.dense_work(spec, tokens)
    bound, bound_by = work.bound(bandwidth, peak) if bandwidth else (None, None)
    entry: dict[str, Any] = {
        "key": row.key,
        "model": row.model,
        "layer": row.layer,
        "dense_ratio": row.ratio,
        "tokens": tokens,
        "split": spec.split,
        "out_features": spec.out_features,
        "in_features": spec.in_features,
        "sparse_sizes": list(spec.sparse_sizes),
        "dense_sizes": list(spec.dense_sizes),
        "us": None,
        "bound_us": bound and round(bound, 2),
        "bound_by": bound_by,
        "limit_by_bytes": round(dense.bytes / work.bytes, 3),
        "limit_by_operations": round(dense.operations / work.operations, 3),
        "copy_tbps": round(bandwidth / 1e12, 3),
        "ours": ours,
        "baselines": others,
    }
    times = {name: result["us"] for name, result in ours.items() if "us" in result}
    if times:
        best = min(times, key=lambda name: times[name])
        us = times[best]
        seconds = us * 1e-6
        entry |= {
            "us": us,
            "config": best,
            "us_overlapped": ours[best].get("us_overlapped"),
            "tbps": round(work.bytes / seconds / 1e12, 3),
            "tflops": round(work.operations / seconds / 1e12, 1),
            "percent_of_bound": round(100 * bound / us, 1) if bound else None,
            "times_baseline": {
                name: round(result["us"] / us, 3) for name, result in others.items() if "us" in result
            },
        }
        fastest = min((others[name]["us"] for name in DENSE if "us" in others.get(name, {})), default=None)
        entry["times_dense"] = round(fastest / us, 3) if fastest else None
        entry["tested"] = best not in facts.get("untested", {}).get(row.key, ())
    return entry | {name: value for name, value in facts.items() if name != "untested"}


def recheck(path: Path, tests: dict[str, Any]) -> str:
    """Take times of configurations that a test has failed since out of the file; what was done, in a line."""
    content, known = read(path), {row.key: row for row in (*shapes.rows(), *shapes.core_rows())}
    removed, sources = [], kernel_sources()
    for i, entry in enumerate(content.get("rows", [])):
        row = known.get(entry["key"])
        if row is None or entry.get("kernels") != sources:
            continue
        ours = dict(entry["ours"])
        configs = {label(config): config for config in candidates(row.spec, row.tokens, (9, 0), True)}
        for name in ours:
            config = configs.get(name)
            if config and "us" in ours[name] and (reason := blocked(tests, row.spec, config)):
                ours[name] = {"error": f"timed, then found wrong: {reason}"}
                removed.append(f"{entry['key']} {name}")
        doubtful = [n for n in ours if n in configs and untested(tests, row.spec, configs[n])]
        results = {f"ours:{name}": result for name, result in ours.items()} | entry["baselines"]
        facts = {name: entry[name] for name in FACTS if name in entry} | {"untested": {row.key: doubtful}}
        clocks = {name: value for name, value in entry.items() if "clocks" in name or name == "lowest_sm_mhz"}
        again = describe_row(row, results, entry["copy_tbps"] * 1e12, facts) | clocks
        content["rows"][i] = again
    if content:
        write(path, content)
    return f"rows checked against the tests: {', '.join(removed) or 'no time'} taken out"


def line_of(entry: dict[str, Any]) -> str:
    """A row for the terminal."""
    bad = [name for part in ("ours", "baselines") for name, r in entry[part].items() if "error" in r]
    lost = f"  errors: {', '.join(bad)}" if bad else ""
    if not entry["us"]:
        return f"{entry['key']:36s} ours did not run{lost}"
    others = " ".join(f"{name} ×{ratio:.2f}" for name, ratio in entry["times_baseline"].items())
    return (
        f"{entry['key']:36s} {entry['us']:8.1f} µs {entry['tbps']:5.2f} TB/s {entry['tflops']:6.0f} TFLOP/s "
        f"{entry['percent_of_bound'] or 0:3.0f} % of bound  {others}  {entry['config']}{lost}"
    )


def finished(entry: dict[str, Any], parts: Parts, sources: str, vllm: bool = False) -> bool:
    """Whether a stored row needs no new measurement: same kernels, nothing missing.

    ``vllm``: it is installed now, so a row that could not import it is measured again.
    """
    if vllm and "No module named" in entry.get("baselines", {}).get("vllm_cutlass", {}).get("error", ""):
        return False
    known = {*(f"ours:{name}" for name in entry.get("ours", {})), *entry.get("baselines", {})}
    return entry.get("kernels") == sources and set(parts) <= known


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
        bound, by = shapes.spense_work(row.spec, row.tokens).bound(4.3e12, shapes.fp8_peak(device.name))
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
        from benchmarks.kernel_report import report

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
