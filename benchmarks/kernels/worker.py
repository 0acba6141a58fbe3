"""The process that measures rows for `benchmarks/kernels/spense_linear.py`: one JSON event per line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import shapes
from benchmarks.kernels.baselines import BASELINES, copy_bandwidth
from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.ops import LinearSpec, cuda_linear
from vllm_spense.ops.kernel_config import KernelConfig
from vllm_spense.ops.linear import reference_linear
from vllm_spense.ops.measure import TimedLayer, time_graph

EVENT = "@@ "
WRONG = 1e-2
CHECKED_TOKENS = 64
CONTEXT_LOST = 86


class Bench:
    """Measures parts of rows on the device; keeps the weights of one layer at a time."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._layer: TimedLayer | None = None
        self._wanted: tuple[tuple[LinearSpec, int], torch.Tensor] | None = None
        self._slide: dict[tuple[LinearSpec, int], dict[str, Any]] = {}

    def measure(
        self, spec: LinearSpec, tokens: int, name: str, config: KernelConfig | None
    ) -> dict[str, Any]:
        if config is not None:
            return self.ours(spec, tokens, config)
        dense = dataclasses.replace(spec, sparse_sizes=(0,), dense_sizes=(0,))
        if name == "slide_sparse" and (dense, tokens) in self._slide:  # does not depend on the ratio
            return self._slide[dense, tokens]
        baseline = BASELINES[name](spec, tokens, self.device)
        us, how = time_calls(baseline.calls, shapes.dense_work(spec, tokens))
        result = {"us": us, "note": "; ".join(filter(None, (baseline.note, how)))} | baseline.details
        if name == "slide_sparse":
            self._slide[dense, tokens] = result
        return result

    def ours(self, spec: LinearSpec, tokens: int, config: KernelConfig) -> dict[str, Any]:
        layer = self.layer(spec)
        error = self.relative_error(layer, tokens, config)
        if not error <= WRONG:
            return {"error": f"wrong result: relative error {error:.2e}"}
        calls, work = layer.calls(config, tokens), shapes.spense_work(spec, tokens)
        # The calls of a graph stand back to back: overlapping, each fetches weights while the one before
        # computes. No baseline does, and in a model the kernel in front is another one.
        alone = [partial(call, overlap=False) for call in calls]  # type: ignore[call-arg]
        us, how = time_calls(alone, work)
        overlapped, _ = time_calls(calls, work)
        result = {"us": us, "us_overlapped": overlapped, "relative_error": error}
        return result | ({"note": how} if how else {})

    def layer(self, spec: LinearSpec) -> TimedLayer:
        if self._layer is None or self._layer.spec != spec:
            self._layer = None
            torch.cuda.empty_cache()
            self._layer = TimedLayer.make(spec, self.device)
            torch.cuda.synchronize()
        return self._layer

    def relative_error(self, layer: TimedLayer, tokens: int, config: KernelConfig) -> float:
        """Against the definition, for some of the tokens: a fast wrong kernel must not make a row."""
        spec, tensors = layer.spec, layer.copies[0]
        xq, xs = layer.inputs(tokens, seed=1)
        names = ("sparse_values", "sparse_meta", "weight_packed", "weight_scale")
        sizes = (list(spec.sparse_sizes), list(spec.dense_sizes), spec.split == "output")
        weights: list[Any] = [*(tensors[name] for name in names), None, *sizes]
        y = torch.full((tokens, spec.out_features), float("nan"), dtype=torch.bfloat16, device=self.device)
        arguments: list[Any] = [config, xq, xs, *weights, y]
        cuda_linear.run(*arguments)
        some = torch.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS), device=self.device).long()
        if self._wanted is None or self._wanted[0] != (spec, tokens):
            arguments = [xq.view(torch.uint8)[some].view(xq.dtype), xs[some], *weights, torch.float32]
            self._wanted = (spec, tokens), reference_linear(*arguments)
        want = self._wanted[1]
        return ((y[some].float() - want).norm() / want.norm()).item()


def time_calls(calls: Sequence[Callable[[], object]], work: shapes.Work) -> tuple[float, str]:
    """Median µs of a call and, if they could not be captured in a CUDA graph, a remark on that."""
    expected = max(work.bytes / 4e12, work.operations / 1.2e15) * len(calls)
    repeats = int(min(max(0.1 / expected, 5), 30))
    try:
        return round(time_graph(calls, repeats), 3), ""
    except RuntimeError as error:
        if "captur" not in str(error):
            raise
        torch.cuda.synchronize()
        return round(time_loop(calls, repeats), 3), f"timed without a graph: {_short(error)}"


def time_loop(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Median µs of a call from events around the whole sequence: launch gaps included."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def work_off(jobs: Path) -> None:
    """The measuring process: one event per line when a part begins and when it has ended."""
    emit("ready", bandwidth=copy_bandwidth(torch.device("cuda")))
    bench = Bench()
    for job in json.loads(jobs.read_text()):
        spec = LinearSpec(
            *(job["split"], job["out_features"], job["in_features"]),
            *(tuple(job["sparse_sizes"]), tuple(job["dense_sizes"]), UNIFORM_FP8),
        )
        emit("row", key=job["key"])
        for name, fields in job["parts"].items():
            emit("begin", key=job["key"], part=name)
            try:
                config = KernelConfig(**fields) if fields else None
                result = bench.measure(spec, job["tokens"], name, config)
            except Exception as error:
                result = {"error": _short(error)}
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                emit("end", key=job["key"], part=name, result={"error": _short(error)}, lost=True)
                os._exit(CONTEXT_LOST)
            emit("end", key=job["key"], part=name, result=result)
        torch.cuda.empty_cache()
        emit("done", key=job["key"])


def emit(event: str, **fields: Any) -> None:
    print(EVENT + json.dumps({"event": event} | fields), flush=True)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", type=Path)
    work_off(parser.parse_args().jobs)
