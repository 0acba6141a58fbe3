"""The fp32 matrix of an FP8 layer on a CPU, computed in parts that stay in its cache.

What :func:`vllm_spense.ops.linear.full_weight` gives in fp32, in a third of the time: there is no index and
no matrix besides the result, and nothing is converted one value at a time.
"""

from __future__ import annotations

import torch

from vllm_spense.format.sparse24 import decompress

_PART = 1 << 19
"""Weights of one part: 2 MiB of fp32."""
_SIGN_EXPONENT_MANTISSA = 0x87F00000 - (1 << 32)
"""Bits of an fp32 that hold those of an e4m3 whose byte was sign-extended and shifted left by 20."""
_REBIAS = 2.0**120
"""From the exponent's bias of fp32 (127) to that of e4m3 (7); exact for subnormals, too."""


def widened_weight(
    sparse_values: torch.Tensor,
    sparse_meta: torch.Tensor,
    dense_weight: torch.Tensor,
    sparse_sizes: list[int],
    dense_sizes: list[int],
    output_split: bool,
) -> torch.Tensor:
    """fp32 ``[N, K]``, ``full_weight`` of e4m3 without NaN (loading has checked that)."""
    if not output_split:
        columns = sum(sparse_sizes)
        out = torch.empty(dense_weight.shape[0], columns + dense_weight.shape[1], dtype=torch.float32)
        _widen_sparse(sparse_values, sparse_meta, out[:, :columns])
        _widen_dense(dense_weight, out[:, columns:])
        return out
    out = torch.empty(len(sparse_values) + len(dense_weight), dense_weight.shape[1], dtype=torch.float32)
    rows = out.split([size for pair in zip(sparse_sizes, dense_sizes, strict=True) for size in pair])
    values, metas = sparse_values.split(sparse_sizes), sparse_meta.split(sparse_sizes)
    for value, meta, target in zip(values, metas, rows[0::2], strict=True):
        _widen_sparse(value, meta, target)
    for dense, target in zip(dense_weight.split(dense_sizes), rows[1::2], strict=True):
        _widen_dense(dense, target)
    return out


def _rows(out: torch.Tensor) -> int:
    return max(1, _PART // max(1, out.shape[1]))


def _widen_dense(e4m3: torch.Tensor, out: torch.Tensor) -> None:
    for source, target in zip(e4m3.split(_rows(out)), out.split(_rows(out)), strict=True):
        _widen(source, target)


def _widen_sparse(values: torch.Tensor, meta: torch.Tensor, out: torch.Tensor) -> None:
    parts = (tensor.split(_rows(out)) for tensor in (values, meta, out))
    for value, nibbles, target in zip(*parts, strict=True):
        _widen(decompress(value, nibbles), target)


def _widen(e4m3: torch.Tensor, out: torch.Tensor) -> None:
    bits = out.view(torch.int32)
    bits.copy_(e4m3.view(torch.int8))
    bits <<= 20
    bits &= _SIGN_EXPONENT_MANTISSA
    out *= _REBIAS
