"""One Spense linear layer through the emulator, several times with other timings, against float64.

Every buffer has its exact size, so that an access beyond it is seen; ``x``, ``x_scale`` and ``y`` belong to
the kernel before until that has ended, and ``y`` may be written once. Results must be the same bits for
every timing.
"""

from __future__ import annotations

import ctypes
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from vllm_spense.ops.linear.arguments import LinearArguments
from vllm_spense.ops.linear.reference import full_weight
from vllm_spense.ops.linear.repack import block_metadata, pad_pitch

from .launcher import Emulator, Instance, Launch, LinearArgs, Sm90Config
from .translate import kernel_name

LEGAL_NIBBLES = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], dtype=torch.uint8)  # two of four columns
WRITABLE, AFTER_PRIOR_GRID, WRITE_ONCE = 1, 2, 4
DTYPES = {
    "bf16": (0, torch.bfloat16, 8e-3),
    "fp16": (1, torch.float16, 2e-3),
    "fp32": (2, torch.float32, 2e-5),
}
# One tile shape of each kind; the others differ in the number of tokens only.
DECODE = (Instance(64, 8), Instance(128, 16))
WIDE = Instance(64, 128)
PREFILL, PREFILL_LARGE = Instance(128, 128, multicast=True), Instance(128, 256, multicast=True)
PAIR, PAIR_PREFILL = Instance(128, 16, paired=True), Instance(128, 128, multicast=True, paired=True)
INSTANCES = (*DECODE, WIDE, PREFILL, PREFILL_LARGE, PAIR, PAIR_PREFILL)
PREEMPT = (0, 7, 40)  # one in so many accesses lets another thread run


@dataclass(frozen=True)
class Case:
    """A layer and how to run it. `columns`: split the input, which gives this many rows; else the output."""

    instance: Instance
    cluster: int
    tokens: int
    k: int
    sparse: tuple[int, ...]
    dense: tuple[int, ...]
    rows: int = 0  # of an input split; 0: an output split
    dtype: str = "fp32"
    bias: bool = False
    clusters_fit: int = 2
    seeds: tuple[int, ...] = (1, 2, 3)

    def __str__(self) -> str:
        tile = f"{self.instance.rows}x{self.instance.tokens}" + "-pair" * self.instance.paired
        split = f"in{self.rows}" if self.rows else "out"
        parts = "+".join(map(str, self.sparse)) + "|" + "+".join(map(str, self.dense))
        return (
            f"{tile}-cluster{self.cluster}-{self.tokens}x{self.k}-{split}-{parts}-{self.dtype}"
            + "-bias" * self.bias
        )


