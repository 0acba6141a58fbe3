"""Checkpoint tensors to the layout that the CUDA kernels read, and back: pure permutations and padding.

Metadata: the byte of row m and columns k … k+7 moves to ``[k // 128][m][k % 128 // 8]`` of an array
``[2 · ceil(K / 256)][rows'][16]``, the order in which sm_90 and sm_100 tensor cores take it for e4m3
(with tiles of at least 128 columns). ``rows'`` is ``rows + 127`` rounded up to 128, so that a tile of
128 rows may start at any row. The padding is a legal nibble pair (0x44): hardware reads it, beside
values that are zero.

Values and dense weights keep their rows, whose pitch is padded with zeros to the 16 bytes that TMA needs.
"""

from __future__ import annotations

import torch

from vllm_spense.ops.linear.arguments import LinearArguments

BLOCK_COLUMNS = 128
BLOCK_BYTES = 16
PITCH = 16
PAD = 0x44
_ROWS = 128


def blocked_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """Shape of the blocked metadata of a 2:4 region ``[rows, columns]``."""
    blocks = 2 * -(-columns // (2 * BLOCK_COLUMNS))
    return blocks, -(-(rows + _ROWS - 1) // _ROWS) * _ROWS, BLOCK_BYTES


def block_metadata(meta: torch.Tensor) -> torch.Tensor:
    """Canonical ``[rows, K/8]`` to blocked metadata; empty regions give an empty tensor."""
    rows, width = meta.shape
    blocks, padded, _ = blocked_shape(rows, width * 8)
    if not meta.numel():
        return meta.new_empty((0, padded, BLOCK_BYTES))
    out = meta.new_full((padded, blocks * BLOCK_BYTES), PAD)
    out[:rows, :width] = meta
    return out.view(padded, blocks, BLOCK_BYTES).permute(1, 0, 2).contiguous()


def unblock_metadata(blocked: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`block_metadata` for a region ``[rows, columns]``."""
    if not rows * columns:
        return blocked.new_empty((rows, columns // 8))
    if blocked.shape != blocked_shape(rows, columns):
        raise ValueError(
            f"blocked metadata {tuple(blocked.shape)} does not fit [{rows}, {columns}], "
            f"expected {blocked_shape(rows, columns)}"
        )
    flat = blocked.permute(1, 0, 2).reshape(blocked.shape[1], -1)
    return flat[:rows, : columns // 8].contiguous()


def pad_pitch(matrix: torch.Tensor) -> torch.Tensor:
    """``[rows, columns]`` of one-byte elements with zero columns up to a pitch of 16 bytes."""
    extra = -matrix.shape[1] % PITCH
    if not extra:
        return matrix
    padded = torch.nn.functional.pad(matrix.view(torch.uint8), (0, extra))
    return padded.view(matrix.dtype)


def block(layer: LinearArguments) -> LinearArguments:
    """A layer in the checkpoint's layout to the layout ``blocked``."""
    return layer._replace(
        sparse_values=pad_pitch(layer.sparse_values),
        sparse_meta=block_metadata(layer.sparse_meta),
        dense_weight=pad_pitch(layer.dense_weight),
        layout="blocked",
    )


def unblock(layer: LinearArguments, in_features: int) -> LinearArguments:
    """Inverse of :func:`block` for a layer of ``in_features`` columns."""
    rows, columns, dense_columns = sum(layer.sparse_sizes), in_features, in_features
    if not layer.output_split:
        rows, columns, dense_columns = layer.out_features, sum(layer.sparse_sizes), sum(layer.dense_sizes)
    return layer._replace(
        sparse_values=layer.sparse_values[:, : columns // 2],
        sparse_meta=unblock_metadata(layer.sparse_meta, rows, columns),
        dense_weight=layer.dense_weight[:, :dense_columns],
        layout="checkpoint",
    )
