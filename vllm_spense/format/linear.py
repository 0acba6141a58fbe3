"""One linear layer in a checkpoint: a layout joined with the codecs of its regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

import torch

from vllm_spense.format.codecs import FP8, Codec, FourBit, RowCodec, Stored, codec
from vllm_spense.format.codecs.base import Tensors, first
from vllm_spense.format.layout import Axis, Layout
from vllm_spense.format.sparse24 import legal_meta_bytes

BIAS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CACHED_BYTES = 1 << 19
"""Looked at in one go on a CPU: stays in the cache."""


@dataclass(frozen=True)
class Codecs:
    """The codecs of a layer's 2:4 region and of its dense region."""

    sparse: Codec
    dense: Codec

    @classmethod
    def of(cls, names: str | Mapping[str, str]) -> Codecs:
        """From what config.json says: one name, or one for each region; ``ValueError`` for unknown ones."""
        if isinstance(names, str):
            return cls(codec(names), codec(names))
        return cls(codec(names["sparse"]), codec(names["dense"]))

    @property
    def single(self) -> Codec | None:
        """The codec of both regions, or None."""
        return self.sparse if self.sparse is self.dense else None

    @property
    def name(self) -> str:
        return self.sparse.name if self.single else f"{self.sparse.name}+{self.dense.name}"

    @property
    def title(self) -> str:
        """What people read."""
        return self.sparse.title if self.single else f"{self.sparse.title} + {self.dense.title}"

    @property
    def activation_dtype(self) -> torch.dtype | None:
        """What the inputs are rounded to, token by token: both regions read the same ones. None: nothing."""
        sparse, dense = self.sparse.activation_dtype, self.dense.activation_dtype
        return sparse if sparse == dense else None


UNIFORM_FP8 = Codecs(FP8, FP8)


