"""Data-free pruning of one dense weight at load time: for trying the speed before calibrating."""

from __future__ import annotations

import torch

from vllm_spense.format.layout import META_GROUP, Layout, Split
from vllm_spense.format.linear import pack_linear
from vllm_spense.format.sparse24 import magnitude_mask


def online_layout(split: Split, out_features: int, in_features: int, dense_ratio: float) -> Layout:
    """The layout that load-time mode gives a layer: the last ``dense_ratio`` of the split axis is dense.

    The 2:4 extent is a multiple of 8; where K itself is none (output split), the layer stays dense.
    """
    extent = out_features if split == "output" else in_features
    sparse = round(extent * (1 - dense_ratio)) // META_GROUP * META_GROUP
    if split == "output" and in_features % META_GROUP:
        sparse = 0
    return Layout(split, out_features, in_features, sparse)


def prune_and_pack(weight: torch.Tensor, layout: Layout, codec: str = "fp8") -> dict[str, torch.Tensor]:
    """Keep the two largest of every group of four in the 2:4 region of ``weight [N, K]``, then pack."""
    if layout.sparse:
        weight = weight.clone()
        rows, cols = layout.sparse_shape
        region = weight[:rows, :cols]
        region.masked_fill_(~magnitude_mask(region.abs().float()), 0)
    return pack_linear(weight, layout, codec=codec)
