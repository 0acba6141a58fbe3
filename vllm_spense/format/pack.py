"""One linear layer <-> its checkpoint tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_spense.format.fp8 import FP8_DTYPE, quantize_per_channel
from vllm_spense.format.layout import Layout
from vllm_spense.format.sparse24 import compress, decompress


def pack_linear(
    weight: torch.Tensor,
    layout: Layout,
    *,
    weight_dtype: torch.dtype = FP8_DTYPE,
    bias: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Quantise and compress ``weight [N, K]``, whose 2:4 region already obeys 2:4.

    Returns the tensors of :class:`Layout` by name (empty regions left out). The scale of a row covers
    both regions of an input split, so that one accumulator holds the whole row.
    """
    if tuple(weight.shape) != (layout.out_features, layout.in_features):
        raise ValueError(f"weight {tuple(weight.shape)} does not fit {layout}")
    tensors: dict[str, torch.Tensor] = {}
    if weight_dtype == FP8_DTYPE:
        stored, tensors["weight_scale"] = quantize_per_channel(weight)
    else:
        stored = weight.to(weight_dtype)
        if not torch.isfinite(stored).all():  # after rounding: a large fp32 value overflows bf16
            raise ValueError("weight holds NaN or infinity")
        stored = torch.where(stored == 0, torch.zeros_like(stored), stored)
    dim = 0 if layout.split == "output" else 1
    # Cut bytes, not floats: not every torch build can slice and copy every fp8 dtype on every device.
    sparse, dense = stored.split([layout.sparse, layout.dense], dim)
    if layout.sparse:
        tensors["sparse_values"], tensors["sparse_meta"] = compress(sparse)
    if layout.dense:
        tensors["dense_weight"] = dense.contiguous()
    if bias is not None:
        tensors["bias"] = bias.contiguous()
    return tensors


def unpack_linear(tensors: Mapping[str, torch.Tensor], layout: Layout) -> torch.Tensor:
    """The stored matrix ``[N, K]`` with zeros written out, in the stored dtype (scale not applied)."""
    parts = []
    if layout.sparse:
        parts.append(decompress(tensors["sparse_values"], tensors["sparse_meta"]))
    if layout.dense:
        parts.append(tensors["dense_weight"])
    if len(parts) == 1:
        return parts[0]
    dim = 0 if layout.split == "output" else 1
    bits = torch.uint8 if parts[0].element_size() == 1 else parts[0].dtype
    return torch.cat([p.view(bits) for p in parts], dim).view(parts[0].dtype)