@dataclass(frozen=True)
class LinearFormat:
    """What a checkpoint holds of one linear layer.

    With one codec the layer is that codec's. With two, each region is a layer of its own in its codec, and
    the names of its companions get the region in front: ``sparse_weight_scale``, ``dense_weight_scale``.
    """

    layout: Layout
    codecs: Codecs = UNIFORM_FP8
    bias: bool = False

    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its short name, those of empty regions with a size of 0."""
        found: dict[str, Stored] = {}
        for part in self._parts():
            stored = part.codec.tensors(part.layout)
            found |= {part.name(n): s for n, s in stored.items() if part.owns(n)}
        if self.bias:
            found["bias"] = Stored((self.layout.out_features,), BIAS_DTYPES, rows=True)
        return found

    def held(self) -> dict[str, Stored]:
        """Those that files hold."""
        return {name: stored for name, stored in self.tensors().items() if stored.held}

    def nbytes(self) -> int:
        """Bytes in files, without the bias."""
        held = (stored for name, stored in self.held().items() if name != "bias")
        return sum(prod(stored.shape) * stored.dtypes[0].itemsize for stored in held)

    def encode(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        roundings: Sequence[Rounding] = (),
    ) -> Tensors:
        """The tensors that files hold of ``weight [N, K]``, whose 2:4 region already obeys 2:4.

        ``roundings``: the scales are those of :meth:`roundings`, with which the weight was rounded.
        ``ValueError`` for NaN, infinity, another shape and a region that does not obey it.
        """
        if tuple(weight.shape) != (self.layout.out_features, self.layout.in_features):
            raise ValueError(f"weight {tuple(weight.shape)} does not fit {self.layout}")
        grids = {rounding.region: rounding.grid for rounding in roundings}
        tensors: Tensors = {}
        for part in self._parts():
            if isinstance(part.codec, FourBit):
                encoded = part.codec.encode(part.of(weight), part.layout, grids.get(part.region))
            else:
                encoded = part.codec.encode(part.of(weight), part.layout)
            tensors |= {part.name(name): tensor for name, tensor in encoded.items()}
        return tensors if bias is None else tensors | {"bias": bias.contiguous()}

    def roundings(self, weight: torch.Tensor) -> list[Rounding]:
        """How coarse codecs round ``weight [N, K]``, whose 2:4 region obeys 2:4: none for fine ones, whose
        rounding is not worth making up for."""
        found = []
        for part in self._parts():
            if isinstance(part.codec, FourBit):
                grid = part.codec.grid(part.of(weight), part.layout)
                units = part.codec.units(grid, part.layout)
                found.append(Rounding(part.codec, part.region, grid, units, part.where, part.dim))
        return found

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[N, K]`` fp32: the values that kernels compute with, zeros written out."""
        decoded = [part.codec.decode(part.pick(tensors), part.layout) for part in self._parts()]
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded, self.layout.split_dim)

    def values(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stored matrix ``[N, K]``, zeros written out, and the scale of each row ``[N]``, where its codec
        stores values one by one; else :meth:`decode` and None."""
        (part, *more) = self._parts()
        if more or not isinstance(part.codec, RowCodec):
            return self.decode(tensors), None
        return part.codec.values(tensors, self.layout), tensors.get("weight_scale")

    def spelled_out(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """The tensors of the same layer without a 2:4 region; ``ValueError`` where two codecs store it."""
        (part, *more) = self._parts()
        if more:
            raise ValueError(f"regions in {self.codecs.name} have no dense layer with the same values")
        return part.codec.spelled_out(tensors, self.layout)

    def cut(self, name: str, tensor: torch.Tensor, axis: Axis, rank: int, size: int) -> torch.Tensor:
        """Rank ``rank``'s part of a stored tensor (a view wherever one slice is enough)."""
        if name == "bias":
            return self.layout.cut_rows(tensor, axis, rank, size)
        part = self._owner(name)
        return part.codec.cut(part.layout, part.short(name), tensor, axis, rank, size)

    def loaded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A stored tensor, or a part of one, as a server keeps it until all have arrived."""
        if name == "bias":
            return tensor
        part = self._owner(name)
        return part.codec.loaded(part.short(name), tensor)

    def shard(self, axis: Axis, size: int) -> LinearFormat:
        """The layer of one of ``size`` ranks; ``ValueError`` when a region cannot be cut evenly."""
        local = replace(self, layout=self.layout.shard(axis, size))
        if axis == "output" or size == 1:
            return local
        codecs, layout = self.codecs, local.layout
        sparse = layout.sparse_shape[1] // 2 if layout.sparse else 0
        dense = layout.dense_shape[1] if layout.dense else 0
        for what, region, columns in (("2:4", codecs.sparse, sparse), ("dense", codecs.dense, dense)):
            if columns % region.granule:
                raise ValueError(
                    f"a rank would have {columns} {what} values per row, "
                    f"and codec {region.name} parts them by {region.granule}"
                )
        if codecs.single is not None:
            both = codecs.single.parted(gcd(sparse, dense))
            return replace(local, codecs=Codecs(both, both))
        return replace(local, codecs=Codecs(codecs.sparse.parted(sparse), codecs.dense.parted(dense)))

    def shardable(self, axis: Axis, size: int) -> bool:
        """Whether :meth:`shard` would succeed."""
        try:
            self.shard(axis, size)
        except ValueError:
            return False
        return True

    def illegal(self, name: str, tensor: torch.Tensor) -> tuple[int, str] | None:
        """Flat index of the first value that no kernel may see, and what it is; None: all are legal."""
        return illegal_value(name, tensor, self.codecs)

    def _owner(self, name: str) -> _Part:
        return next(p for p in self._parts() if name in map(p.name, filter(p.owns, p.codec.names)))

    def _parts(self) -> list[_Part]:
        if self.codecs.single is not None or not (self.layout.sparse and self.layout.dense):
            owner = self.codecs.sparse if self.layout.sparse else self.codecs.dense
            return [_Part(owner, self.layout, None, slice(None), 0)]
        border, dim = self.layout.sparse, self.layout.split_dim
        rows, columns = self.layout.sparse_shape
        sparse = _Part(
            self.codecs.sparse, Layout("output", rows, columns, rows), "sparse", slice(border), dim
        )
        rows, columns = self.layout.dense_shape
        dense = _Part(
            self.codecs.dense, Layout("output", rows, columns, 0), "dense", slice(border, None), dim
        )
        return [sparse, dense]


@dataclass(frozen=True)
class Rounding:
    """How the weights of a layer, or of one ``region`` of it, are rounded: to what of their ``units``.

    ``grid``: the codec's scales; ``where`` along ``dim`` is the region.
    """

    codec: FourBit
    region: str | None
    grid: Tensors
    units: torch.Tensor
    where: slice
    dim: int

    def column(self, number: int, values: torch.Tensor) -> torch.Tensor:
        """``values [N]`` of column ``number`` of the layer, those of the region rounded."""
        if self.dim:
            start, stop, _ = self.where.indices(number + 1)
            return self._rounded(number - start, values) if start <= number < stop else values
        values = values.clone()
        values[self.where] = self._rounded(number, values[self.where])
        return values

    def _rounded(self, column: int, values: torch.Tensor) -> torch.Tensor:
        units = self.units[:, column]
        return self.codec.rounded(values / units) * units


@dataclass(frozen=True)
class _Part:
    """A layer, or one region of it, that one codec stores."""

    codec: Codec
    layout: Layout
    region: str | None
    where: slice
    dim: int

    def owns(self, short: str) -> bool:
        return self.region is None or short in self.codec.companions or short.startswith(f"{self.region}_")

    def name(self, short: str) -> str:
        return f"{self.region}_{short}" if self.region and short in self.codec.companions else short

    def short(self, name: str) -> str:
        return next(short for short in self.codec.names if self.name(short) == name)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[self.where] if self.dim == 0 else weight[:, self.where]

    def pick(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        names = {short: self.name(short) for short in self.codec.names if self.owns(short)}
        return {short: tensors[name] for short, name in names.items() if name in tensors}


def pack_linear(
    weight: torch.Tensor, layout: Layout, *, codec: str = "fp8", bias: torch.Tensor | None = None
) -> Tensors:
    """:meth:`LinearFormat.encode` with one codec for both regions."""
    return LinearFormat(layout, Codecs.of(codec)).encode(weight, bias)


def illegal_value(name: str, tensor: torch.Tensor, codecs: Codecs) -> tuple[int, str] | None:
    """What is wrong with a tensor of a layer in these codecs, by its short name; nothing with an empty one.

    Runs on any device with one reduction and one host sync per tensor.
    """
    if not tensor.numel():
        return None
    if name == "bias":
        return first(~torch.isfinite(tensor), "NaN or infinity")
    if name == "sparse_meta":
        return _illegal_metadata(tensor)
    region = name.split("_")[0]
    owner = {"sparse": codecs.sparse, "dense": codecs.dense}.get(region)
    if owner is None:  # of a whole layer, which may have the region of one codec alone
        owner = next(codec for codec in (codecs.sparse, codecs.dense) if name in codec.names)
    return owner.illegal(name if name in owner.names else name.removeprefix(f"{region}_"), tensor)


def _illegal_metadata(meta: torch.Tensor) -> tuple[int, str] | None:
    if meta.is_contiguous():
        flat = meta.view(-1)
        # on a CPU in parts that stay in its cache, elsewhere in one reduction with one host sync
        parts = flat.split(_CACHED_BYTES) if meta.device.type == "cpu" else [flat]
        if all(map(_metadata_is_legal, parts)):
            return None
    bad = ~legal_meta_bytes().to(meta.device)[meta.int()]
    return first(bad, "an illegal 2:4 metadata nibble (legal: 4 8 9 C D E)")


def _metadata_is_legal(meta: torch.Tensor) -> bool:
    """Both nibbles of a byte at a time, in a tenth of the time of finding out where one is illegal.

    With x the first and y the second position of a nibble, y + 7 - x has its eighth if and only if x < y, and
    no sum or difference leaves its nibble.
    """
    eights = ((meta >> 2) & 0x33).add_(0x77).sub_(meta & 0x33).bitwise_and_(0x88)
    return int(eights.amin()) == 0x88
