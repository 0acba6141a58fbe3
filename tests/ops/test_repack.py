"""The kernels' layout: against its addressing formula, and against what the kernel's threads would read."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import unpacked
from vllm_spense.format import FP8_DTYPE, Layout
from vllm_spense.format.sparse24 import LEGAL_NIBBLES
from vllm_spense.ops import linear, prune_and_pack, quantize_per_token
from vllm_spense.ops.repack import PAD, block_metadata, blocked_shape, pad_pitch, unblock_metadata

SHAPES = [(1, 8), (64, 256), (65, 128), (128, 512), (200, 136), (127, 640), (129, 1120)]


def random_meta(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 10007 + columns)
    nibbles = torch.tensor(LEGAL_NIBBLES, dtype=torch.uint8)
    low, high = (nibbles[torch.randint(6, (rows, columns // 8), generator=generator)] for _ in range(2))
    return low | high << 4


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_byte_is_where_the_formula_says(rows: int, columns: int) -> None:
    meta = random_meta(rows, columns)
    blocked = block_metadata(meta)
    padded = blocked.shape[1]
    flat = blocked.flatten()
    for m in range(rows):
        for k in range(0, columns, 8):
            assert flat[(k // 128) * padded * 16 + m * 16 + k % 128 // 8] == meta[m, k // 8]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_padding_covers_any_tile_and_is_legal(rows: int, columns: int) -> None:
    blocked = block_metadata(random_meta(rows, columns))
    blocks, padded, _ = blocked.shape
    assert blocks * 128 >= columns
    assert blocks % 2 == 0, "a stage of 256 columns reads two blocks"
    for first in range(rows):  # a tile of 128 rows that starts at any row stays inside
        last_start = first + (rows - first - 1) // 128 * 128
        assert last_start + 128 <= padded
    legal = set(LEGAL_NIBBLES)
    assert {int(b) & 15 for b in blocked.unique()} | {int(b) >> 4 for b in blocked.unique()} <= legal
    assert blocked[:, rows:].eq(PAD).all()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_unblocking_gives_the_bytes_back(rows: int, columns: int) -> None:
    meta = random_meta(rows, columns)
    assert torch.equal(unblock_metadata(block_metadata(meta), rows, columns), meta)


@pytest.mark.parametrize("shape", [(0, 8), (16, 0), (0, 0)])
def test_empty_regions_stay_empty(shape: tuple[int, int]) -> None:
    blocked = block_metadata(torch.empty(shape, dtype=torch.uint8))
    assert blocked.dim() == 3
    assert blocked.numel() == 0
    assert unblock_metadata(blocked, shape[0], shape[1] * 8).shape == shape


def test_metadata_of_another_shape_is_refused() -> None:
    blocked = block_metadata(random_meta(64, 256))
    with pytest.raises(ValueError, match=r"does not fit \[64, 512\], expected \(4, 256, 16\)"):
        unblock_metadata(blocked, 64, 512)
    assert blocked_shape(64, 512) == (4, 256, 16)


@pytest.mark.parametrize("columns", [16, 24, 4, 1])
def test_pitch_padding_keeps_the_values_and_adds_zeros(columns: int) -> None:
    matrix = torch.randn(5, columns).to(FP8_DTYPE)
    padded = pad_pitch(matrix)
    assert padded.shape == (5, -(-columns // 16) * 16)
    assert torch.equal(padded.view(torch.uint8)[:, :columns], matrix.view(torch.uint8))
    assert padded.view(torch.uint8)[:, columns:].eq(0).all()


@pytest.mark.parametrize("layout", [Layout("output", 40, 72, 24), Layout("input", 24, 80, 40)])
def test_the_operator_takes_the_kernels_layout_too(layout: Layout) -> None:
    packed = prune_and_pack(torch.randn(layout.out_features, layout.in_features), layout)
    x, scale = quantize_per_token(torch.randn(3, layout.in_features))
    sizes = ([layout.sparse], [layout.dense], layout.split == "output", torch.float32)
    canonical = (packed["sparse_values"], packed["sparse_meta"], packed["dense_weight"])
    blocked = (pad_pitch(canonical[0]), block_metadata(canonical[1]), pad_pitch(canonical[2]))
    expected = linear(x, scale, *canonical, packed["weight_scale"], None, *sizes)
    assert torch.equal(linear(x, scale, *blocked, packed["weight_scale"], None, *sizes), expected)


def kernel_reads(values: torch.Tensor, blocked: torch.Tensor, rows: int, stage_columns: int) -> torch.Tensor:
    """The matrix as ``linear_kernel`` (linear/sm90_fp8.cuh) puts it together, thread by thread.

    Stages of ``stage_columns`` copy metadata blocks of 16 bytes per row; an instruction covers 64 columns;
    each thread of a warpgroup holds 32 bits of metadata, which cover 8 groups of one row (PTX ISA,
    wgmma.mma_async.sp, e4m3).
    """
    columns = values.shape[1] * 2
    flat = torch.nn.functional.pad(values.view(torch.uint8), (0, 512)).int()
    out = torch.zeros(rows, columns + 1024, dtype=torch.int32)
    thread = torch.arange(128)
    warp, lane = thread // 32, thread % 32
    row = warp * 16 + 8 * (lane & 1) + ((lane >> 2) & 7)
    half = (lane >> 1) & 1
    for first in range(0, rows, 64):
        for stage in range(-(-columns // stage_columns)):
            for j in range(stage_columns // 64):
                block = blocked[stage * (stage_columns // 128) + (j >> 1)]
                tile = torch.nn.functional.pad(block, (0, 0, 0, 64))[first : first + 64]
                offset = half * 4 + (j & 1) * 8
                word = torch.stack([tile[row, offset + i] for i in range(4)], 1).int()
                start = stage * stage_columns + j * 64 + 32 * half
                inside = first + row < rows
                for group in range(8):
                    nibble = word[:, group // 2] >> (4 * (group % 2)) & 15
                    for place, index in enumerate((nibble & 3, nibble >> 2)):
                        r, k = (first + row)[inside], (start + 4 * group)[inside]
                        out[r, k + index[inside]] += flat[r, k // 2 + place]
    assert out[:, columns:].eq(0).all(), "padding must meet zero values"
    return out[:, :columns].to(torch.uint8)


@pytest.mark.parametrize("stage_columns", [256, 128])
@pytest.mark.parametrize(("rows", "columns"), [(64, 256), (100, 384), (130, 1120), (70, 136)])
def test_threads_of_the_kernel_read_the_matrix(rows: int, columns: int, stage_columns: int) -> None:
    layout = Layout("output", rows, columns, rows)
    packed = prune_and_pack(torch.randn(rows, columns), layout)
    blocked = block_metadata(packed["sparse_meta"])
    read = kernel_reads(packed["sparse_values"], blocked, rows, stage_columns)
    assert torch.equal(read, unpacked(packed, layout).view(torch.uint8))
