"""What a codec is: how the values of a linear layer are stored, whatever its regions are.

A layout says where the 2:4 region and the dense region lie; a codec says which tensors hold their values, of
which shapes and dtypes, how a weight becomes them and is read from them, how ranks share them and which
values are illegal. Adding one: a class here or elsewhere, and :func:`~vllm_spense.format.codecs.register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_spense.format.layout import META_GROUP, Axis, Layout
from vllm_spense.format.sparse24 import compress, decompress

Tensors = dict[str, torch.Tensor]
REGIONS = ("sparse_values", "sparse_meta", "dense_weight")
"""What every codec has: kept values of the 2:4 region, their positions, values of the dense region."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a layer in a file: its shape (a size of 0: its region is empty), and legal dtypes, of
    which the first is written and the last loaded. ``rows``: it holds something per row of the layer instead
    of a region's part.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    rows: bool = False

    @property
    def held(self) -> bool:
        """Whether files hold it: an empty region has no tensors."""
        return all(self.shape)


class Codec(ABC):
    """One way to store values; stateless, known by its name in config.json.

    ``title`` is what people read, ``details`` more of it in a model card.
    ``dtype``: of the stored values, the dtype of ``sparse_values`` and ``dense_weight``. ``bits`` per value.
    ``companions``: names of the tensors beside these. ``granule``: stored values along a row that cannot be
    parted. ``activation_dtype``: what a kernel for this codec rounds its inputs to, token by token; None: it
    takes them as they are. ``everywhere``: linear layers outside of the MLPs are stored in it, too, not only
    those that are pruned.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    details: ClassVar[str] = ""
    dtype: ClassVar[torch.dtype]
    bits: ClassVar[int]
    companions: ClassVar[tuple[str, ...]] = ()
    granule: int = 1
    activation_dtype: ClassVar[torch.dtype | None] = None
    everywhere: ClassVar[bool] = True

    def __repr__(self) -> str:
        return f"<codec {self.name}>"

    def __reduce__(self) -> tuple:
        from vllm_spense.format.codecs import codec

        return codec, (self.name,)  # there is one of each: they are compared by identity

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of a layer but its bias."""
        return (*REGIONS, *self.companions)

    @abstractmethod
    def tensors(self, layout: Layout) -> dict[str, Stored]:
        """All of :attr:`names`, those of empty regions with a size of 0."""

    @abstractmethod
    def encode(self, weight: torch.Tensor, layout: Layout) -> Tensors:
        """The tensors that files hold of ``weight [N, K]``, whose 2:4 region obeys 2:4 already.

        ``ValueError`` for NaN, infinity (after rounding, too) and a region that does not obey it.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, torch.Tensor], layout: Layout) -> torch.Tensor:
        """``[N, K]`` fp32: the values that kernels compute with, zeros written out."""

    @abstractmethod
    def spelled_out(self, tensors: Mapping[str, torch.Tensor], layout: Layout) -> Tensors:
        """The tensors of the same layer without a 2:4 region: the same values, zeros among them."""

    @abstractmethod
    def illegal(self, name: str, tensor: torch.Tensor) -> tuple[int, str] | None:
        """Flat index of the first value of a tensor (not the metadata) that is illegal, and what it is."""

    def parted(self, values: int) -> Codec:
        """What ranks hold whose rows have so many stored values, or multiples of them."""
        return self

    def loaded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A stored tensor in the last of its legal dtypes, which a server keeps."""
        return tensor

    def cut(
        self, layout: Layout, name: str, tensor: torch.Tensor, axis: Axis, rank: int, size: int
    ) -> torch.Tensor:
        """Rank ``rank``'s part of a stored tensor (a view wherever one slice is enough)."""
        if self.tensors(layout)[name].rows:
            return layout.cut_rows(tensor, axis, rank, size)
        return layout.cut_region(tensor, axis, rank, size)


