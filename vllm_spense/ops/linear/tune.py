"""Measure every legal kernel configuration of some layers on this GPU and write the table for dispatch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from vllm_spense.devices import H200
from vllm_spense.format.checkpoint import Checkpoint
from vllm_spense.format.files import write_text
from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.models.families import fused_with
from vllm_spense.ops import extension
from vllm_spense.ops.linear.configs import KernelConfig, candidates, estimate
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.ops.linear.table import (
    TuningEntry,
    TuningTable,
    measured,
    read_table,
    table_path,
)
from vllm_spense.ops.linear.timing import TimedLayer, dense_calls, time_graph

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def tune(
    specs: Iterable[LinearSpec],
    tokens: Iterable[int] = TOKENS,
    *,
    directory: Path | None = None,
    command: str = "vllm_spense.ops.linear.tune.tune",
    budget: float = float("inf"),
    skip: Callable[[LinearSpec, KernelConfig], bool] = lambda spec, config: False,
    progress: Callable[[str], None] = print,
) -> Path:
    """Time all configurations of each layer and bucket, best first in the table; returns the table's path.

    The file is rewritten after every bucket; shapes and buckets that are not measured now keep their entries.
    Stops before the next bucket once ``budget`` seconds are gone; leaves out what ``skip`` names.
    ``RuntimeError`` without GPU or extension.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tuning measures kernels and needs a CUDA device")
    if reason := extension.why_not_loaded():
        raise RuntimeError(reason)
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    path, start = table_path(name, directory), time.monotonic()
    tokens = sorted(tokens)
    read_table(path)  # what is no table is not replaced, and found before the measurements
    for entry in entries_of(specs, tokens, device, skip, progress):
        old = read_table(path)
        kept = {(e.shape, e.tokens): e for e in (old.entries if old else ())}
        kept[entry.shape, entry.tokens] = entry
        table = TuningTable(
            device=name,
            torch=torch.__version__,
            date=time.strftime("%Y-%m-%d"),
            command=command,
            entries=tuple(kept.values()),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, table.model_dump_json(indent=1) + "\n")
        if time.monotonic() - start > budget:
            progress(f"stopped: the {budget:.0f} s are over, {path} holds what was measured")
            break
    measured.cache_clear()
    return path


def layer_specs(checkpoint: Checkpoint, tensor_parallel: int = 1) -> list[LinearSpec]:
    """The different hybrid layers of a checkpoint as vLLM fuses and slices them (gate and up are one, and
    q, k and v); each is cut along its own split axis."""
    config = checkpoint.require_spense()
    if config.all_codecs() != [UNIFORM_FP8]:
        names = " and ".join(codecs.title for codecs in config.all_codecs())
        raise ValueError(f"the GPU kernels take FP8 weights, not {names}: there is nothing to measure")
    if tensor_parallel not in config.tensor_parallel_sizes:
        allowed = config.tensor_parallel_sizes
        raise ValueError(f"the checkpoint allows tensor parallel sizes {allowed}, not {tensor_parallel}")
    specs: dict[LinearSpec, None] = {}
    for name in config.modules:
        parent, _, last = name.rpartition(".")
        together = [f"{parent}.{part}" for part in fused_with(last)]
        layouts = [checkpoint.layout(full) for full in together if full in config.modules]
        if any(layout.sparse for layout in layouts):  # the same for each part, so that it counts once
            sliced = [layout.shard(layout.split, tensor_parallel) for layout in layouts]
            specs[LinearSpec.of(sliced, config.codecs)] = None
    return list(specs)


def plan(specs: Iterable[LinearSpec], tokens: Iterable[int]) -> Iterator[tuple[str, int, int, str, float]]:
    """What :func:`tune` would measure on an H200: layer, tokens, configurations, best estimate, its µs."""
    counts = list(tokens)
    for spec in specs:
        for count in counts:
            legal = candidates(spec, count, H200.capability, cutlass=True)
            best = min(legal, key=lambda c: estimate(spec, count, c, H200.processors))
            us = round(estimate(spec, count, best, H200.processors) * 1e6, 1)
            yield f"{spec.split} {spec.out_features}x{spec.in_features}", count, len(legal), str(best), us


def entries_of(
    specs: Iterable[LinearSpec],
    tokens: Iterable[int],
    device: torch.device,
    skip: Callable[[LinearSpec, KernelConfig], bool],
    progress: Callable[[str], None],
) -> Iterator[TuningEntry]:
    """The entries of all layers, one layer after another."""
    for spec in specs:
        yield from measure_layer(spec, tokens, device, skip, progress)


def measure_layer(
    spec: LinearSpec,
    tokens: Iterable[int],
    device: torch.device,
    skip: Callable[[LinearSpec, KernelConfig], bool],
    progress: Callable[[str], None],
) -> Iterator[TuningEntry]:
    """The fastest configuration per bucket, with the time of dense FP8 beside it."""
    capability = torch.cuda.get_device_capability(device)
    layer = TimedLayer.make(spec, device)
    for count in tokens:
        times = {
            config: time_graph(layer.calls(config, count), 10)
            for config in candidates(spec, count, capability, capability in extension.cutlass_capabilities())
            if not skip(spec, config)
        }
        if not times:
            continue
        best = min(times, key=lambda config: times[config])
        dense = time_graph(dense_calls(spec, count, device), 10)
        entry = TuningEntry(
            split="output" if spec.split == "output" else "input",
            out_features=spec.out_features,
            in_features=spec.in_features,
            sparse_sizes=spec.sparse_sizes,
            dense_sizes=spec.dense_sizes,
            tokens=count,
            kernel=best.kernel,
            tile_rows=best.tile_rows,
            tile_tokens=best.tile_tokens,
            cluster=best.cluster,
            multicast=best.multicast,
            us=round(times[best], 3),
            dense_us=round(dense, 3),
            codec=spec.codecs.name,
        )
        progress(
            f"{spec.split} {spec.out_features}x{spec.in_features} tokens {count}: {times[best]:.1f} µs "
            f"(dense {dense:.1f}) with {best}"
        )
        yield entry
