"""CPUs: compiled kernels on weights in 4 bits, and on FP8 regions beside them.

``spense::four_bit_linear_cpu`` (``kernels/``, x86-64) looks codes up in registers. Activations are not
quantised. All of a layer's weights are one tensor of bytes in the order in which they are read: strips of 16
output rows, of each first the region in FP8, if there is one, and every block of values behind its scales.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from math import gcd
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from vllm_spense.format.codecs import FP8, Codec, FourBit
from vllm_spense.format.sparse24 import META_GROUP
from vllm_spense.ops import extension
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear import cpu
from vllm_spense.ops.linear.arguments import PACKED
from vllm_spense.ops.linear.cpu import ISAS, STRIP
from vllm_spense.ops.linear.spec import LinearSpec

_LARGEST, _SMALLEST = 64, 16
"""Stored values that have a scale in the kernels' layout, at most and at least."""
_SCALES = 64
"""Bytes of a scale for each row of a strip."""
_REGIONS = ("sparse", "dense")


class FourBitCpuBackend:
    """Codes stay packed in memory and are looked up in registers.

    With dot products of bf16, x in bf16: weights are rounded to bf16 once. Else fp32.
    """

    name = "cpu-4bit"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on CPUs, not on {device.type}"
        if not any(isinstance(codec, FourBit) for codec, _ in _stored(spec)):
            return f"the kernels take weights in 4 bits, not {spec.codecs.title}"
        codecs = [codec for codec, shape in _stored(spec) if all(shape)]
        for codec in codecs:
            if isinstance(codec, FourBit) and _block(codec) < _SMALLEST:
                return f"the kernels take blocks of multiples of {_SMALLEST} values, not of {codec.block}"
            if not isinstance(codec, FourBit) and codec is not FP8:
                return f"beside 4 bits the kernels take FP8, not {codec.title}"
        return why_not_here()

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        pieces = list(_pieces(spec))
        packed = torch.empty(sum(piece.nbytes for piece in pieces), dtype=torch.uint8)
        cpu.ask_for_huge_pages(packed)
        used = dict.fromkeys(_REGIONS, 0)
        parts = packed.split([piece.nbytes for piece in pieces])
        for piece, memory in zip(pieces, parts, strict=True):
            strips, ahead = memory.view(piece.strips, -1), 0
            for region in piece.regions:
                first, width = used[region.name], region.strip_bytes
                rows = slice(first, first + piece.rows)
                _pack(region, _given(spec, tensors, region.name, rows), strips[:, ahead : ahead + width])
                used[region.name] += piece.rows
                ahead += width
        tables = [codec.table if isinstance(codec, FourBit) else (0.0,) * 16 for codec, _ in _stored(spec)]
        return {PACKED: packed, "table": torch.tensor(tables, dtype=torch.float32)}

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        layer = arguments(spec, tensors, bias)
        return torch.ops.spense.four_bit_linear_cpu(x.contiguous(), *layer)


@functools.cache
def why_not_here() -> str | None:
    """None when this CPU runs the kernels, else the reason in one line; the operator exists afterwards."""
    reason = extension.why_not_loaded_cpu()
    if reason is not None:
        return reason
    torch.library.register_fake("spense::four_bit_linear_cpu", _fake)
    return None if isas() else "the CPU kernels need AVX2 and FMA"


def isas() -> tuple[str, ...]:
    """Those of ``ISAS`` that this CPU has and that have kernels, the best last."""
    if extension.why_not_loaded_cpu() is not None:
        return ()
    here = torch.ops.spense.four_bit_isas_cpu()
    return tuple(name for i, name in enumerate(ISAS) if here >> i & 1)


def arguments(
    spec: LinearSpec, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None = None
) -> tuple[Any, ...]:
    """What the operator takes behind x, but for the instruction set."""
    blocks = [_block(codec) for codec, _ in _stored(spec)]
    sizes = list(spec.sparse_sizes), list(spec.dense_sizes), spec.split == "output"
    return tensors[PACKED], tensors["table"], bias, spec.out_features, *sizes, *blocks


