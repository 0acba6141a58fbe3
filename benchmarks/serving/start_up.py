"""Start-up of vLLM on Spense checkpoints against their dense FP8 twins, and what the plugin's checks cost.

usage: python -m benchmarks.serving.start_up SPENSE_DIR [--gigabytes 1] [--repeats 3]

The twin is `spense export --format fp8` of the same checkpoint. Besides SPENSE_DIR, a random model whose
dense FP8 weights have the given size is measured. Each measurement is a process of its own, in turn: seconds
until `LLM(...)` returns (eager, one process), of loading the model, and of each kind of check.
Writes benchmarks/results/start_up.json and the table in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.markdown import insert, table
from benchmarks.common.results import ROOT, program, provenance, write
from benchmarks.serving.random_checkpoint import write_random
from vllm_spense.models.export import export

RESULTS = ROOT / "benchmarks" / "results" / "start_up.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
TIMED = {
    "load": ("vllm.model_executor.model_loader.base_loader", "BaseModelLoader.load_model"),
    "headers": ("vllm_spense.serving.config", "check_headers"),
    "hashes": ("vllm_spense.serving.config", "check_manifest"),
    "values": ("vllm_spense.serving.linear", "check_values"),
}
"""Functions whose seconds are added up."""


def start(model: str) -> dict[str, float]:
    """Start an engine here; seconds in all and of each of :data:`TIMED`."""
    from vllm import LLM

    seconds = dict.fromkeys(TIMED, 0.0)
    for name, (module, path) in TIMED.items():
        owner: Any = importlib.import_module(module)
        *parents, last = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, timed(getattr(owner, last), name, seconds))
    began = time.perf_counter()
    options = {"max_model_len": 256, "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
    LLM(model, skip_tokenizer_init=True, **options)
    return {"start": time.perf_counter() - began} | seconds


def timed(function: Any, name: str, seconds: dict[str, float]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] += time.perf_counter() - began

    return call


def measure(models: dict[str, Path], repeats: int) -> dict[str, Any]:
    """Medians for each model, taken in turn; the first round warms the file cache only."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            command = [*program("benchmarks.serving.start_up"), str(model.absolute()), "--child"]
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"{name} did not start:\n{done.stderr[-3000:]}")
            run = json.loads(done.stdout.splitlines()[-1])
            print(name, {part: round(value, 2) for part, value in run.items()}, flush=True)
            if turn:
                runs[name].append(run)
    return {
        name: {
            "bytes": sum(file.stat().st_size for file in models[name].glob("*.safetensors")),
            "median": {part: median(run[part] for run in found) for part in found[0]},
            "runs": found,
        }
        for name, found in runs.items()
    }


def shown(results: dict[str, Any]) -> str:
    head = ["model", "weight files", "ready, s", "model loaded, s", "headers, s", "hashes, s", "values, s"]
    lines = []
    for name, result in results.items():
        seconds = result["median"]
        checks = [seconds[part] for part in ("headers", "hashes", "values")]
        share = sum(checks) / seconds["start"]
        cells = [f"{result['bytes'] / 1e9:.2f} GB", f"{seconds['start']:.1f}", f"{seconds['load']:.1f}"]
        cells += [f"{check:.2f}" for check in checks] if sum(checks) else ["–"] * 3
        lines.append([name, *cells, f"{share:.1%}" if sum(checks) else "–"])
    return table([*head, "checks"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a Spense checkpoint in FP8")
    parser.add_argument("--name", help="of the checkpoint in the table (default: its directory's)")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "start_up")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(start(str(arguments.model))))
        return
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    random = write_random(arguments.work / "random", arguments.gigabytes)
    given = {
        arguments.name or arguments.model.name: arguments.model,
        f"random, {arguments.gigabytes:g} GB": random,
    }
    models: dict[str, Path] = {}
    for name, spense in given.items():
        models[f"{name}, Spense"] = spense
        twin = export(spense, arguments.work / f"{spense.name}-fp8", format="fp8")
        models[f"{name}, dense FP8"] = twin
    results = measure(models, arguments.repeats)
    shutil.rmtree(arguments.work)
    write(arguments.results, {"models": results, "provenance": provenance()})
    print(shown(results))
    insert(DOCUMENT, "start-up", shown(results))


if __name__ == "__main__":
    main()
