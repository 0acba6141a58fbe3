"""What the CPU serving benchmark measures, and how its results are kept: one entry per CPU.

An entry holds models and variants by ``MODEL/VARIANT``: the rounds that were measured, each with the seconds
of its points, why points are missing, and where it was made. Nothing of one CPU touches another's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.results import ROOT, cpu_kernel_sources, fingerprint, provenance, read, write
from benchmarks.kernels.shapes import LLAMA_1B, SMOLLM2_135M
from benchmarks.serving.engine import Point
from benchmarks.serving.models import BF16, DENSE, FP8_BLOCKS, INT8, TINY, ServedModel
from vllm_spense.format.codecs import codec_names

RESULTS = ROOT / "benchmarks" / "results" / "serving_cpu.json"
MODELS = {
    model.name: model
    for model in (
        ServedModel(SMOLLM2_135M, 30, 49152),
        ServedModel(LLAMA_1B, 16, 128256),
        ServedModel(TINY, 2, 49152),
    )
}
"""``tiny`` is for rehearsals: its numbers mean nothing, and no document shows them."""
VARIANTS = {
    BF16: "dense bf16",
    INT8: "dense INT8 W8A8",
    DENSE: "dense FP8",
    FP8_BLOCKS: "dense FP8 W8A16",
    "0.5": "Spense FP8, dense ratio 0.5",
    "0.25": "Spense FP8, 0.25",
    "0.5-int8": "Spense INT8, 0.5",
    "1.0-nf4": "NF4, dense",
    "0.5-nf4": "Spense NF4, 0.5",
}
FOUR_BIT = ("1.0-nf4", "0.5-nf4")
"""Those of four_bit.py, which no other table shows."""
POINTS = {
    "decode, 1 sequence": Point(1, 32, 33),
    "decode, 4 sequences": Point(4, 32, 33),
    "decode, 16 sequences": Point(16, 32, 33),
    "decode, 32 sequences": Point(32, 32, 33),
    "prefill, 512 tokens": Point(1, 512, 1),
    "prefill, 2048 tokens": Point(1, 2048, 1),
}
SLOW = {DENSE: 3}
"""Variants whose kernels take minutes, and how many tokens they decode; once, without warming up."""


def variants() -> list[str]:
    """Those whose codec is registered, but for 4 bits."""
    return [v for v in VARIANTS if v not in FOUR_BIT and (v != "0.5-int8" or "int8" in codec_names())]


def point_of(variant: str, name: str) -> Point:
    point = POINTS[name]
    return point if point.output == 1 else Point(point.batch, point.input, SLOW.get(variant, point.output))


def sources() -> str:
    """What the figures depend on."""
    package = ROOT / "vllm_spense"
    return f"{fingerprint([package / 'ops', package / 'serving'])}/{cpu_kernel_sources()}"


def load(path: Path) -> dict[str, Any]:
    return migrated(read(path))


def migrated(results: dict[str, Any]) -> dict[str, Any]:
    """Results by CPU; of the older form, which had one machine for all and one round, its machine's entry."""
    if "made" not in results:
        return results
    made = dict(results["made"])
    cpu = made.pop("cpu")
    models = {
        key: {
            "sources": old["sources"],
            "rounds": [{"start_seconds": old["start_seconds"], "seconds": old["seconds"]}],
            "missing": {},
            "made": made,
        }
        for key, old in results["models"].items()
    }
    return {cpu: {"models": models}}


def known(results: dict[str, Any], cpu: str, key: str) -> dict[str, Any]:
    """What there is of a variant from the same sources; otherwise an entry without rounds."""
    entry = results.get(cpu, {}).get("models", {}).get(key, {})
    fresh = {"sources": sources(), "rounds": [], "missing": {}}
    return entry if entry.get("sources") == fresh["sources"] else fresh


def lacking(entry: dict[str, Any], points: list[str], rounds: int) -> list[str]:
    """The points that fewer than ``rounds`` rounds have, and that can be measured."""
    return [p for p in points if p not in entry["missing"] and len(list(_rounds(entry, p))) < rounds]


def save(path: Path, cpu: str, machine: dict[str, Any], key: str, entry: dict[str, Any]) -> None:
    results = load(path)
    kept = results.setdefault(cpu, {"models": {}})
    kept["machine"] = machine
    kept["models"][key] = entry | {"made": provenance()}
    write(path, results)


def against(value: float | None, base: float | None) -> str:
    """A cell of a table: a rate, and how many times that of ``base`` it is."""
    return f"{value:,.1f} ({value / base:.2f}×)" if value and base else "–"


def _rounds(entry: dict[str, Any], point: str) -> Iterator[list[float]]:
    yield from (r["seconds"][point] for r in entry["rounds"] if r["seconds"].get(point))


def seconds(entry: dict[str, Any], point: str) -> list[float]:
    """Of every measurement in every round."""
    return [value for part in _rounds(entry, point) for value in part]


def rate(entry: dict[str, Any] | None, variant: str, point: str) -> float | None:
    """Tokens per second at the median; None if it is not measured."""
    found = seconds(entry, point) if entry else []
    return point_of(variant, point).tokens() / median(found) if found and median(found) > 0 else None
