"""The Spense linear operators and their definition in plain PyTorch.

``spense::linear`` computes on the compressed tensors of one (possibly fused) layer; its plain version here is
the definition that every kernel is tested against. ``spense::dense_linear`` is the same arithmetic on a
matrix that was decompressed once at load: for CPUs that our kernels do not know (``cpu-fp32``).

Arithmetic (both): products of the stored values accumulated in fp32, times the token's scale, times
the channel's scale, plus bias in fp32, rounded once to the output dtype.
"""

from __future__ import annotations

import torch

from vllm_spense.format.sparse24 import decompress
from vllm_spense.ops.repack import unblock_metadata

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interleave(
    sparse: torch.Tensor, dense: torch.Tensor, sparse_rows: list[int], dense_rows: list[int]
) -> torch.Tensor:
    """Rows of a fused output-split layer in vLLM's order: S₀ D₀ S₁ D₁ … (gate first, then up).

    ``sparse [ΣS, …]`` and ``dense [ΣD, …]`` hold each region's rows of all shards one after another.
    """
    pieces = zip(sparse.split(sparse_rows), dense.split(dense_rows), strict=True)
    return torch.cat([part for pair in pieces for part in pair])


def full_weight(
    sparse_values: torch.Tensor,
    sparse_meta: torch.Tensor,
    dense_weight: torch.Tensor,
    sparse_sizes: list[int],
    dense_sizes: list[int],
    output_split: bool,
) -> torch.Tensor:
    """``[N, K]``: the stored values in their own dtype (no scale) with zeros written out, in output order.

    Output split: sizes are the rows of each fused shard. Input split: one size each, the columns.
    """
    sparse = decompress(sparse_values, sparse_meta)
    if output_split:
        return interleave(sparse, dense_weight, sparse_sizes, dense_sizes)
    return torch.cat([sparse, dense_weight], dim=1)


def _matmul_scaled(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"output dtype {out_dtype} must be one of {OUT_DTYPES}")
    y = x.float() @ weight.t()
    if x_scale is not None:
        y = y * x_scale
    if weight_scale is not None:
        y = y * weight_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype, copy=False)


def reference_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    sparse_values: torch.Tensor,
    sparse_meta: torch.Tensor,
    dense_weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    sparse_sizes: list[int],
    dense_sizes: list[int],
    output_split: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The definition of :func:`linear`, in plain PyTorch."""
    if sparse_meta.dim() == 3:
        rows, columns, dense_columns = sum(sparse_sizes), x.shape[1], x.shape[1]
        if not output_split:
            rows, columns, dense_columns = dense_weight.shape[0], sum(sparse_sizes), sum(dense_sizes)
        dense_weight = dense_weight[:, :dense_columns]
        sparse_values = sparse_values[:, : columns // 2]
        sparse_meta = unblock_metadata(sparse_meta, rows, columns)
    weight = full_weight(sparse_values, sparse_meta, dense_weight, sparse_sizes, dense_sizes, output_split)
    return _matmul_scaled(x, x_scale, weight.float(), weight_scale, bias, out_dtype)


@torch.library.custom_op("spense::linear", mutates_args=(), device_types="cpu")
def linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    sparse_values: torch.Tensor,
    sparse_meta: torch.Tensor,
    dense_weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    sparse_sizes: list[int],
    dense_sizes: list[int],
    output_split: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``y [M, N] = x Wᵀ`` for a Spense weight (SpenseGPT, arXiv 2606.10445, section 3).

    ``x [M, K]``: e4m3 with ``x_scale [M, 1]`` fp32, or float without a scale. Weight tensors as in
    :class:`vllm_spense.format.Layout`, or in the kernels' layout (``ops/repack.py``: metadata with three
    dimensions, padded rows); ``weight_scale``, ``bias``: ``[N]`` in output order;
    ``sparse_sizes``/``dense_sizes``: extents per fused shard (output split) or one each (input split).
    Empty regions are tensors with a size of 0. Raises ``ValueError`` for other output dtypes.
    ``ops/cuda_linear.py`` registers the CUDA implementation.
    """
    return reference_linear(
        *(x, x_scale, sparse_values, sparse_meta, dense_weight, weight_scale, bias),
        *(sparse_sizes, dense_sizes, output_split, out_dtype),
    )


@linear.register_fake
def _(
    x,
    x_scale,
    sparse_values,
    sparse_meta,
    dense_weight,
    weight_scale,
    bias,
    sparse_sizes,
    dense_sizes,
    output_split,
    out_dtype,
):
    rows = sum(sparse_sizes) + sum(dense_sizes) if output_split else dense_weight.shape[0]
    return x.new_empty((x.shape[0], rows), dtype=out_dtype)


@torch.library.custom_op("spense::dense_linear", mutates_args=(), device_types=("cpu", "cuda"))
def dense_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``y [M, N] = x Wᵀ`` on the decompressed matrix ``weight [N, K]`` fp32 (stored values, no scale).

    Same arithmetic and the same arguments as :func:`linear`.
    """
    return _matmul_scaled(x, x_scale, weight, weight_scale, bias, out_dtype)


@dense_linear.register_fake
def _(x, x_scale, weight, weight_scale, bias, out_dtype):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
