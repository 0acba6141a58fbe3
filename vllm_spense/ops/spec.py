"""Static facts of one Spense layer as it lies on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    weight_dtype: torch.dtype

    @property
    def quantize_activations(self) -> bool:
        return self.weight_dtype == torch.float8_e4m3fn

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
        """Bytes of the stored weights in FP8: values and metadata of the 2:4 region, the dense region."""
        (sparse_rows, sparse_columns), (rows, columns) = self.sparse_shape, self.dense_shape
        return sparse_rows * sparse_columns * 5 // 8 + rows * columns

    @property
    def row_extents(self) -> tuple[int, ...]:
        """Rows of y of every region, in any order."""
        return (*self.sparse_sizes, *self.dense_sizes) if self.split == "output" else (self.out_features,)

    @property
    def pitches(self) -> tuple[int, ...]:
        """Bytes per row of each non-empty stored matrix, unpadded."""
        (sparse_rows, sparse_columns), (rows, columns) = self.sparse_shape, self.dense_shape
        sparse = (sparse_columns // 2,) if sparse_rows * sparse_columns else ()
        return sparse + ((columns,) if rows * columns else ())