class RowCodec(Codec):
    """Values stored one by one, with one fp32 scale per row or none: FP8, bf16, integers.

    The scale of a row covers both regions of an input split, so that one accumulator holds the whole row.
    A subclass with scales names ``weight_scale`` among its companions.
    """

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``weight [N, K]`` as stored: values ``[N, K]`` in :attr:`dtype`, without negative zeros, and the
        scale of each row ``[N]`` fp32 or None; ``ValueError`` for NaN or infinity."""

    @abstractmethod
    def illegal_values(self, values: torch.Tensor) -> tuple[torch.Tensor, str] | None:
        """Which stored values no kernel may see, as a mask, and what they are; None: all are legal."""

    @property
    def scaled(self) -> bool:
        return "weight_scale" in self.companions

    def tensors(self, layout: Layout) -> dict[str, Stored]:
        rows, columns = layout.sparse_shape
        found = {
            "sparse_values": Stored((rows, columns // 2), (self.dtype,)),
            "sparse_meta": Stored((rows, columns // META_GROUP), (torch.uint8,)),
            "dense_weight": Stored(layout.dense_shape, (self.dtype,)),
        }
        if self.scaled:
            found["weight_scale"] = Stored((layout.out_features,), (torch.float32,), rows=True)
        return found

    def encode(self, weight: torch.Tensor, layout: Layout) -> Tensors:
        tensors: Tensors = {}
        stored, scale = self.quantize(weight)
        if scale is not None:
            tensors["weight_scale"] = scale
        # Cut bytes, not floats: not every torch build can slice and copy every fp8 dtype on every device.
        sparse, dense = stored.split([layout.sparse, layout.dense], layout.split_dim)
        if layout.sparse:
            tensors["sparse_values"], tensors["sparse_meta"] = compress(sparse)
        if layout.dense:
            tensors["dense_weight"] = dense.contiguous()
        return tensors

    def values(self, tensors: Mapping[str, torch.Tensor], layout: Layout) -> torch.Tensor:
        """The stored matrix ``[N, K]`` with zeros written out, in the stored dtype (scale not applied)."""
        parts = []
        if layout.sparse:
            parts.append(decompress(tensors["sparse_values"], tensors["sparse_meta"]))
        if layout.dense:
            parts.append(tensors["dense_weight"])
        if len(parts) == 1:
            return parts[0]
        bits = torch.uint8 if parts[0].element_size() == 1 else parts[0].dtype
        return torch.cat([p.view(bits) for p in parts], layout.split_dim).view(parts[0].dtype)

    def decode(self, tensors: Mapping[str, torch.Tensor], layout: Layout) -> torch.Tensor:
        return dequantize(self.values(tensors, layout), tensors.get("weight_scale"))

    def spelled_out(self, tensors: Mapping[str, torch.Tensor], layout: Layout) -> Tensors:
        return {"dense_weight": self.values(tensors, layout)} | {n: tensors[n] for n in self.companions}

    def illegal(self, name: str, tensor: torch.Tensor) -> tuple[int, str] | None:
        if name == "weight_scale":
            return illegal_scale(tensor)
        found = self.illegal_values(tensor)
        return None if found is None else first(*found)


def dequantize(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """fp32 ``[N, K]``: the stored weight times its row's scale (None: weight is unscaled)."""
    wide = weight.float()
    return wide if scale is None else wide * scale[:, None]


def illegal_scale(scale: torch.Tensor) -> tuple[int, str] | None:
    """:meth:`Codec.illegal` of a tensor of scales."""
    return first(~(torch.isfinite(scale) & (scale > 0)), "a scale that is not finite and positive")


def first(bad: torch.Tensor, what: str) -> tuple[int, str] | None:
    """Flat index of the first True of a mask, with ``what`` stands there; None where there is none."""
    flat = bad.flatten()
    if not bool(flat.any()):
        return None
    return int(flat.to(torch.uint8).argmax()), what
