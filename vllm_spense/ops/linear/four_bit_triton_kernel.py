"""4-bit layers in Triton (sm_80 and later): the product for few tokens, and the matrix for many.

Weights stay in 4 bits in memory. A program makes a tile of them in registers: codes are placed where their
values belong (a 2:4 group's four codes are 16 bits, and zeros have a code, too), looked up in a table that
the threads of a warp hold together, multiplied by their absmax in fp32 and rounded once to x's dtype. That is
the definition's matrix in that dtype, to the last bit. In instructions per weight at up to 16 tokens (Triton
3.9, no GPU needed to count): dense 5.9 and 2:4 9.2 on sm_90, where loads from a table take 9.4 and 12.1.

Importing this module imports Triton: import it only where a kernel is about to run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional

from vllm_spense.format.codecs.fp8 import FP8_DTYPE
from vllm_spense.format.layout import META_GROUP
from vllm_spense.ops.linear.four_bit import FourBitLayer
from vllm_spense.ops.linear.four_bit_triton_ptx import look_up_bytes, look_up_groups, table_entry
from vllm_spense.ops.linear.reference import OUT_DTYPES
from vllm_spense.ops.linear.triton_kernel import Launch, Tile, add_product, locate, regions_of_rows, widen

MOST_TOKENS = 128
"""For more tokens the matrix is written out and multiplied by torch. A guess, until a GPU has measured it."""
DEQUANTISED = Tile(16, 0, 256, 4, 1)
"""Of the kernel that writes the matrix."""
_ENTRY = tl.constexpr(table_entry())
_BYTES = tl.constexpr(look_up_bytes())
_GROUPS = tl.constexpr(look_up_groups())
_OUT_8 = tl.constexpr(",".join(["=&f"] * 8 + ["r"] + ["f"] * 4))
_OUT_4 = tl.constexpr(",".join(["=&f"] * 4 + ["r", "f"]))


def tile_for(tokens: int, x_bytes: int, warp_groups: bool) -> Tile:
    """The tile for a batch of ``tokens``, by the rules of :func:`.triton_kernel.tile_for`."""
    if x_bytes == 4:
        return Tile(64, 16, 64, 4, 3)
    if tokens <= 16:
        return Tile(64, 16, 128, 4, 3)
    if tokens <= 32:
        return Tile(64, 32, 64, 4, 4)
    return Tile(64, 64, 64, 4, 4) if warp_groups else Tile(128, 64, 64, 4, 3)


# --- a tile of weights --------------------------------------------------------------------------------------


@triton.jit
def _entry(table, PTX: tl.constexpr):
    """What codes are looked up in: a thread's own entry of the table, or without assembly the table."""
    if PTX:
        return tl.inline_asm_elementwise(_ENTRY, "=f,l", [table], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return table


@triton.jit
def _codes_of_bytes(packed, entry, PTX: tl.constexpr):
    """fp32 of the first and of the second code of bytes."""
    if PTX:
        return tl.inline_asm_elementwise(
            _BYTES, _OUT_8, [packed, entry], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )
    else:
        return tl.load(entry + (packed >> 4).to(tl.int32)), tl.load(entry + (packed & 15).to(tl.int32))


@triton.jit
def _codes_of_groups(codes, entry, PTX: tl.constexpr):
    """fp32 of the four codes in the low 16 bits of words."""
    if PTX:
        return tl.inline_asm_elementwise(
            _GROUPS,
            _OUT_4,
            [codes, entry],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            tl.load(entry + (codes & 15)),
            tl.load(entry + (codes >> 4 & 15)),
            tl.load(entry + (codes >> 8 & 15)),
            tl.load(entry + (codes >> 12 & 15)),
        )


@triton.jit
def _repeated(absmax, COUNT: tl.constexpr):
    """``[ROWS, COUNT]``: a tile's absmax beside what it belongs to."""
    rows: tl.constexpr = absmax.shape[0]
    blocks: tl.constexpr = absmax.shape[1]
    return tl.reshape(tl.broadcast_to(absmax[:, :, None], [rows, blocks, COUNT // blocks]), [rows, COUNT])


@triton.jit
def _dense_weight(packed, absmax, entry, dtype: tl.constexpr, FP8: tl.constexpr, PTX: tl.constexpr):
    """Weights ``[ROWS, FEATURES]`` of bytes: two codes each, or (FP8) e4m3."""
    rows: tl.constexpr = packed.shape[0]
    count: tl.constexpr = packed.shape[1]
    scale = _repeated(absmax, count)
    if FP8:
        return (widen(packed, tl.float32, PTX) * scale).to(dtype)
    else:
        first, second = _codes_of_bytes(packed, entry, PTX)
        return tl.reshape(tl.join(first * scale, second * scale), [rows, 2 * count]).to(dtype)


@triton.jit
def _placed(codes, nibble, ZERO: tl.constexpr):
    """The four codes of a group, the first in the low bits, of its two in a byte and their positions."""
    first = (codes >> 4 & 15) ^ ZERO
    second = (codes & 15) ^ ZERO
    return (first << ((nibble & 3) * 4) | second << ((nibble >> 2 & 3) * 4)) ^ (ZERO * 0x1111)


@triton.jit
def _sparse_weight(words, meta, absmax, entry, dtype: tl.constexpr, ZERO: tl.constexpr, PTX: tl.constexpr):
    """Weights ``[ROWS, 8 · WORDS]`` of four codes in each word and the metadata of their two groups."""
    rows: tl.constexpr = words.shape[0]
    count: tl.constexpr = words.shape[1]
    words = words.to(tl.int32)
    meta = meta.to(tl.int32)
    groups = tl.join(_placed(words, meta, ZERO), _placed(words >> 8, meta >> 4, ZERO))
    codes = tl.reshape(groups, [rows, 2 * count])
    scale = _repeated(absmax, 2 * count)
    a, b, c, d = _codes_of_groups(codes, entry, PTX)
    pairs = tl.join(tl.join(a * scale, c * scale), tl.join(b * scale, d * scale))
    return tl.reshape(pairs, [rows, 8 * count]).to(dtype)


@triton.jit
def _sparse_tile(
    values,
    meta,
    absmax,
    entry,
    at,
    words,
    dtype: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    ZERO: tl.constexpr,
    MASKED: tl.constexpr,
    PTX: tl.constexpr,
):
    """The tile at word ``at`` of rows of so many ``words``; MASKED: it may end beyond them."""
    word = at + tl.arange(0, FEATURES // 8)[None, :]
    count: tl.constexpr = max(FEATURES // 2 // BLOCK, 1)
    block = at * 4 // BLOCK + tl.arange(0, count)[None, :]
    if MASKED:
        return _sparse_weight(
            tl.load(values + word, mask=word < words, other=0),
            tl.load(meta + word, mask=word < words, other=0),
            tl.load(absmax + block, mask=block * BLOCK < words * 4, other=0.0),
            *(entry, dtype, ZERO, PTX),
        )
    else:
        return _sparse_weight(
            tl.load(values + word), tl.load(meta + word), tl.load(absmax + block), entry, dtype, ZERO, PTX
        )


@triton.jit
def _dense_tile(
    packed,
    absmax,
    entry,
    at,
    features,
    dtype: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,
    PTX: tl.constexpr,
):
    """The tile at feature ``at`` of rows of so many ``features``; MASKED: it may end beyond them."""
    each: tl.constexpr = 1 if FP8 else 2
    byte = at // each + tl.arange(0, FEATURES // each)[None, :]
    count: tl.constexpr = max(FEATURES // BLOCK, 1)
    block = at // BLOCK + tl.arange(0, count)[None, :]
    if MASKED:
        return _dense_weight(
            tl.load(packed + byte, mask=byte * each < features, other=0),
            tl.load(absmax + block, mask=block * BLOCK < features, other=0.0),
            *(entry, dtype, FP8, PTX),
        )
    else:
        return _dense_weight(tl.load(packed + byte), tl.load(absmax + block), entry, dtype, FP8, PTX)


# --- the product, and the matrix ----------------------------------------------------------------------------


@triton.jit
def _spend(
    acc,
    weight,
    x,
    y,
    at,
    features,
    inside,
    MASKED: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    PTX: tl.constexpr,
):
    """Multiply a tile of weights with the features of x from ``at`` on; without x, write it there into y."""
    feature = at + tl.arange(0, weight.shape[1])[None, :]
    if x is None:
        tl.store(y + feature, weight, mask=inside & (feature < features))
    else:
        x = tl.load(x + feature, mask=feature < features, other=0.0) if MASKED else tl.load(x + feature)
        acc = add_product(acc, weight, x, WEIGHT_LEFT, PTX)
    return acc


@triton.jit(do_not_specialize=["tokens", "in_features", "sparse_words", "dense_features"])
def _kernel(
    y,
    x,
    values,
    meta,
    sparse_absmax,
    dense,
    dense_absmax,
    tables,
    bias,
    tokens,
    sizes,
    starts,
    places,
    out_features,
    in_features,
    sparse_words,
    dense_features,
    dense_bytes,
    sparse_blocks,
    dense_blocks,
    DENSE_REGIONS: tl.constexpr,
    ALIGN: tl.constexpr,
    WORD_ALIGN: tl.constexpr,
    BYTE_ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    SPARSE_BLOCK: tl.constexpr,
    DENSE_BLOCK: tl.constexpr,
    ZERO: tl.constexpr,
    FP8: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One tile of ``y [M, N]``, or without x some rows of the layer's matrix ``y [N, K]``.

    Programs, regions and ragged ends as in :mod:`vllm_spense.ops.linear.triton_kernel`. A row has
    ``sparse_words`` words of four codes, as many metadata bytes, ``dense_bytes`` bytes of ``dense_features``
    dense weights, and ``…_blocks`` absmax.
    """
    in_features *= ALIGN
    dense_features *= ALIGN
    sparse_words *= WORD_ALIGN
    dense_bytes *= BYTE_ALIGN
    row, size, start, place, region = locate(tl.program_id(1), sizes, starts, places, ROWS)
    words = sparse_words
    features = dense_features
    if DENSE_REGIONS >= 0:
        words = tl.where(region >= DENSE_REGIONS, sparse_words, 0)
        features = tl.where(region < DENSE_REGIONS, dense_features, 0)

    rows = row + tl.arange(0, ROWS)
    clamped = tl.minimum(rows, size - 1)
    stored = (start + clamped).to(tl.int64)[:, None]
    inside = (rows < size)[:, None]
    acc = tl.zeros([ROWS, TOKENS] if WEIGHT_LEFT else [TOKENS, ROWS], tl.float32)
    dtype: tl.constexpr = y.dtype.element_ty if x is None else x.dtype.element_ty
    if x is None:
        x_row = None
        y_row = y + (place + clamped).to(tl.int64)[:, None] * in_features
    else:
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        x_row = x + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * in_features
        y_row = None

    value_row = values + stored * sparse_words
    meta_row = meta + stored * sparse_words
    absmax_row = sparse_absmax + stored * sparse_blocks
    entry = _entry(tables, PTX)
    step: tl.constexpr = FEATURES // 8
    whole = words // step * step
    for k in range(0, whole, step):
        weight = _sparse_tile(
            *(value_row, meta_row, absmax_row, entry, k, words),
            *(dtype, FEATURES, SPARSE_BLOCK, ZERO, False, PTX),
        )
        acc = _spend(acc, weight, x_row, y_row, k * 8, words * 8, inside, False, WEIGHT_LEFT, PTX)
    if not EVEN:
        weight = _sparse_tile(
            *(value_row, meta_row, absmax_row, entry, whole, words),
            *(dtype, FEATURES, SPARSE_BLOCK, ZERO, True, PTX),
        )
        acc = _spend(acc, weight, x_row, y_row, whole * 8, words * 8, inside, True, WEIGHT_LEFT, PTX)

    dense_row = dense + stored * dense_bytes
    scale_row = dense_absmax + stored * dense_blocks
    entry = _entry(tables + 16, PTX)
    first = words * 8
    end = first + features
    whole = features // FEATURES * FEATURES
    for k in range(0, whole, FEATURES):
        weight = _dense_tile(
            *(dense_row, scale_row, entry, k, features),
            *(dtype, FEATURES, DENSE_BLOCK, FP8, False, PTX),
        )
        acc = _spend(acc, weight, x_row, y_row, first + k, end, inside, False, WEIGHT_LEFT, PTX)
    if not EVEN:
        weight = _dense_tile(
            *(dense_row, scale_row, entry, whole, features),
            *(dtype, FEATURES, DENSE_BLOCK, FP8, True, PTX),
        )
        acc = _spend(acc, weight, x_row, y_row, first + whole, end, inside, True, WEIGHT_LEFT, PTX)

    if x is not None:
        out = tl.trans(acc) if WEIGHT_LEFT else acc
        if bias is not None:
            out = out + tl.load(bias + place + clamped).to(tl.float32)[None, :]
        y_at = y + token.to(tl.int64)[:, None] * out_features + (place + rows)[None, :]
        tl.store(y_at, out.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & (rows < size)[None, :])


# --- the launches -------------------------------------------------------------------------------------------


def plan(
    y: torch.Tensor, x: torch.Tensor | None, layer: FourBitLayer, in_features: int, capability: int | None
) -> Launch:
    """The launch that writes ``y`` on a GPU of this compute capability (89 is sm_89): the product with ``x``,
    or without one the matrix ``[N, in_features]``. None: in Triton's interpreter."""
    warp_groups = capability is not None and capability // 10 in (9, 10, 11)
    tile = DEQUANTISED if x is None else tile_for(x.shape[0], x.element_size(), warp_groups)
    sparse_sizes, dense_sizes, rows = layer.sparse_sizes, layer.dense_sizes, layer.out_features
    if layer.output_split:
        regions, dense_regions = regions_of_rows(sparse_sizes, dense_sizes), len(dense_sizes)
        sparse_features = dense_features = in_features
    else:
        regions, dense_regions = [(rows, 0, 0)], -1
        (sparse_features,), (dense_features,) = sparse_sizes, dense_sizes
    sizes, starts, places = zip(*regions, strict=True)
    words, dense_bytes = sparse_features // META_GROUP, layer.dense_weight.shape[1]
    align, word_align = math.gcd(in_features, dense_features, 16), math.gcd(words, 16)
    byte_align = math.gcd(dense_bytes, 16)
    fp8 = layer.dense_weight.dtype == FP8_DTYPE
    even = sparse_features % tile.features == 0 and dense_features % tile.features == 0
    return Launch(
        (
            1 if x is None else triton.cdiv(x.shape[0], tile.tokens),
            sum(triton.cdiv(size, tile.rows) for size in sizes),
        ),
        {
            "y": y,
            "x": x,
            "values": _words(layer.sparse_values),
            "meta": layer.sparse_meta,
            "sparse_absmax": layer.sparse_absmax,
            "dense": layer.dense_weight.view(torch.uint8) if fp8 else layer.dense_weight,
            "dense_absmax": layer.dense_absmax,
            "tables": layer.tables,
            "bias": layer.bias,
            "tokens": 0 if x is None else x.shape[0],
            "sizes": sizes,
            "starts": starts,
            "places": places,
            "out_features": rows,
            "in_features": in_features // align,
            "sparse_words": words // word_align,
            "dense_features": dense_features // align,
            "dense_bytes": dense_bytes // byte_align,
            "sparse_blocks": layer.sparse_absmax.shape[1],
            "dense_blocks": layer.dense_absmax.shape[1],
            "DENSE_REGIONS": dense_regions,
            "ALIGN": align,
            "WORD_ALIGN": word_align,
            "BYTE_ALIGN": byte_align,
            "EVEN": even,
            "SPARSE_BLOCK": layer.blocks[0],
            "DENSE_BLOCK": layer.blocks[1],
            "ZERO": layer.zero,
            "FP8": fp8,
            "WEIGHT_LEFT": warp_groups,
            "PTX": capability is not None,
            "ROWS": tile.rows,
            "TOKENS": max(tile.tokens, 16),
            "FEATURES": tile.features,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        },
    )


def _words(values: torch.Tensor) -> torch.Tensor:
    """Four codes as one int16."""
    return values.view(torch.int16) if values.numel() else values.new_empty(0, dtype=torch.int16)


def dequantise(layer: FourBitLayer, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix ``[N, K]``: the definition's, rounded once to ``dtype``."""
    weight = layer.tables.new_empty((layer.out_features, in_features), dtype=dtype)
    if weight.numel():
        _run(plan(weight, None, layer, in_features, _capability(weight)))
    return weight


def multiply(x: torch.Tensor, layer: FourBitLayer) -> torch.Tensor:
    """``y [M, N] = x Wᵀ`` in x's dtype: bf16, fp16 or fp32, else ``ValueError``."""
    if x.dtype not in OUT_DTYPES:
        raise ValueError(f"activations {x.dtype} must be one of {OUT_DTYPES}")
    if x.shape[0] > MOST_TOKENS:
        weight = dequantise(layer, x.shape[1], x.dtype)
        return functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))
    y = x.new_empty((x.shape[0], layer.out_features))
    if y.numel():
        _run(plan(y, x.contiguous(), layer, x.shape[1], _capability(x)))
    return y


def _capability(tensor: torch.Tensor) -> int | None:
    if not isinstance(_kernel, triton.runtime.JITFunction):  # interpreted
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def _run(launch: Launch) -> None:
    arguments: dict[str, Any] = launch.arguments
    _kernel[launch.grid](**arguments)
