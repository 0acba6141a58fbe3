"""Static facts of one Spense layer as it lies on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_spense.format.codecs import RowCodec
from vllm_spense.format.layout import Layout, Split
from vllm_spense.format.linear import UNIFORM_FP8, Codecs, LinearFormat


@dataclass(frozen=True)
class LinearSpec:
    """One (possibly fused) layer on one rank.

    ``sparse_sizes``/``dense_sizes``: extents per fused shard along the split axis.
    """

    split: str
    out_features: int
    in_features: int
    sparse_sizes: tuple[int, ...]
    dense_sizes: tuple[int, ...]
    codecs: Codecs = UNIFORM_FP8

    @classmethod
    def of(cls, layouts: Sequence[Layout], codecs: Codecs = UNIFORM_FP8) -> LinearSpec:
        """The layer that these modules form when they are fused along their outputs."""
        fused = layouts if layouts[0].split == "output" else layouts[:1]
        return cls(
            split=layouts[0].split,
            out_features=sum(x.out_features for x in layouts),
            in_features=layouts[0].in_features,
            sparse_sizes=tuple(x.sparse for x in fused),
            dense_sizes=tuple(x.dense for x in fused),
            codecs=codecs,
        )

    @property
    def activation_dtype(self) -> torch.dtype | None:
        """What x is rounded to, token by token: what such weights are multiplied with. None: nothing."""
        return self.codecs.activation_dtype

    @property
    def one_by_one(self) -> bool:
        """Whether values are stored one by one, all in one codec: a dtype and the rows' scales tell them."""
        return isinstance(self.codecs.single, RowCodec)

    @property
    def hybrid(self) -> bool:
        """Whether there is a 2:4 region at all."""
        return sum(self.sparse_sizes) > 0

    @property
    def sparse_shape(self) -> tuple[int, int]:
        """Rows and columns of the 2:4 region, all shards together."""
        return self._shape(sum(self.sparse_sizes))

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Rows and columns of the dense region, all shards together."""
        return self._shape(sum(self.dense_sizes))

    def _shape(self, extent: int) -> tuple[int, int]:
        return (extent, self.in_features) if self.split == "output" else (self.out_features, extent)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored weights: values and metadata of the 2:4 region, the dense region; no scales."""
        (sparse_rows, sparse_columns), (rows, columns) = self.sparse_shape, self.dense_shape
        sparse, dense = sparse_rows * sparse_columns, rows * columns
        return sparse // 2 * self.codecs.sparse.bits // 8 + sparse // 8 + dense * self.codecs.dense.bits // 8

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same weights if all of them were dense; no scales."""
        return self.out_features * self.in_features * self.codecs.dense.bits // 8

    @property
    def stored(self) -> LinearFormat:
        """The layer as files would hold it, all shards together."""
        split: Split = "output" if self.split == "output" else "input"
        layout = Layout(split, self.out_features, self.in_features, sum(self.sparse_sizes))
        return LinearFormat(layout, self.codecs)

    @property
    def row_extents(self) -> tuple[int, ...]:
        """Rows of y of every region, in any order."""
        return (*self.sparse_sizes, *self.dense_sizes) if self.split == "output" else (self.out_features,)