class Region(NamedTuple):
    """What a strip has of one region: columns of x, and how they are stored."""

    name: str
    codec: Codec
    columns: int

    @property
    def strip_bytes(self) -> int:
        sparse = self.name == "sparse"
        if not isinstance(self.codec, FourBit):
            columns = self.columns + -self.columns % STRIP
            return _SCALES + STRIP * (columns // 2 + columns // 8 if sparse else columns)
        block = _block(self.codec)
        codes = STRIP * block // 2
        blocks = -(-(self.columns // 2 if sparse else self.columns) // block)
        return blocks * (_SCALES + codes + (codes // 2 if sparse else 0))


class Piece(NamedTuple):
    """Consecutive outputs whose weights lie in the same regions."""

    rows: int
    regions: list[Region]

    @property
    def strips(self) -> int:
        return -(-self.rows // STRIP)

    @property
    def nbytes(self) -> int:
        return self.strips * sum(region.strip_bytes for region in self.regions)


def _pieces(spec: LinearSpec) -> Iterator[Piece]:
    codecs = (spec.codecs.sparse, spec.codecs.dense)
    if spec.split == "input":
        columns = (spec.sparse_sizes[0], spec.dense_sizes[0])
        found = [Region(*region) for region in zip(_REGIONS, codecs, columns, strict=True) if region[2]]
        yield Piece(spec.out_features, sorted(found, key=lambda region: isinstance(region.codec, FourBit)))
        return
    for sizes in zip(spec.sparse_sizes, spec.dense_sizes, strict=True):
        for name, codec, rows in zip(_REGIONS, codecs, sizes, strict=True):
            if rows:
                yield Piece(rows, [Region(name, codec, spec.in_features)])


def _stored(spec: LinearSpec) -> list[tuple[Codec, tuple[int, int]]]:
    """Codec and extent of the 2:4 region, and of the dense one."""
    return [(spec.codecs.sparse, spec.sparse_shape), (spec.codecs.dense, spec.dense_shape)]


def _block(codec: Codec) -> int:
    """Values that share a scale in the kernels' layout; 0 for FP8."""
    return gcd(codec.block, _LARGEST) if isinstance(codec, FourBit) else 0


def _given(
    spec: LinearSpec, tensors: Mapping[str, torch.Tensor], region: str, rows: slice
) -> tuple[torch.Tensor, ...]:
    """Of some rows of a region: stored values, metadata (or nothing), absmax (or nothing) and scale."""
    values = "sparse_values" if region == "sparse" else "dense_weight"
    meta = tensors["sparse_meta"][rows] if region == "sparse" else torch.empty(0, dtype=torch.uint8)
    absmax = tensors.get(f"{region}_absmax")
    scale = tensors.get(f"{region}_weight_scale")
    if scale is None:
        scale = _region_scale(spec, tensors["weight_scale"], region)
    return tensors[values][rows], meta, torch.empty(0) if absmax is None else absmax[rows], scale[rows]


def _region_scale(spec: LinearSpec, scale: torch.Tensor, region: str) -> torch.Tensor:
    """Of the outputs' scales those of a region's rows, all shards together."""
    if spec.split == "input":
        return scale
    sizes = [size for pair in zip(spec.sparse_sizes, spec.dense_sizes, strict=True) for size in pair]
    return torch.cat(scale.split(sizes)[_REGIONS.index(region) :: 2])


def _pack(region: Region, given: tuple[torch.Tensor, ...], strips: torch.Tensor) -> None:
    """A region's rows to ``strips [strips, bytes]``."""
    values, meta, absmax, scale = given
    codec = region.codec
    if not isinstance(codec, FourBit):
        _pack_fp8(values.view(torch.uint8), meta, scale, strips)
        return
    block = _block(codec)
    wide = (absmax.float() + 1 if absmax.dtype == torch.uint8 else absmax) * scale[:, None]
    wide = wide.repeat_interleave(codec.block // block, 1)[:, : -(-2 * values.shape[1] // block)]
    torch.ops.spense.pack_four_bit_cpu(
        strips, values.contiguous(), meta.contiguous(), wide.contiguous(), block, codec.table.index(0.0)
    )


def _pack_fp8(values: torch.Tensor, meta: torch.Tensor, scale: torch.Tensor, strips: torch.Tensor) -> None:
    missing = -len(values) % STRIP
    steps = [(values, STRIP // 2 if meta.numel() else STRIP, 4)]
    if meta.numel():
        steps.insert(0, (meta, STRIP // META_GROUP, 1))
    parts = [pad(scale, (0, missing)).view(-1, STRIP).view(torch.uint8)]
    for tensor, step, unit in steps:
        filled = pad(tensor, (0, -tensor.shape[1] % step, 0, missing)).contiguous()
        torch.ops.spense.interleave_rows_cpu(filled, unit)
        parts.append(filled.view(len(strips), -1))
    torch.cat(parts, 1, out=strips)


def _fake(
    x: torch.Tensor, packed: torch.Tensor, table: torch.Tensor, bias: Any, n: int, *_: Any
) -> torch.Tensor:
    return x.new_empty((x.shape[0], n))
