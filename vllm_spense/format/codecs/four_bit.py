"""4-bit weights: one of 16 values for each, times a scale for 64 of them (bitsandbytes' NF4 and FP4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import gcd

import torch
from torch.nn import functional

from vllm_spense.format.codecs.base import REGIONS, Codec, Stored, Tensors, first, illegal_scale
from vllm_spense.format.layout import META_GROUP, Axis, Layout
from vllm_spense.format.sparse24 import compress, decompress

BLOCK = 64
"""Stored values along a row that share an absmax: in a 2:4 region, what is kept of 128 columns."""
_BYTE = 2
"""Codes in a byte."""
STEPS = 256
"""An absmax is one of so many equal steps up to the row's largest: a power of two, so that it is exact."""
TOPS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""What of a block's largest magnitude may become its absmax: a smaller one clips it and serves the others."""
_TINY = 2.0**-100
"""Keeps quotients finite for rows of denormals."""
_UP = 1 + 2.0**-20
"""What is a whole number of steps but for fp32's rounding stays that number."""
_CHUNK = 1 << 22
"""Weights rounded at a time: bounds the fp32 temporaries."""

VALUES = {"sparse": "sparse_values", "dense": "dense_weight"}
"""What a region's codes are called."""


class FourBit(Codec):
    """Codes of a ``table`` of 16, two per byte, the first in the high half, as bitsandbytes packs them.

    Of each region ``…_absmax [rows, values per row / block]``, the last block of a row may be shorter: fp32,
    or uint8, where ``a`` stands for ``a + 1``; both in units of ``weight_scale [N]`` fp32. A weight is
    ``table[code] · (absmax · weight_scale)``, rounded to fp32 after each product.

    Files of ours have the registered codecs' table and blocks of :data:`BLOCK`. Ranks whose parts begin
    within a block, and other makers' files, need another :meth:`variant`, which config.json cannot name.
    """

    dtype = torch.uint8
    bits = 4
    companions = ("weight_scale",)
    granule = _BYTE
    details = f"a scale per {BLOCK} weights"
    everywhere = False
    table: tuple[float, ...]
    block = BLOCK

    def __init__(self, block: int = BLOCK, table: tuple[float, ...] | None = None) -> None:
        self.block = block
        self.table = _fp32(self.table if table is None else table)
        ranked = sorted(set(self.table))
        self._codes = torch.tensor([self.table.index(value) for value in ranked], dtype=torch.uint8)
        values = torch.tensor(ranked, dtype=torch.float32)
        self._borders = (values[1:] + values[:-1]) / 2
        self._zero = self.table.index(0.0)

    def __reduce__(self) -> tuple:
        return _variant, (type(self), self.block, self.table)

    @classmethod
    def variant(cls, block: int = BLOCK, table: tuple[float, ...] | None = None) -> FourBit:
        """The codec with other blocks or another table of 16 with a zero; the registered one for its own."""
        return _variant(cls, block, _fp32(cls.table if table is None else table))

    def parted(self, values: int) -> FourBit:
        """Blocks that a rank's part begins within are cut into smaller ones with the same absmax."""
        return _variant(type(self), gcd(values, self.block), self.table)

    def cut(
        self, layout: Layout, name: str, tensor: torch.Tensor, axis: Axis, rank: int, size: int
    ) -> torch.Tensor:
        if axis == "input" and size > 1 and name.endswith("_absmax"):
            local = {
                region: n for region, (rows, n) in _stored_shapes(layout.shard(axis, size)).items() if rows
            }
            block = self.parted(gcd(*local.values())).block
            blocks = size * local[name.removesuffix("_absmax")] // block
            tensor = tensor.repeat_interleave(self.block // block, 1)[:, :blocks]
        return super().cut(layout, name, tensor, axis, rank, size)

    @property
    def names(self) -> tuple[str, ...]:
        return (*REGIONS, "sparse_absmax", "dense_absmax", *self.companions)

    def tensors(self, layout: Layout) -> dict[str, Stored]:
        found = {
            "sparse_meta": Stored(
                (layout.sparse_shape[0], layout.sparse_shape[1] // META_GROUP), (torch.uint8,)
            ),
            "weight_scale": Stored((layout.out_features,), (torch.float32,), rows=True),
        }
        for region, (rows, values) in _stored_shapes(layout).items():
            found[VALUES[region]] = Stored((rows, -(-values // 2)), (torch.uint8,))
            found[f"{region}_absmax"] = Stored((rows, -(-values // self.block)), (torch.uint8, torch.float32))
        return found

    # -- weights to codes ------------------------------------------------------------------------

    def grid(self, weight: torch.Tensor, layout: Layout) -> Tensors:
        """The scales that :meth:`encode` gives a finite ``weight [N, K]``: absmax, ``weight_scale``.

        Every block's absmax is that one of :data:`TOPS` times its largest magnitude which gives the least
        squared error, rounded down to a step, so that the largest of the row is exact.
        """
        wanted = {
            region: _by_rows(self._absmax, values) for region, values in _kept(weight, layout)[0].items()
        }
        scales = _scales({region: absmax.amax(1) for region, absmax in wanted.items()}, layout)
        found = {"weight_scale": _joined(scales, layout)}
        for region, absmax in wanted.items():
            steps = (absmax / scales[region][:, None] * _UP).floor_().clamp_(1, STEPS).sub_(1)
            found[f"{region}_absmax"] = steps.to(torch.uint8)
        return found

    def encode(
        self, weight: torch.Tensor, layout: Layout, grid: Mapping[str, torch.Tensor] | None = None
    ) -> Tensors:
        """``grid``: scales to keep, for weights that were rounded with them (:meth:`grid`)."""
        if not torch.isfinite(weight).all():
            raise ValueError("weight holds NaN or infinity")
        tensors = dict(self.grid(weight, layout) if grid is None else grid)
        multiples = _by_rows(self.rounded, weight.float() / self.units(tensors, layout))
        values, meta = _kept(multiples, layout)  # what became zero has no place of its own in a group
        codes = {VALUES[region]: _packed(self._nearest(part), self._zero) for region, part in values.items()}
        return tensors | meta | codes

    def units(self, grid: Mapping[str, torch.Tensor], layout: Layout) -> torch.Tensor:
        """``[N, K]`` fp32: what every weight is a multiple of."""
        scales, parts = _parted(grid["weight_scale"], layout), []
        for region, shape in (("sparse", layout.sparse_shape), ("dense", layout.dense_shape)):
            if all(shape):
                absmax = self._wide(grid[f"{region}_absmax"], scales[region])
                # in a 2:4 region a block is what is kept of twice as many columns
                absmax = absmax.repeat_interleave(2, 1) if region == "sparse" else absmax
                parts.append(_repeated(absmax, self.block, shape[1]))
        return torch.cat(parts, layout.split_dim)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Multiples of a unit as they are stored."""
        return self._looked_up(self._nearest(values))

    def _absmax(self, values: torch.Tensor) -> torch.Tensor:
        """The best absmax of every block of ``values [rows, n]`` fp32: ``[rows, blocks]``."""
        rows, count = values.shape
        padded = functional.pad(values, (0, -count % self.block)).view(rows, -1, self.block)
        largest = padded.abs().amax(2)
        best, least = largest.clone(), torch.full_like(largest, torch.inf)
        for top in TOPS:
            absmax = largest * top
            wide = absmax[..., None].clamp_min(_TINY)
            error = (self.rounded(padded / wide) * wide - padded).square_().sum(2)
            better = error < least  # of equal errors the first: what is on the grid already stays there
            best, least = torch.where(better, absmax, best), torch.where(better, error, least)
        return best

    def _nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Codes of ``values`` between -1 and 1, or beyond."""
        borders, codes = self._borders.to(values.device), self._codes.to(values.device)
        return codes[torch.bucketize(values.contiguous(), borders)]

    # -- codes to weights ------------------------------------------------------------------------

    def decode(self, tensors: Mapping[str, torch.Tensor], layout: Layout) -> torch.Tensor:
        parts = []
        scales = _parted(tensors["weight_scale"], layout)
        for region, (rows, count) in _stored_shapes(layout).items():
            if not (rows and count):
                continue
            absmax = self._wide(tensors[f"{region}_absmax"], scales[region])
            values = self._looked_up(_unpacked(tensors[VALUES[region]], count)) * _repeated(
                absmax, self.block, count
            )
            parts.append(values if region == "dense" else decompress(values, tensors["sparse_meta"]))
        return torch.cat(parts, layout.split_dim)

    def _looked_up(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.table, dtype=torch.float32, device=codes.device)[codes.int()]

    def loaded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return _steps(tensor) if name.endswith("_absmax") else tensor

    @staticmethod
    def _wide(absmax: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """fp32 ``[rows, blocks]`` of what is stored."""
        return _steps(absmax) * scale[:, None]

    def spelled_out(self, tensors: Mapping[str, torch.Tensor], layout: Layout) -> Tensors:
        """``ValueError`` where a block of the dense layer would lie in both regions."""
        if layout.split == "input" and layout.sparse % self.block and layout.dense:
            raise ValueError(
                f"{layout.sparse} columns of the 2:4 region are no multiple of {self.block}: a dense layer "
                "has no block with the scales of two"
            )
        codes, absmax = [], []
        for region, (rows, count) in _stored_shapes(layout).items():
            if not (rows and count):
                continue
            here, scales = _unpacked(tensors[VALUES[region]], count), tensors[f"{region}_absmax"]
            if region == "sparse":  # 0 stands where a zero is written out
                here = decompress(here ^ self._zero, tensors["sparse_meta"]) ^ self._zero
                scales = scales.repeat_interleave(2, 1)[:, : -(-here.shape[1] // self.block)]
            codes.append(here)
            absmax.append(scales)
        if len({part.dtype for part in absmax}) > 1:
            absmax = [_steps(part) for part in absmax]
        return {
            "dense_weight": _packed(torch.cat(codes, layout.split_dim), self._zero),
            "dense_absmax": torch.cat(absmax, layout.split_dim),
            "weight_scale": tensors["weight_scale"],
        }

    def illegal(self, name: str, tensor: torch.Tensor) -> tuple[int, str] | None:
        if name == "weight_scale":
            return illegal_scale(tensor)
        if name.endswith("_absmax") and tensor.dtype == torch.float32:
            return first(~torch.isfinite(tensor), "an absmax that is not finite")
        return None  # every byte is two codes


class Nf4(FourBit):
    """Quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E), as bitsandbytes has them."""

    name = "nf4"
    title = "NF4"
    table = (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )


class Fp4(FourBit):
    """bitsandbytes' FP4: a sign, two bits of exponent and one of mantissa, over its largest, 12."""

    name = "fp4"
    title = "FP4"
    table = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))


def _fp32(table: tuple[float, ...]) -> tuple[float, ...]:
    """The values as files hold them, by which variants are known."""
    return tuple(torch.tensor(table, dtype=torch.float32).tolist())


def _steps(absmax: torch.Tensor) -> torch.Tensor:
    """fp32, in units of the row's scale."""
    return absmax.float() + 1 if absmax.dtype == torch.uint8 else absmax


def _stored_shapes(layout: Layout) -> dict[str, tuple[int, int]]:
    """Rows and values per row of each region."""
    rows, columns = layout.sparse_shape
    return {"sparse": (rows, columns // 2), "dense": layout.dense_shape}


def _kept(weight: torch.Tensor, layout: Layout) -> tuple[Tensors, Tensors]:
    """Each region's values as they are stored, and the metadata of the 2:4 region."""
    sparse, dense = weight.float().split([layout.sparse, layout.dense], layout.split_dim)
    values: Tensors = {}
    meta: Tensors = {}
    if layout.sparse:
        values["sparse"], meta["sparse_meta"] = compress(sparse)
    if layout.dense:
        values["dense"] = dense
    return values, meta


def _scales(largest: Mapping[str, torch.Tensor], layout: Layout) -> Tensors:
    """The step of each region's rows; one for both where a row lies in both (input split)."""
    if layout.split == "input" and len(largest) == 2:
        largest = dict.fromkeys(largest, torch.maximum(*largest.values()))
    return {
        region: torch.where(part > 0, (part / STEPS).clamp_min(_TINY), 1.0)
        for region, part in largest.items()
    }


def _joined(scales: Mapping[str, torch.Tensor], layout: Layout) -> torch.Tensor:
    """``[N]``: of an output split one region's rows behind the other's."""
    parts = list(scales.values())
    return torch.cat(parts) if layout.split == "output" else parts[0]


def _parted(scale: torch.Tensor, layout: Layout) -> Tensors:
    """Inverse of :func:`_joined`."""
    if layout.split == "input":
        return {"sparse": scale, "dense": scale}
    return dict(zip(("sparse", "dense"), scale.split([layout.sparse, layout.dense]), strict=True))


def _repeated(absmax: torch.Tensor, block: int, count: int) -> torch.Tensor:
    """``[rows, count]``: what every value is multiplied with."""
    return absmax.repeat_interleave(block, 1)[:, :count]


def _by_rows(run: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """``run`` of some rows at a time, for its temporaries are large."""
    return torch.cat([run(part) for part in values.split(max(1, _CHUNK // max(1, values.shape[1])))])


def _packed(codes: torch.Tensor, zero: int) -> torch.Tensor:
    """``[rows, n]`` codes in ``[rows, n / 2]`` bytes; an odd row ends with ``zero``."""
    even = functional.pad(codes, (0, codes.shape[1] % 2), value=zero)
    return even[:, ::2] << 4 | even[:, 1::2]


def _unpacked(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Inverse of :func:`_packed`."""
    return torch.stack((packed >> 4, packed & 15), 2).flatten(1)[:, :count]


@cache
def _variant(kind: type[FourBit], block: int, table: tuple[float, ...]) -> FourBit:
    from vllm_spense.format.codecs import codec

    registered = codec(kind.name)
    assert isinstance(registered, FourBit)
    same = (block, table) == (registered.block, registered.table)
    return registered if same else kind(block, table)
