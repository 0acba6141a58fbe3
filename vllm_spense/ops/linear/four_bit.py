"""Layers stored in 4 bits, as the GPU back ends get them: codes and metadata as they are on disk, and the
scales of the rows multiplied into those of the blocks, which is the definition's own first product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from vllm_spense.format.codecs import FP8, Codec, FourBit
from vllm_spense.format.linear import Codecs
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.arguments import PACKED
from vllm_spense.ops.linear.spec import LinearSpec

TABLE = 16
"""Values that a code stands for."""
WHOLE_ROW = 1 << 30
"""The block of a region in FP8: all of a row, however long, has one scale."""


class FourBitLayer(NamedTuple):
    """One (possibly fused) layer: its tensors and what they mean.

    ``…_values``, ``…_weight``: two codes per byte, or e4m3 in the dense region; ``…_absmax [rows, blocks]``
    fp32; ``tables [2, 16]`` fp32: what codes of the 2:4 and of the dense region stand for; ``blocks``: stored
    values of each that share an absmax; ``zero``: the code of 0 in the 2:4 region.
    """

    sparse_values: torch.Tensor
    sparse_meta: torch.Tensor
    sparse_absmax: torch.Tensor
    dense_weight: torch.Tensor
    dense_absmax: torch.Tensor
    tables: torch.Tensor
    bias: torch.Tensor | None
    sparse_sizes: list[int]
    dense_sizes: list[int]
    output_split: bool
    blocks: list[int]
    zero: int

    @classmethod
    def of(
        cls, spec: LinearSpec, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None = None
    ) -> FourBitLayer:
        """From what :func:`prepared` gives."""
        sparse, dense = owners(spec)
        weights = [tensors[name] for name in NAMES]
        sizes = list(spec.sparse_sizes), list(spec.dense_sizes)
        blocks = [_block(sparse), _block(dense)]
        return cls.unflat(weights, bias, *sizes, spec.split == "output", blocks, _table(sparse).index(0.0))

    def flat(self) -> tuple[Any, ...]:
        """The arguments of ``SCHEMA``."""
        return list(self[: len(NAMES)]), *self[len(NAMES) :]

    @classmethod
    def unflat(cls, weights: list[torch.Tensor], *rest: Any) -> FourBitLayer:
        """Inverse of :meth:`flat`."""
        return cls._make((*weights, *rest))

    @property
    def out_features(self) -> int:
        if self.output_split:
            return sum(self.sparse_sizes) + sum(self.dense_sizes)
        return self.dense_weight.shape[0]


NAMES = ("sparse_values", "sparse_meta", "sparse_absmax", PACKED, "dense_absmax", "tables")
"""Tensors of a prepared layer."""
SCHEMA = (
    "Tensor[] weights, Tensor? bias, SymInt[] sparse_sizes, SymInt[] dense_sizes, bool output_split, "
    "SymInt[] blocks, SymInt zero"
)
"""What :meth:`FourBitLayer.flat` gives, in the language of operator schemas."""


def owners(spec: LinearSpec) -> tuple[Codec, Codec]:
    """Codecs of the 2:4 and of the dense region; an empty one has the other's."""
    codecs = spec.codecs
    sparse = codecs.sparse if sum(spec.sparse_sizes) else codecs.dense
    return sparse, codecs.dense if sum(spec.dense_sizes) else sparse


def why_not(spec: LinearSpec) -> str | None:
    """None for layers that :func:`prepared` takes: 4 bits, where the dense region may be in FP8 instead."""
    sparse, dense = owners(spec)
    if not isinstance(sparse, FourBit) or not (isinstance(dense, FourBit) or dense is FP8):
        return f"the kernels take weights in 4 bits, not {Codecs(sparse, dense).title}"
    for block in (_block(sparse), _block(dense)):
        if block < 2 or block & (block - 1):
            return f"blocks of {block} values are no power of two"
    return None


def prepared(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors of :class:`FourBitLayer` by name."""
    sparse, dense = owners(spec)
    of_sparse, of_dense = _row_scales(spec, tensors)
    device = tensors["dense_weight"].device
    of_blocks = of_dense[:, None] if dense is FP8 else _scaled(tensors["dense_absmax"], of_dense)
    return {
        "sparse_values": tensors["sparse_values"].contiguous(),
        "sparse_meta": tensors["sparse_meta"].contiguous(),
        "sparse_absmax": _scaled(tensors["sparse_absmax"], of_sparse),
        PACKED: tensors["dense_weight"].contiguous(),
        "dense_absmax": of_blocks.contiguous(),
        "tables": torch.tensor([_table(sparse), _table(dense)], dtype=torch.float32, device=device),
    }


def _block(codec: Codec) -> int:
    return codec.block if isinstance(codec, FourBit) else WHOLE_ROW


def _table(codec: Codec) -> tuple[float, ...]:
    return codec.table if isinstance(codec, FourBit) else (0.0,) * TABLE


def _row_scales(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows of each region, those of all shards one after another."""
    if "dense_weight_scale" in tensors:
        return tensors["sparse_weight_scale"], tensors["dense_weight_scale"]
    scale = tensors["weight_scale"]
    if spec.split == "input":
        return scale, scale
    sizes = [size for pair in zip(spec.sparse_sizes, spec.dense_sizes, strict=True) for size in pair]
    parts = scale.split(sizes)
    return torch.cat(parts[::2]), torch.cat(parts[1::2])


def _scaled(absmax: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32, whatever is stored."""
    steps = absmax.float() + 1 if absmax.dtype == torch.uint8 else absmax
    return steps * scale[:, None]
