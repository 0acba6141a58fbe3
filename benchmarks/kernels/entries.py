"""Rows of kernels.json: the figures that follow from what was measured, and which need measuring again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common.results import kernel_sources, read, write
from benchmarks.kernels import shapes
from benchmarks.kernels.baselines import DENSE
from benchmarks.kernels.shapes import Row
from benchmarks.kernels.verdicts import blocked, untested
from vllm_spense.devices import fp8_peak
from vllm_spense.ops.kernel_config import candidates, label

FACTS = ("device", "kernels", "command", "commit", "date", "versions")
"""Fields of a row that say where it comes from."""


def describe_row(
    row: Row, results: dict[str, dict[str, Any]], bandwidth: float, facts: dict[str, Any]
) -> dict[str, Any]:
    """One row of the file: what was measured, and the figures that follow from it."""
    spec, tokens = row.spec, row.tokens
    ours = {
        name.removeprefix("ours:"): result for name, result in results.items() if name.startswith("ours:")
    }
    others = {name: result for name, result in results.items() if not name.startswith("ours:")}
    peak = fp8_peak(facts["device"])
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


def finished(entry: dict[str, Any], parts: Iterable[str], sources: str, vllm: bool = False) -> bool:
    """Whether a stored row needs no new measurement: same kernels, nothing missing.

    ``vllm``: it is installed now, so a row that could not import it is measured again.
    """
    if vllm and "No module named" in entry.get("baselines", {}).get("vllm_cutlass", {}).get("error", ""):
        return False
    known = {*(f"ours:{name}" for name in entry.get("ours", {})), *entry.get("baselines", {})}
    return entry.get("kernels") == sources and set(parts) <= known
