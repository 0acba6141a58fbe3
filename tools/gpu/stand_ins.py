"""What runs first light: the GPU, or on a CPU the definition or the emulated kernel; and faults to put in.

A stand-in says nothing about a GPU. It shows that cases, diagnosis and time limits work before there is one.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.gpu.first_light_cases import Machine
from vllm_spense.devices import H200
from vllm_spense.ops.kernel_config import DECODE_TOKENS, PREFILL_TOKENS, KernelConfig, pairs
from vllm_spense.ops.linear import reference_linear

SM90_PROCESSORS = H200.processors
FAULTS = ("hang", "crash", "wrong")


class Gpu:
    """The compiled kernel on the current CUDA device."""

    def __init__(self, library: Path) -> None:
        from vllm_spense.ops import cuda_linear

        if not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device")
        torch.ops.load_library(str(library))
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.run = cuda_linear.run

    def clusters(self, config: KernelConfig) -> int:
        shape = (config.tile_rows, config.tile_tokens, config.cluster, config.multicast)
        found = torch.ops.spense.sm90_clusters(*shape)
        return min(found, torch.ops.spense.sm90_clusters(*shape, True)) if pairs(config) else found

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Definition:
    """The definition in the kernel's place, on the CPU."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def clusters(self, config: KernelConfig) -> int:
        return SM90_PROCESSORS // config.cluster

    def run(self, config: KernelConfig, *arguments: Any, overlap: bool = True) -> None:
        *layer, y = arguments
        y.copy_(reference_linear(*layer, y.dtype))

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        return call

    def synchronize(self) -> None: ...


class Emulated(Definition):
    """The Hopper kernel's PTX in the tests' emulator; needs nvcc, g++ and the CUTLASS headers to be built."""

    CLUSTERS = 2  # run at once, so that each has several tiles

    def __init__(self) -> None:
        super().__init__()
        from tests.emulator import build, cases, launcher, translate

        if reason := build.why_not():
            raise RuntimeError(reason)
        instances = [launcher.Instance(rows, tokens) for rows in (64, 128) for tokens in DECODE_TOKENS]
        instances += [launcher.Instance(128, tokens, multicast=True) for tokens in PREFILL_TOKENS]
        self.emulator = build.build(tuple(instances))
        self.cases, self.launcher, self.kernel_name = cases, launcher, translate.kernel_name
        self.seed = 0

    def run(self, config: KernelConfig, *arguments: Any, overlap: bool = True) -> None:
        x, x_scale, values, metadata, dense, scale, _bias, sparse_sizes, dense_sizes, output, y = arguments
        cases, launcher = self.cases, self.launcher
        buffers = cases.Buffers()
        args = launcher.LinearArgs(tokens=len(x), out_features=y.shape[1], in_features=x.shape[1])
        args.output_split, args.shards = output, len(sparse_sizes)
        args.sparse[: args.shards], args.dense[: args.shards] = sparse_sizes, dense_sizes
        args.x = buffers.add("x", x, cases.AFTER_PRIOR_GRID)
        args.x_scale = buffers.add("x_scale", x_scale.float(), cases.AFTER_PRIOR_GRID)
        args.weight_scale = buffers.add("weight_scale", scale)
        if values.numel():
            args.values, args.values_pitch = buffers.add("values", values), values.shape[1]
            args.metadata, args.metadata_rows = buffers.add("metadata", metadata), metadata.shape[1]
        if dense.numel():
            args.dense_weight, args.dense_pitch = buffers.add("dense", dense), dense.shape[1]
        args.out_dtype = next(code for code, dtype, _ in cases.DTYPES.values() if dtype == y.dtype)
        args.y = buffers.add("y", y, cases.WRITABLE | cases.AFTER_PRIOR_GRID | cases.WRITE_ONCE)
        fields = (config.tile_rows, config.tile_tokens, config.cluster, config.multicast)
        recorded = self.emulator.record(args, launcher.Sm90Config(*fields, overlap), self.CLUSTERS)
        table = cases.np.array(buffers.rows, cases.np.uint64)
        self.seed += 1
        launch = launcher.Launch(
            grid=recorded.grid,
            cluster=recorded.cluster,
            block=recorded.block,
            shared_bytes=recorded.shared_bytes,
            shared_base=1024,
            preempt=0,
            seed=self.seed,
            parameters=ctypes.addressof(recorded.parameters),
            buffers=table.ctypes.data,
            buffer_count=len(buffers.rows),
        )
        promote = 0 if config.tile_tokens == 256 else 8 if config.multicast else 4
        name = self.kernel_name(config.tile_rows // 64, config.tile_tokens, config.multicast, promote, False)
        if problem := self.emulator.run(name, launch):
            raise RuntimeError(f"the emulator stopped: {problem}")
        y.copy_(buffers.get("y", y.dtype).view(y.shape))


class Faulty:
    """A machine with one fault, in every launch of a kernel."""

    def __init__(self, machine: Machine, fault: str) -> None:
        self.machine, self.fault, self.device = machine, fault, machine.device
        self.clusters, self.capture = machine.clusters, machine.capture
        self.synchronize = machine.synchronize

    def run(self, config: KernelConfig, *arguments: Any, overlap: bool = True) -> None:
        if self.fault == "hang":
            time.sleep(3600)
        if self.fault == "crash":
            os.abort()
        self.machine.run(config, *arguments, overlap=overlap)
        arguments[-1].view(-1)[-1] += 1


STAND_INS: dict[str, Callable[[], Machine]] = {"definition": Definition, "emulator": Emulated}