class Problem:
    """Random operands of a case and its result in float64."""

    def __init__(self, case: Case) -> None:
        random = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
        sparse, dense = sum(case.sparse), sum(case.dense)
        self.rows = case.rows or sparse + dense
        sparse_shape = (self.rows, sparse) if case.rows else (sparse, case.k)
        dense_shape = (self.rows, dense) if case.rows else (dense, case.k)

        def fp8(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=random).clamp(-4, 4).to(torch.float8_e4m3fn)

        nibbles = LEGAL_NIBBLES[
            torch.randint(0, 6, (sparse_shape[0], sparse_shape[1] // 4), generator=random)
        ]
        metadata = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous()
        values, weight = fp8(sparse_shape[0], sparse_shape[1] // 2), fp8(*dense_shape)
        self.x = fp8(case.tokens, case.k)
        self.x_scale = torch.rand(case.tokens, generator=random) + 0.5
        self.weight_scale = torch.rand(self.rows, generator=random) * 0.1 + 0.02
        self.bias = torch.randn(self.rows, generator=random).to(DTYPES[case.dtype][1]) if case.bias else None

        extents = (list(case.sparse), list(case.dense), not case.rows)
        whole = full_weight(LinearArguments(values, metadata, weight, None, None, *extents)).double()
        y = (self.x.double() @ whole.t()) * self.x_scale.double()[:, None] * self.weight_scale.double()
        if self.bias is not None:
            y = y + self.bias.double()
        if case.instance.paired:
            gate, up = y[:, : self.rows // 2], y[:, self.rows // 2 :]
            y = gate / (1 + torch.exp(-gate)) * up
        self.y = y
        self.values = pad_pitch(values) if values.numel() else None
        self.metadata = block_metadata(metadata) if values.numel() else None
        self.dense = pad_pitch(weight) if weight.numel() else None


class Buffers:
    """Copies of tensors in memory of their exact size, at multiples of 64 bytes."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.rows: list[tuple[int, int, int]] = []
        self.owners: list[np.ndarray] = []

    def add(self, name: str, tensor: torch.Tensor | None, flags: int = 0) -> int | None:
        if tensor is None:
            return None
        raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        owner = np.zeros(raw.size + 64, np.uint8)
        start = -owner.ctypes.data % 64
        array = owner[start : start + raw.size]
        array[:] = raw
        self.owners.append(owner)
        self.arrays[name] = array
        self.rows.append((array.ctypes.data, raw.size, flags))
        return array.ctypes.data

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name].copy()).view(dtype)


def arguments_of(case: Case, problem: Problem) -> tuple[LinearArgs, Buffers]:
    """What the launcher takes but for the outputs, and the buffers that it points to."""
    buffers = Buffers()
    args = LinearArgs(tokens=case.tokens, out_features=problem.rows, in_features=case.k)
    args.output_split, args.shards = not case.rows, len(case.sparse)
    for shard, (sparse, dense) in enumerate(zip(case.sparse, case.dense, strict=True)):
        args.sparse[shard], args.dense[shard] = sparse, dense
    args.x = buffers.add("x", problem.x, AFTER_PRIOR_GRID)
    args.x_scale = buffers.add("x_scale", problem.x_scale, AFTER_PRIOR_GRID)
    args.weight_scale = buffers.add("weight_scale", problem.weight_scale)
    args.bias = buffers.add("bias", problem.bias)
    if problem.values is not None and problem.metadata is not None:
        args.values, args.values_pitch = buffers.add("values", problem.values), problem.values.shape[1]
        args.metadata, args.metadata_rows = (
            buffers.add("metadata", problem.metadata),
            problem.metadata.shape[1],
        )
    if problem.dense is not None:
        args.dense_weight, args.dense_pitch = buffers.add("dense", problem.dense), problem.dense.shape[1]
    args.out_dtype = DTYPES[case.dtype][0]
    return args, buffers


def run_on(
    emulator: Emulator, case: Case, args: LinearArgs, buffers: Buffers, seed: int, preempt: int
) -> str:
    """Launch the case's instance; what went wrong, or an empty string."""
    rows, tile_tokens, multicast, *kind = case.instance
    config = Sm90Config(rows, tile_tokens, case.cluster, multicast, True)
    recorded = emulator.record(args, config, case.clusters_fit)
    promote = 0 if tile_tokens == 256 else 8 if multicast else 4
    table = np.array(buffers.rows, np.uint64)
    launch = Launch(
        grid=recorded.grid,
        cluster=recorded.cluster,
        block=recorded.block,
        shared_bytes=recorded.shared_bytes,
        shared_base=1024,
        preempt=preempt,
        seed=seed,
        parameters=ctypes.addressof(recorded.parameters),
        buffers=table.ctypes.data,
        buffer_count=len(buffers.rows),
    )
    return emulator.run(kernel_name(rows // 64, tile_tokens, multicast, promote, *kind), launch)


def run_once(
    emulator: Emulator, case: Case, problem: Problem, seed: int, preempt: int
) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    """What went wrong or an empty string, y, and the largest |y| of each token of a paired case."""
    _, dtype, _ = DTYPES[case.dtype]
    tokens, columns = problem.y.shape
    args, buffers = arguments_of(case, problem)
    empty = torch.full((tokens, columns), float("nan"), dtype=dtype)
    args.y = buffers.add("y", empty, WRITABLE | AFTER_PRIOR_GRID | WRITE_ONCE)
    paired = case.instance.paired
    if paired:
        args.amax = buffers.add("amax", torch.zeros(tokens), WRITABLE | AFTER_PRIOR_GRID)
    error = run_on(emulator, case, args, buffers, seed, preempt)
    amax = buffers.get("amax", torch.float32) if paired else None
    return error, buffers.get("y", dtype).view(tokens, columns), amax


def failure_of(emulator: Emulator, case: Case) -> str:
    """What is wrong with the kernel in this case, or an empty string."""
    problem = Problem(case)
    limit = DTYPES[case.dtype][2]
    first: torch.Tensor | None = None
    for i, seed in enumerate(case.seeds):
        error, y, amax = run_once(emulator, case, problem, seed, PREEMPT[i % len(PREEMPT)])
        if error:
            return f"seed {seed}: {error}"
        away = (y.double() - problem.y).abs() / (problem.y.abs() + problem.y.abs().max() * 0.05)
        wrong = (away.nan_to_num(float("inf")) > limit).nonzero()
        if len(wrong):
            places = f"first (token, row) {wrong[:4].tolist()}"
            return f"seed {seed}: {len(wrong)} of {y.numel()} results are wrong, {places}"
        if amax is not None and not torch.equal(amax, y.float().abs().amax(1)):
            return f"seed {seed}: amax is not the largest |y| of each token"
        if first is not None and not torch.equal(first, y):
            return f"seed {seed}: results depend on timing"
        first = y
    return ""
