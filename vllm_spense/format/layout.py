"""Where the 2:4 region and the dense region of one linear layer lie, and how ranks share them.

A Spense weight ``W [N, K]`` (output x input features) is a 2:4 region S followed by a dense region D:

* ``output`` split: the first ``sparse`` rows are 2:4, the remaining rows dense (gate, up);
* ``input`` split: the first ``sparse`` columns are 2:4, the remaining columns dense (down).

A dense layer is an output split whose 2:4 region is empty. Groups of four always run along the
input dimension. Tensor parallelism slices S and D separately, so a rank's part is again a Spense
layer (its own S, then its own D) and needs no permutation at run time.
(Format: SpenseGPT, arXiv 2606.10445, section 3; the tensor-parallel rule is ours.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

Split = Literal["output", "input"]
Axis = Literal["output", "input"]

GROUP = 4
"""Consecutive input features of which at most two are kept."""
META_GROUP = 8
"""Input features whose metadata shares one byte (two groups): the granularity of S along K."""


@dataclass(frozen=True)
class Layout:
    """Extents of one Spense linear layer (or of one rank's slice of it).

    ``sparse`` counts rows (output split) or columns (input split) of the 2:4 region.
    Raises ``ValueError`` when the extents contradict each other.
    """

    split: Split
    out_features: int
    in_features: int
    sparse: int

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"split must be 'output' or 'input', not {self.split!r}")
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"shape [{self.out_features}, {self.in_features}] must be positive")
        if not 0 <= self.sparse <= self.extent:
            raise ValueError(f"sparse extent {self.sparse} must lie in 0..{self.extent}")
        if self.sparse and self.sparse_shape[1] % META_GROUP:
            raise ValueError(
                f"the 2:4 region has {self.sparse_shape[1]} input features, "
                f"which is no multiple of {META_GROUP}"
            )

    @property
    def extent(self) -> int:
        """Size of the split axis: rows for an output split, columns for an input split."""
        return self.out_features if self.split == "output" else self.in_features

    @property
    def dense(self) -> int:
        """Rows (output split) or columns (input split) of the dense region."""
        return self.extent - self.sparse

    @property
    def split_dim(self) -> int:
        """Dimension of ``W [N, K]`` along which S and D follow each other."""
        return 0 if self.split == "output" else 1

    @property
    def sparse_shape(self) -> tuple[int, int]:
        """Logical [rows, columns] of the 2:4 region."""
        if self.split == "output":
            return self.sparse, self.in_features
        return self.out_features, self.sparse

    @property
    def dense_shape(self) -> tuple[int, int]:
        """[rows, columns] of the dense region."""
        if self.split == "output":
            return self.dense, self.in_features
        return self.out_features, self.dense

    @property
    def without_sparsity(self) -> Layout:
        """A dense layer of the same size, in its one spelling."""
        return Layout("output", self.out_features, self.in_features, 0)

    def shard(self, axis: Axis, size: int) -> Layout:
        """Layout of one of ``size`` equal tensor-parallel slices along ``axis``.

        ``axis`` is what vLLM partitions: ``output`` in column-parallel layers, ``input`` in
        row-parallel ones. Raises ``ValueError`` when a region cannot be cut evenly.
        """
        for what, extent in self._cuts(axis):
            if extent % size:
                raise ValueError(f"{extent} {what} cannot be cut into {size} equal parts")
        n = self.out_features // size if axis == "output" else self.out_features
        k = self.in_features // size if axis == "input" else self.in_features
        sparse = self.sparse // size if axis == self.split else self.sparse
        return replace(self, out_features=n, in_features=k, sparse=sparse)

    def shardable(self, axis: Axis, size: int) -> bool:
        """Whether :meth:`shard` would succeed."""
        try:
            self.shard(axis, size)
        except ValueError:
            return False
        return True

    def _cuts(self, axis: Axis) -> Iterator[tuple[str, int]]:
        features = f"{axis} features"
        if axis == self.split:
            yield f"2:4 {features}", self.sparse
            yield f"dense {features}", self.dense
        else:
            yield features, self.in_features if axis == "input" else self.out_features

    def cut_region(self, tensor: torch.Tensor, axis: Axis, rank: int, size: int) -> torch.Tensor:
        """Rank ``rank``'s part of a region's tensor ``[rows, …]`` with columns in proportion to inputs."""
        return _slice(tensor, 0 if axis == "output" else 1, rank, size)

    def cut_rows(self, tensor: torch.Tensor, axis: Axis, rank: int, size: int) -> torch.Tensor:
        """The same of a tensor ``[N]`` with something per output: replicated along the input axis, and cut
        where the regions of an output split are (then a copy)."""
        if axis == "input" or size == 1:
            return tensor
        if self.split == "input":
            return _slice(tensor, 0, rank, size)
        return torch.cat([_slice(part, 0, rank, size) for part in tensor.split([self.sparse, self.dense])])


def _slice(tensor: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    width = tensor.shape[dim] // size
    return tensor if size == 1 else tensor.narrow(dim, rank * width, width)
