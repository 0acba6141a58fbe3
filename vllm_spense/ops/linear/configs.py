"""Which configurations of the CUDA kernels are legal for a layer, and what they should cost.

The estimate stands in until ``spense tune`` has measured a device: it knows bytes, operations, shared memory
and how evenly tiles fall on the multiprocessors, nothing else. Its constants are an H200's from data sheets,
not fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vllm_spense.devices import MEMORY_RATE, SHARED_RATE, SM_DENSE_RATE, SM_LOAD_RATE
from vllm_spense.ops.linear.spec import LinearSpec

DECODE_TOKENS = (8, 16, 32, 64, 128)
PREFILL_TOKENS = (128, 256)

CYCLE = 8192 / SM_DENSE_RATE  # s; the tensor cores of one multiprocessor do 4096 FP8 multiply-adds per cycle
STAGE = 128  # columns of W that the cycles below are counted for
SPARSE_BYTES = 0.625  # per 2:4 weight: half a value and an eighth of metadata
LAUNCH = 3e-6
CLUSTER_SYNC = 1e-6


@dataclass(frozen=True, order=True)
class KernelConfig:
    """One way to run a layer.

    ``sm90``: tile of ``tile_rows`` outputs by ``tile_tokens`` tokens; ``cluster`` CTAs split K, or, with
    ``multicast``, own neighbouring row tiles that share their loads of x.
    ``cutlass``: CUTLASS GEMMs, one per region and fused shard, with the small or the large tile.
    """

    kernel: Literal["sm90", "cutlass"]
    tile_rows: int
    tile_tokens: int
    cluster: int = 1
    multicast: bool = False


def label(config: KernelConfig) -> str:
    """Short name: ``sm90-128x16-c2`` (two CTAs split K), ``sm90-128x256-m4`` (four share x)."""
    cluster = f"{'m' if config.multicast else 'c'}{config.cluster}"
    return f"{config.kernel}-{config.tile_rows}x{config.tile_tokens}-{cluster}"


def candidates(
    spec: LinearSpec, tokens: int, capability: tuple[int, int], cutlass: bool
) -> list[KernelConfig]:
    """Every legal configuration for ``tokens`` rows of x on a device of this compute capability."""
    return [
        config
        for config in _all(tokens, capability, cutlass)
        if illegal(spec, tokens, config, capability) is None
    ]


def illegal(spec: LinearSpec, tokens: int, config: KernelConfig, capability: tuple[int, int]) -> str | None:
    """None when the kernel can run so, else why not, in one line."""
    if config.kernel == "sm90":
        if capability != (9, 0):
            return "the sm_90a kernel runs on compute capability 9.0 only"
        legal = PREFILL_TOKENS if config.multicast else DECODE_TOKENS
        if config.tile_tokens not in legal:
            return f"tiles of {config.tile_tokens} tokens are not compiled (known: {legal})"
        if config.tile_rows not in ((128,) if config.multicast else (64, 128)):
            return f"tiles of {config.tile_rows} rows are not compiled"
        if config.cluster not in ((1, 2, 4) if config.multicast else (1, 2, 4, 8)):
            return f"clusters of {config.cluster} are not legal here"
        return None
    if capability[0] not in CUTLASS_TILES:
        return "CUTLASS instances exist for compute capability 9.0 and 10.x"
    if spec.split == "input" and all((*spec.sparse_sizes, *spec.dense_sizes)) and spec.sparse_sizes[0] % 16:
        return "TMA cannot start reading x inside 16 bytes: the sparse columns must be a multiple of 16"
    if spec.out_features % 8 or any(size % 8 for size in spec.row_extents):
        return "the CUTLASS epilogue stores 16 bytes at a time: every region's rows must be a multiple of 8"
    return None


def sm90_configs() -> list[KernelConfig]:
    """Every configuration of the Hopper kernel that is compiled."""
    tokens = (*DECODE_TOKENS, *PREFILL_TOKENS)
    return sorted({config for count in tokens for config in _all(count, (9, 0), cutlass=False)})


def pairs(config: KernelConfig) -> bool:
    """Whether the configuration is compiled for pairs of gate and up, too (``spense::linear_silu_mul``), and
    for gates that are packed (``spense::linear_twell``)."""
    return config.tile_rows == 128 and config.tile_tokens <= (128 if config.multicast else 64)


def _all(tokens: int, capability: tuple[int, int], cutlass: bool) -> Iterator[KernelConfig]:
    if capability == (9, 0):
        decode = next((t for t in DECODE_TOKENS if t >= tokens), DECODE_TOKENS[-1])
        for rows in (64, 128):
            for cluster in (1, 2, 4, 8):
                yield KernelConfig("sm90", rows, decode, cluster)
        if tokens > DECODE_TOKENS[-2]:
            for tile_tokens in PREFILL_TOKENS:
                for cluster in (1, 2, 4):
                    yield KernelConfig("sm90", 128, tile_tokens, cluster, multicast=True)
    if cutlass:
        small, large = CUTLASS_TILES.get(capability[0], (None, None))
        if large and (tokens > 64 or not small):
            yield KernelConfig("cutlass", *large)
        if small and tokens <= 512:
            yield KernelConfig("cutlass", *small)


CUTLASS_TILES: dict[int, tuple[tuple[int, int] | None, tuple[int, int]]] = {
    9: (None, (128, 256)),
    10: ((128, 64), (256, 128)),
}
"""(rows, tokens) of the small and the large CUTLASS tile by the major number of the compute capability."""


def tensor_cycles(rows: int, tokens: int, sparse: bool) -> float:
    """Cycles that the tensor cores take for 128 columns of a tile; 2:4 halves them."""
    return 2 * rows * tokens * STAGE * (0.5 if sparse else 1) / 8192


def shared_memory_cycles(rows: int, tokens: int, sparse: bool) -> float:
    """Cycles that shared memory takes for 128 columns of a tile of the Hopper kernels, ours or CUTLASS's.

    TMA writes weights (with metadata) and x once. Each warpgroup of 64 rows reads its weights once and all of
    x: wgmma takes x from nowhere else, and 2:4 needs every column of it, to pick among them. So 2:4 takes
    work off the tensor cores but no bytes of x off shared memory. Its time by theirs is
    ``1 + 80 / tokens + 64 / rows`` for 2:4 tiles (1.81 at 128 x 256) and half of
    ``1 + 128 / tokens + 64 / rows`` for dense ones (1.0). That reads and writes share the rate is assumed.
    """
    weights = 2 * rows * (SPARSE_BYTES if sparse else 1)
    return STAGE * (weights + tokens * (1 + rows / 64)) / SHARED_RATE


def clusters_at_once(processors: int, cluster: int) -> int:
    """How many clusters of so many CTAs, one per multiprocessor, a device should run at once.

    A cluster lies within one GPC. Assumed, where no device was asked: 8 GPCs that share pairs of
    multiprocessors evenly, so two of 18 and six of 16 on an H100 or H200 SXM with 132. Chips differ.
    """
    if cluster == 1:
        return processors
    pairs, late = divmod(processors // 2, 8)
    return sum(2 * (pairs + (gpc < late)) // cluster for gpc in range(8))


def estimate(
    spec: LinearSpec, tokens: int, config: KernelConfig, processors: int, clusters: int | None = None
) -> float:
    """Predicted seconds of one call on a device with ``processors`` multiprocessors.

    ``clusters``: how many of the configuration's clusters the device runs at once, where it has told, else
    :func:`clusters_at_once`. A stage takes as long as the slowest of loads, tensor cores and shared memory. A
    B200 feeds its tensor cores in another way: of its configurations only the order means anything.
    """
    rows, wide = config.tile_rows, config.tile_tokens
    group = config.cluster if config.multicast else 1
    parts = 1 if config.multicast else config.cluster
    clusters = max(1, clusters_at_once(processors, config.cluster) if clusters is None else clusters)
    token_tiles = -(-tokens // wide)

    def column(sparse: bool) -> float:
        load = rows * (SPARSE_BYTES if sparse else 1) + wide / group
        cycles = max(tensor_cycles(rows, wide, sparse), shared_memory_cycles(rows, wide, sparse)) / STAGE
        return max(load / SM_LOAD_RATE, cycles * CYCLE) / parts

    def unit(sparse_columns: int, dense_columns: int) -> float:
        return sparse_columns * column(sparse=True) + dense_columns * column(sparse=False)

    def groups(extents: tuple[int, ...]) -> int:
        return sum(math.ceil(math.ceil(extent / rows) / group) for extent in extents)

    k = spec.in_features
    if spec.split == "output":
        heavy, light = groups(spec.dense_sizes) * token_tiles, groups(spec.sparse_sizes) * token_tiles
        heavy_time, light_time = unit(0, k), unit(k, 0)
    else:
        heavy, light = groups((spec.out_features,)) * token_tiles, 0
        heavy_time, light_time = unit(spec.sparse_sizes[0], spec.dense_sizes[0]), 0.0
    busy = busiest(heavy, light, heavy_time, light_time, clusters)
    moved = spec.weight_bytes + tokens * (k + 2 * spec.out_features)
    return max(busy, moved / MEMORY_RATE) + LAUNCH + (CLUSTER_SYNC if parts > 1 else 0)


def busiest(heavy: int, light: int, heavy_time: float, light_time: float, clusters: int) -> float:
    """Load of the most loaded cluster when heavy units go first and light ones fill up (tile_plan.h)."""
    turns, late = divmod(heavy, clusters)
    level = [turns * heavy_time + (heavy_time if late else 0), turns * heavy_time]
    if not light:
        return level[0]
    even = (heavy * heavy_time + light * light_time) / clusters
    return max(level[0], min(even + light_time, max(level) + -(-light // clusters) * light_time))
