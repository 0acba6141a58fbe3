"""The definition of the linear operators, in plain PyTorch: every kernel is tested against it.

Arithmetic: products of the stored values accumulated in fp32, times the token's scale, times the channel's
scale, plus bias in fp32, rounded once to the output dtype. Products of int8 with int8 are summed exactly and
rounded to fp32 once, so that every kernel gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_spense.format.layout import Layout
from vllm_spense.format.linear import LinearFormat
from vllm_spense.format.sparse24 import decompress
from vllm_spense.ops.linear.arguments import LinearArguments
from vllm_spense.ops.linear.repack import unblock
from vllm_spense.ops.linear.spec import LinearSpec

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_EXACT = 1024
"""Products of int8 with int8 whose sum is below 2^24: fp32 has it exactly."""


def in_output_order(
    sparse: torch.Tensor, dense: torch.Tensor, sparse_rows: list[int], dense_rows: list[int]
) -> torch.Tensor:
    """Rows of a fused output-split layer in vLLM's order: S₀ D₀ S₁ D₁ … (gate first, then up).

    ``sparse [ΣS, …]`` and ``dense [ΣD, …]`` hold each region's rows of all shards one after another.
    """
    pieces = zip(sparse.split(sparse_rows), dense.split(dense_rows), strict=True)
    return torch.cat([part for pair in pieces for part in pair])


def full_weight(layer: LinearArguments) -> torch.Tensor:
    """``[N, K]`` of a layer in the checkpoint's layout: stored values in their own dtype (no scale), zeros
    written out, rows in output order."""
    sparse = decompress(layer.sparse_values, layer.sparse_meta)
    if layer.output_split:
        return in_output_order(sparse, layer.dense_weight, layer.sparse_sizes, layer.dense_sizes)
    return torch.cat([sparse, layer.dense_weight], dim=1)


def decompressed(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """:func:`full_weight` of a layer's checkpoint tensors."""
    return full_weight(LinearArguments.of(spec, tensors))


def decoded(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[N, K]`` fp32 of a layer's checkpoint tensors in any codec: scales applied, zeros written out, in
    output order."""
    if spec.split == "input":
        layout = Layout("input", spec.out_features, spec.in_features, spec.sparse_sizes[0])
        return LinearFormat(layout, spec.codecs).decode(tensors)
    sizes = list(zip(spec.sparse_sizes, spec.dense_sizes, strict=True))
    shards = [
        LinearFormat(Layout("output", sparse + dense, spec.in_features, sparse), spec.codecs)
        for sparse, dense in sizes
    ]
    parts: list[dict[str, torch.Tensor]] = [{} for _ in shards]
    held = [shard.tensors() for shard in shards]
    for name, tensor in tensors.items():
        rows = [names[name].shape[0] if name in names else 0 for names in held]
        for part, names, rows_of_it in zip(parts, held, tensor.split(rows), strict=True):
            if name in names:  # a shard without one region has none of that region's codec
                part[name] = rows_of_it
    return torch.cat([shard.decode(part) for shard, part in zip(shards, parts, strict=True)])


def matmul_scaled(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``y [M, N]`` of ``x [M, K]`` and the decompressed ``weight [N, K]`` fp32 (in -127 … 127 and whole where
    x is int8); ``ValueError`` for an output dtype that is none of ``OUT_DTYPES``."""
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"output dtype {out_dtype} must be one of {OUT_DTYPES}")
    y = _sums_of_int8(x, weight) if x.dtype == torch.int8 else x.float() @ weight.t()
    if x_scale is not None:
        y = y * x_scale
    if weight_scale is not None:
        y = y * weight_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype, copy=False)


def _sums_of_int8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x Wᵀ`` fp32 ``[M, N]`` of whole numbers below 128, each sum rounded once.

    In parts of the columns whose sums an fp32 GEMM has exactly, in any order; fp64 adds them up.
    """
    sums = x.new_zeros((x.shape[0], weight.shape[0]), dtype=torch.float64)
    for part, columns in zip(x.float().split(_EXACT, 1), weight.split(_EXACT, 1), strict=True):
        sums += part @ columns.t()
    return sums.float()


def reference_linear(
    x: torch.Tensor, x_scale: torch.Tensor | None, layer: LinearArguments, out_dtype: torch.dtype
) -> torch.Tensor:
    """What ``spense::linear`` computes; ``ValueError`` for the layout of the CPU kernels, too."""
    if layer.layout == "strips":
        raise ValueError("the definition takes the layouts 'checkpoint' and 'blocked', not 'strips'")
    if layer.layout == "blocked":
        layer = unblock(layer, x.shape[1])
    weight = full_weight(layer).float()
    return matmul_scaled(x, x_scale, weight, layer.weight_scale, layer.bias, out_dtype)
