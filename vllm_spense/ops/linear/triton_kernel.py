"""``spense::linear`` as one Triton kernel, on weights that stay compressed in memory (sm_80 and later).

A program computes a tile of ``y``: its rows' 2:4 features first, then their dense ones, into the same fp32
accumulator; either part may be empty. Weights are decompressed in registers. What the compiler makes of the
2:4 loop at up to 16 tokens, in instructions per weight (Triton 3.6, no GPU needed to count): FP8 1.9 on sm_90
and 2.4 on sm_89, where shifts instead of table look-ups take 3.3 and 3.7; W8A16 5.6 on sm_80, where widening
every byte after decompression takes 6.6.

Importing this module imports Triton: import it only where a kernel is about to run.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_spense.format.codecs.fp8 import FP8_DTYPE
from vllm_spense.format.layout import META_GROUP
from vllm_spense.ops.linear.arguments import LinearArguments
from vllm_spense.ops.linear.op import empty_output
from vllm_spense.ops.linear.reference import OUT_DTYPES
from vllm_spense.ops.linear.triton_ptx import BF16, FP16, spread_bytes, spread_halves, widen_bytes


class Tile(NamedTuple):
    """What one program computes at a time, and how it is compiled."""

    rows: int
    tokens: int
    features: int
    warps: int
    stages: int


def tile_for(tokens: int, x_bytes: int, warp_groups: bool) -> Tile:
    """The tile for a batch of ``tokens`` with ``x_bytes`` per activation.

    Few tokens: the weights are the traffic, so rows are few (more programs) and features many (longer
    reads). Many tokens: as many as the registers hold share the decompression of a weight. Tensor cores fed
    by single warps (no ``warp_groups``: not sm_90, sm_100) need 4 rows > tokens * warps, or Triton gives the
    same rows to two warps, which both decompress them. All tiles fit the 99 KiB of shared memory of sm_86,
    sm_89 and sm_120.
    """
    if x_bytes == 4:
        return Tile(64, 16, 64, 4, 3)  # no tensor cores, nothing to tune
    if tokens <= 16:
        return Tile(64, 16, 256 // x_bytes, 4, 3)
    if tokens <= 32:
        return Tile(64, 32, 128 // x_bytes, 4, 4)
    if warp_groups:
        return Tile(64, 64, 128 // x_bytes, 4, 4) if tokens <= 64 else Tile(128, 128, 128 // x_bytes, 8, 3)
    return Tile(128, 64, 128 // x_bytes, 4, 3) if tokens <= 64 else Tile(256, 64, 64, 8, 3)


_SPREAD_BYTES = tl.constexpr(spread_bytes())
_SPREAD_BF16 = tl.constexpr(spread_halves(BF16))
_SPREAD_FP16 = tl.constexpr(spread_halves(FP16))
_WIDEN_BF16 = tl.constexpr(widen_bytes(BF16))
_WIDEN_FP16 = tl.constexpr(widen_bytes(FP16))
_OUT_8 = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 5))
_OUT_16 = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 5))


# --- decompression ------------------------------------------------------------------------------------------


@triton.jit
def _place(first, second, nibble):
    """Four bytes of a group as a word: its two values shifted to their positions."""
    return (first & 0xFF) << ((nibble & 3) * 8) | (second & 0xFF) << ((nibble >> 2 & 3) * 8)


@triton.jit
def _decompress_bytes(values, meta, ROWS: tl.constexpr, FEATURES: tl.constexpr, PTX: tl.constexpr):
    """e4m3 bytes ``[ROWS, FEATURES]`` of ``[ROWS, FEATURES / 8]`` value words (int32) and metadata bytes."""
    if PTX:
        even, odd = tl.inline_asm_elementwise(
            _SPREAD_BYTES, _OUT_8, [values, meta], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
        )
    else:
        nibbles = meta.to(tl.int32)
        even = _place(values, values >> 8, nibbles)
        odd = _place(values >> 16, values >> 24, nibbles >> 4)
    words = tl.reshape(tl.join(even, odd), [ROWS, FEATURES // 4])
    bytes02 = tl.join(words.to(tl.uint8), (words >> 16).to(tl.uint8))
    bytes13 = tl.join((words >> 8).to(tl.uint8), (words >> 24).to(tl.uint8))
    return tl.reshape(tl.join(bytes02, bytes13), [ROWS, FEATURES])


@triton.jit
def widen(weight, dtype: tl.constexpr, PTX: tl.constexpr):
    """e4m3 bytes to a wider float type, exactly, without ever computing with a denormal number.

    With the exponent re-biased, a normal number is right, and a subnormal m · 2⁻⁹ reads as
    t = 2⁻⁷ + m · 2⁻¹⁰; 2 t - 2⁻⁶ is right then, and never below t for normal ones: the result is their
    minimum. NaN (0x7F, not in checkpoints) becomes 480.
    """
    if PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _WIDEN_BF16, "=&r,=&r,r", [weight], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif PTX and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _WIDEN_FP16, "=&r,=&r,r", [weight], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        bits = weight.to(tl.int32)
        magnitude = (((bits & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        magnitude = tl.minimum(magnitude, magnitude * 2 - 0.015625)
        return tl.where(bits < 0x80, magnitude, -magnitude).to(dtype)


@triton.jit
def _decompress_wide(
    values, meta, dtype: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, PTX: tl.constexpr
):
    """Weights ``[ROWS, FEATURES]`` in a type wider than e4m3."""
    if PTX and dtype != tl.float32:
        a, b, c, d = tl.inline_asm_elementwise(
            _SPREAD_BF16 if dtype == tl.bfloat16 else _SPREAD_FP16,
            _OUT_16,
            [values, meta],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=4,
        )
        words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, FEATURES // 2])
        halves = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        return tl.reshape(halves, [ROWS, FEATURES]).to(dtype, bitcast=True)
    else:
        return widen(_decompress_bytes(values, meta, ROWS, FEATURES, PTX), dtype, PTX)


# --- the product --------------------------------------------------------------------------------------------


@triton.jit
def add_product(acc, weight, x, WEIGHT_LEFT: tl.constexpr, PTX: tl.constexpr):
    """``acc + weight xᵀ``, or ``acc + x weightᵀ``.

    FP8 tensor cores of sm_89 and sm_90 keep only some 14 bits of their accumulator: the sum over one tile of
    features leaves them and is added in fp32. The interpreter would multiply the bit patterns of bf16.
    """
    if WEIGHT_LEFT:
        left, right = weight, tl.trans(x)
    else:
        left, right = x, tl.trans(weight)
    if x.dtype == tl.float8e4nv:
        return acc + tl.dot(left, right, max_num_imprecise_acc=x.shape[1])
    elif PTX:
        return tl.dot(left, right, acc, input_precision="ieee")
    else:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def _sparse_step(
    acc,
    values,
    meta,
    x,
    left,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    PTX: tl.constexpr,
):
    """Add one tile of 2:4 features; MASKED: only ``left`` words of them exist."""
    if MASKED:
        inside = tl.arange(0, FEATURES // 8)[None, :] < left
        values = tl.load(values, mask=inside, other=0)
        meta = tl.load(meta, mask=inside, other=0)
        x = tl.load(x, mask=tl.arange(0, FEATURES)[None, :] < left * 8, other=0.0)
    else:
        values = tl.load(values)
        meta = tl.load(meta)
        x = tl.load(x)
    if x.dtype == tl.float8e4nv:
        weight = _decompress_bytes(values, meta, ROWS, FEATURES, PTX).to(tl.float8e4nv, bitcast=True)
    else:
        weight = _decompress_wide(values, meta, x.dtype, ROWS, FEATURES, PTX)
    return add_product(acc, weight, x, WEIGHT_LEFT, PTX)


@triton.jit
def _dense_step(
    acc,
    weight,
    x,
    left,
    FEATURES: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    PTX: tl.constexpr,
):
    """Add one tile of dense features; MASKED: only ``left`` of them exist."""
    if MASKED:
        inside = tl.arange(0, FEATURES)[None, :] < left
        weight = tl.load(weight, mask=inside, other=0.0)
        x = tl.load(x, mask=inside, other=0.0)
    else:
        weight = tl.load(weight)
        x = tl.load(x)
    if x.dtype != tl.float8e4nv:
        weight = widen(weight, x.dtype, PTX)
    return add_product(acc, weight, x, WEIGHT_LEFT, PTX)


@triton.jit
def locate(tile, sizes, starts, places, ROWS: tl.constexpr):
    """Of row tile ``tile`` of the regions one after another: its first row in its region, and that region's
    rows, first row of weights, first column of y and number."""
    row = 0
    size = 0
    start = 0
    place = 0
    region = 0
    first = 0
    for i in tl.static_range(len(sizes)):
        tiles = tl.cdiv(sizes[i], ROWS)
        inside = (tile >= first) & (tile < first + tiles)
        row = tl.where(inside, (tile - first) * ROWS, row)
        size = tl.where(inside, sizes[i], size)
        start = tl.where(inside, starts[i], start)
        place = tl.where(inside, places[i], place)
        region = tl.where(inside, i, region)
        first += tiles
    return row, size, start, place, region


@triton.jit(do_not_specialize=["tokens", "in_features", "sparse_words", "dense_features"])
def _kernel(
    y,
    x,
    x_scale,
    values,
    meta,
    dense,
    weight_scale,
    bias,
    tokens,
    sizes,
    starts,
    places,
    out_features,
    in_features,
    sparse_words,
    dense_features,
    DENSE_REGIONS: tl.constexpr,
    ALIGN: tl.constexpr,
    WORD_ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One tile of y. Programs: token tiles, times the row tiles of every region of rows one after another.

    Region i has ``sizes[i]`` rows, the first of them row ``starts[i]`` of its weight tensor and column
    ``places[i]`` of y. Output split: the first ``DENSE_REGIONS`` regions are dense, the others 2:4.
    Input split (-1): the only region is both. A row has ``in_features`` activations, ``sparse_words`` words
    of four values, as many metadata bytes, and ``dense_features`` dense weights; these numbers arrive
    divided by the power of two that tells Triton how far it may vectorise. Rows and tokens are clamped when
    reading and masked when writing; unless EVEN, a masked tile of features ends each part.
    """
    in_features *= ALIGN
    dense_features *= ALIGN
    sparse_words *= WORD_ALIGN
    row, size, start, place, region = locate(tl.program_id(1), sizes, starts, places, ROWS)
    words = sparse_words
    features = dense_features
    if DENSE_REGIONS >= 0:
        words = tl.where(region >= DENSE_REGIONS, sparse_words, 0)
        features = tl.where(region < DENSE_REGIONS, dense_features, 0)

    rows = row + tl.arange(0, ROWS)
    clamped = tl.minimum(rows, size - 1)
    stored = (start + clamped).to(tl.int64)[:, None]
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    x_row = x + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * in_features
    # The hint keeps one thread from reading a whole row, which makes Triton 3.9 store decompressed bytes one
    # by one (8.5 instead of 3.2 instructions per weight).
    word = tl.max_contiguous(tl.arange(0, FEATURES // 8), FEATURES // 16)[None, :]
    feature = tl.arange(0, FEATURES)[None, :]
    acc = tl.zeros([ROWS, TOKENS] if WEIGHT_LEFT else [TOKENS, ROWS], tl.float32)

    value_at = values + stored * sparse_words + word
    meta_at = meta + stored * sparse_words + word
    x_at = x_row + feature
    step: tl.constexpr = FEATURES // 8
    whole = words // step * step
    for k in range(0, whole, step):
        acc = _sparse_step(
            acc, value_at + k, meta_at + k, x_at + k * 8, 0, ROWS, FEATURES, False, WEIGHT_LEFT, PTX
        )
    if not EVEN:
        left = words - whole
        value_at += whole
        meta_at += whole
        x_last = x_at + whole * 8
        acc = _sparse_step(acc, value_at, meta_at, x_last, left, ROWS, FEATURES, True, WEIGHT_LEFT, PTX)

    dense_at = dense + stored * dense_features + feature
    x_at += words * 8
    whole = features // FEATURES * FEATURES
    for k in range(0, whole, FEATURES):
        acc = _dense_step(acc, dense_at + k, x_at + k, 0, FEATURES, False, WEIGHT_LEFT, PTX)
    if not EVEN:
        left = features - whole
        acc = _dense_step(acc, dense_at + whole, x_at + whole, left, FEATURES, True, WEIGHT_LEFT, PTX)

    out = tl.trans(acc) if WEIGHT_LEFT else acc
    column = place + clamped
    if x_scale is not None:
        out = out * tl.load(x_scale + tl.minimum(token, tokens - 1))[:, None]
    if weight_scale is not None:
        out = out * tl.load(weight_scale + column)[None, :]
    if bias is not None:
        out = out + tl.load(bias + column).to(tl.float32)[None, :]
    y_at = y + token.to(tl.int64)[:, None] * out_features + (place + rows)[None, :]
    tl.store(y_at, out.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & (rows < size)[None, :])


# --- the launch ---------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """Grid and arguments of one kernel launch."""

    grid: tuple[int, ...]
    arguments: dict[str, Any]


def regions_of_rows(sparse_sizes: list[int], dense_sizes: list[int]) -> list[tuple[int, int, int]]:
    """Rows, first row of weights and first column of y of an output split's regions.

    Dense ones first: their tiles take longer, and the last programs run alone.
    """
    ends = list(accumulate(size for pair in zip(sparse_sizes, dense_sizes, strict=True) for size in pair))
    return [
        (size, start, end - size)
        for sizes, theirs in ((dense_sizes, ends[1::2]), (sparse_sizes, ends[::2]))
        for size, start, end in zip(sizes, [0, *accumulate(sizes)], theirs, strict=False)
    ]


def _four_by_four(values: torch.Tensor) -> torch.Tensor:
    """Four e4m3 values as one int32."""
    if not values.numel():  # its strides may be such that no view exists, but the kernel needs the dtype
        return values.new_empty(0, dtype=torch.int32)
    return values.contiguous().view(torch.uint8).view(torch.int32)


def plan(
    y: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    layer: LinearArguments,
    capability: int | None,
) -> Launch:
    """The launch that writes ``y`` on a GPU of this compute capability (89 is sm_89).

    None: in Triton's interpreter, which cannot run inline assembly.
    """
    warp_groups = capability is not None and capability // 10 in (9, 10, 11)
    tile = tile_for(x.shape[0], x.element_size(), warp_groups)
    fp8 = x.dtype == FP8_DTYPE
    sparse_sizes, dense_sizes = layer.sparse_sizes, layer.dense_sizes
    if layer.output_split:
        regions = regions_of_rows(sparse_sizes, dense_sizes)
        dense_regions, sparse_features, dense_features = len(dense_sizes), x.shape[1], x.shape[1]
    else:
        regions = [(y.shape[1], 0, 0)]
        dense_regions, (sparse_features,), (dense_features,) = -1, sparse_sizes, dense_sizes
    sizes, starts, places = zip(*regions, strict=True)
    words = sparse_features // META_GROUP
    align, word_align = math.gcd(x.shape[1], dense_features, 16), math.gcd(words, 16)
    even = sparse_features % tile.features == 0 and dense_features % tile.features == 0
    dense = layer.dense_weight.contiguous()
    return Launch(
        (triton.cdiv(x.shape[0], tile.tokens), sum(triton.cdiv(size, tile.rows) for size in sizes)),
        {
            "y": y,
            "x": x.contiguous(),
            "x_scale": x_scale,
            "values": _four_by_four(layer.sparse_values),
            "meta": layer.sparse_meta.contiguous(),
            "dense": dense if fp8 else dense.view(torch.uint8),
            "weight_scale": layer.weight_scale,
            "bias": layer.bias,
            "tokens": x.shape[0],
            "sizes": sizes,
            "starts": starts,
            "places": places,
            "out_features": y.shape[1],
            "in_features": x.shape[1] // align,
            "sparse_words": words // word_align,
            "dense_features": dense_features // align,
            "DENSE_REGIONS": dense_regions,
            "ALIGN": align,
            "WORD_ALIGN": word_align,
            "EVEN": even,
            "WEIGHT_LEFT": warp_groups,
            "PTX": capability is not None,
            "ROWS": tile.rows,
            "TOKENS": tile.tokens,
            "FEATURES": tile.features,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        },
    )


def multiply(
    x: torch.Tensor, x_scale: torch.Tensor | None, layer: LinearArguments, out_dtype: torch.dtype
) -> torch.Tensor:
    """:func:`vllm_spense.ops.linear.op.linear` for e4m3 weights in the checkpoint's layout.

    ``x``: e4m3 (sm_89 and later) or float, which takes the weights as they are (W8A16). Raises ``ValueError``
    for other weight or output dtypes.
    """
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"output dtype {out_dtype} must be one of {OUT_DTYPES}")
    values, dense = layer.sparse_values.dtype, layer.dense_weight.dtype
    if dense != FP8_DTYPE or values != FP8_DTYPE:
        raise ValueError(f"weights must be {FP8_DTYPE}, not {values} and {dense}")
    y = empty_output(x, x_scale, layer, out_dtype)
    if y.numel():
        capability = None
        if isinstance(_kernel, triton.runtime.JITFunction):  # not interpreted
            major, minor = torch.cuda.get_device_capability(x.device)
            capability = 10 * major + minor
        launch = plan(y, x, x_scale, layer, capability)
        _kernel[launch.grid](**launch.arguments)
    return y
