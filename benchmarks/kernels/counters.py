"""Hardware counters of three kernels, by Nsight Compute: why are they as fast as they are?

usage: python -m benchmarks.kernels.counters --results FILE [--budget S]

gate_up of Qwen3-32B at 16 tokens (half 2:4), and 128x256 tiles all 2:4 and all dense at 8192 tokens: the
shares of memory, shared memory and tensor cores, and what warps wait for. Clocks are left alone, so only
shares mean anything. Times of a profiled kernel are none.
"""

from __future__ import annotations

import argparse
import csv
import glob
import io
import os
import re
import shutil
from pathlib import Path

from benchmarks.common.results import RESULTS, ROOT, program, provenance, write
from benchmarks.common.supervise import supervise

KERNELS = {
    "decode, half 2:4, 16 tokens": (0.5, 16, "sm90-128x16-c4"),
    "128x256, all 2:4, 8192 tokens": (0.0, 8192, "sm90-128x256-m2"),
    "128x256, all dense, 8192 tokens": (1.0, 8192, "sm90-128x256-m2"),
}
"""Dense ratio of gate_up, tokens, configuration."""
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats")
BANKS = ("reads", "writes")
SHOWN = (
    r"dram__throughput\.avg\.pct",
    r"l1tex__data_bank_(reads|writes)\.avg\.pct",
    r"l1tex__throughput\.avg\.pct",
    r"sm__inst_executed_pipe_tensor.*pct",
    r"sm__throughput\.avg\.pct",
)


def find_ncu() -> str | None:
    places = [shutil.which("ncu"), "/usr/local/cuda/bin/ncu", *glob.glob("/opt/nvidia/nsight-compute/*/ncu")]
    return next((place for place in places if place and Path(place).exists()), None)


def launch() -> None:
    """Launch each kernel once: what runs under the profiler."""
    import torch

    from benchmarks.kernels.shapes import MODELS, layer_spec
    from benchmarks.kernels.verdicts import config_of
    from vllm_spense.ops import extension
    from vllm_spense.ops.linear.timing import TimedLayer

    if reason := extension.why_not_loaded():
        raise SystemExit(reason)
    for ratio, tokens, name in KERNELS.values():
        layer = TimedLayer.make(layer_spec(MODELS[0], "gate_up", ratio), torch.device("cuda"))
        layer.calls(config_of(name), tokens)[0]()
        torch.cuda.synchronize()


def parse(text: str) -> list[dict[str, float]]:
    """Counters of each profiled kernel from ncu's CSV: a line of names, one of units, one per kernel."""
    start = re.search(r'^"ID",', text, re.M)
    if not start:
        return []
    lines = [line for line in text[start.start() :].splitlines() if line.startswith('"')]
    names, _, *kernels = csv.reader(io.StringIO("\n".join(lines)))
    return [
        {
            name: float(value.replace(",", ""))
            for name, value in zip(names, values, strict=True)
            if "__" in name and re.fullmatch(r"[\d.,]+(e[+-]?\d+)?", value)
        }
        for values in kernels
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "counters.json")
    parser.add_argument("--budget", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.launch:
        return launch()
    if not (ncu := find_ncu()):
        raise SystemExit("Nsight Compute (ncu) is not installed")
    metrics = ",".join(f"l1tex__data_bank_{way}.avg.pct_of_peak_sustained_elapsed" for way in BANKS)
    sections = [part for section in SECTIONS for part in ("--section", section)]
    lines: list[str] = []
    ended = supervise(
        [
            *(ncu, "--clock-control", "none", "--kernel-name", "regex:linear_kernel", "--target-processes"),
            *("all", *sections, "--metrics", metrics, "--csv", "--page", "raw"),
            *(*program("benchmarks.kernels.counters"), "--launch"),
        ],
        limit=options.budget,
        cwd=ROOT,
        env={"SPENSE_TUNING_DIR": os.environ.get("SPENSE_TUNING_DIR", str(ROOT / "build"))},
        on_line=lines.append,
    )
    found = dict(zip(KERNELS, parse("\n".join(lines)), strict=False))
    write(options.results, {"kernels": found} | provenance())
    for name, counters in found.items():
        shares = [f"{c} {value:.0f} %" for c, value in counters.items() if any(re.match(p, c) for p in SHOWN)]
        print(f"{name}: {', '.join(shares) or f'{len(counters)} counters'}", flush=True)
    if not ended.ok or len(found) < len(KERNELS):
        said = "\n".join(line for line in lines if not line.startswith('"'))
        raise SystemExit(f"ncu read {len(found)} of {len(KERNELS)} kernels: {ended.reason}\n{said[-1500:]}")


if __name__ == "__main__":
    main()
