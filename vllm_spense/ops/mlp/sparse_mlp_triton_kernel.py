"""Activation-sparse MLPs in Triton (sm_80 and later): gate to TwELL's words, rows of up, rows of down.

    pack     a program per token and tile: the words of :mod:`.twell`, and the true count
    neurons  a program per token, tile and part of it: a row of up for each neuron that the words name; neuron
             and input of down go to the token's list, behind those of the tiles in front
    add      a program per token and 64 columns: rows of down for the neurons of the list

A tile that has overflowed is read from the dense gate instead, by the program that has the tile: decided on
the device. Grids follow from shapes, so that a CUDA graph can hold the launches, and everything is added up
in an order that depends on a token's own neurons alone: no atomics, the same bits in each run.

Inputs of a plain layer need no words: one program per token lists those that are not small.

Importing this module imports Triton: import it only where a kernel is about to run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_spense.ops.linear.triton_kernel import Launch
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.twell import TwellShape

DTYPES = (torch.bfloat16, torch.float16)
PROGRAMS = 1024
"""As many of `neurons` as keep a GPU busy, if there are so many neurons. A guess."""
NEURONS, FEATURES = 8, 512
"""Rows of up at a time, and columns of each."""
LISTED, COLUMNS = 32, 64
"""Rows of down at a time, and a program's columns of y."""
INPUTS = 4096
"""Inputs that are listed at a time."""

# --- kernels ------------------------------------------------------------------------------------------------


@triton.jit
def _opens(value, threshold):
    """Whether a gate in fp32 lets something through, NaN included."""
    return (value <= threshold) == 0


@triton.jit
def _pack(gate, words, neurons, tiles, threshold, TILE: tl.constexpr, WORDS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < neurons
    value = tl.load(gate + token * neurons + column, mask=inside, other=0.0)
    kept = _opens(value.to(tl.float32), threshold) & inside
    place = tl.cumsum(kept.to(tl.int32), 0)
    row = words + (token * tiles + tile) * WORDS
    word = (value.to(tl.int16, bitcast=True).to(tl.int32) << 16) | column
    tl.store(row + place, word, mask=kept & (place < WORDS))
    count = tl.sum(kept.to(tl.int32), 0)
    rest = tl.arange(0, WORDS)
    tl.store(row + rest, tl.where(rest == 0, count, 0), mask=(rest == 0) | (rest > count))


@triton.jit
def _neurons(
    words,
    gate,
    x,
    up,
    up_bias,
    ids,
    inputs,
    neurons,
    in_features,
    tiles,
    parts,
    threshold,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    TILES: tl.constexpr,
    NEURONS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """``TILES``: a power of two, at least ``tiles``. ``EVEN``: FEATURES divide ``in_features``."""
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    each = tl.arange(0, TILES)
    counts = tl.load(words + (token * tiles + each) * WORDS, mask=each < tiles, other=0)
    before = tl.sum(tl.where(each < tile, counts, 0), 0)
    count = tl.sum(tl.where(each == tile, counts, 0), 0)
    over = count >= WORDS
    listed = tl.where(over, 0, count)
    end = tl.where(over, neurons, 0)  # of what is read of the dense gate
    packed = words + (token * tiles + tile) * WORDS + 1
    dense = gate + token * neurons
    place = tl.arange(0, TILE)
    column = tile * TILE + place
    of_tile = tl.load(dense + column, mask=column < end, other=0.0).to(tl.float32)
    open_of_tile = _opens(of_tile, threshold).to(tl.int32)

    steps = tl.where(over, TILE // NEURONS, (count + NEURONS - 1) // NEURONS)
    for step in range(tl.program_id(2), steps, parts):
        slot = step * NEURONS + tl.arange(0, NEURONS)
        word = tl.load(packed + slot, mask=slot < listed, other=0)
        neuron = tl.where(over, tile * TILE + slot, word & 0xFFFF)
        there = neuron < end
        value = tl.load(dense + neuron, mask=there, other=0.0).to(tl.float32)
        stored = (word >> 16).to(tl.int16).to(gate.dtype.element_ty, bitcast=True).to(tl.float32)
        value = tl.where(there, value, stored)
        kept = (there & _opens(value, threshold)) | (slot < listed)
        ahead = tl.sum(tl.where(place < step * NEURONS, open_of_tile, 0), 0)
        at = before + tl.where(over, ahead + tl.cumsum(kept.to(tl.int32), 0) - 1, slot)

        sums = tl.zeros([NEURONS, FEATURES], tl.float32)
        row = up + neuron.to(tl.int64)[:, None] * in_features
        for first in range(0, in_features, FEATURES):
            feature = first + tl.arange(0, FEATURES)
            if EVEN:
                part = tl.load(x + token * in_features + feature)
                weight = tl.load(row + feature[None, :], mask=kept[:, None], other=0.0)
            else:
                part = tl.load(x + token * in_features + feature, mask=feature < in_features, other=0.0)
                weight = tl.load(
                    row + feature[None, :], mask=kept[:, None] & (feature < in_features)[None, :], other=0.0
                )
            sums += weight.to(tl.float32) * part.to(tl.float32)[None, :]
        upper = tl.sum(sums, 1)
        if up_bias is not None:
            upper += tl.load(up_bias + neuron, mask=kept, other=0.0).to(tl.float32)
        if KIND == "drelu":
            upper = tl.where(upper < 0, 0.0, upper)  # NaN stays
        if KIND == "relu2":
            value = value * value
        to = token * neurons + at
        tl.store(ids + to, neuron, mask=kept)
        tl.store(inputs + to, value * upper, mask=kept)


@triton.jit
def _list(x, ids, inputs, counts, features, threshold, INPUTS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    count = 0
    for first in range(0, features, INPUTS):
        column = first + tl.arange(0, INPUTS)
        inside = column < features
        value = tl.load(x + token * features + column, mask=inside, other=0.0).to(tl.float32)
        kept = _opens(tl.abs(value), threshold) & inside
        to = token * features + count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(ids + to, column, mask=kept)
        tl.store(inputs + to, value, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    tl.store(counts + token, count)


@triton.jit
def _add(
    ids,
    inputs,
    counts,
    weight_t,
    bias,
    y,
    rows,
    out_features,
    tiles,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    LISTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``counts``: ``tiles`` per token, ``STRIDE`` words apart, which add up to the length of its list."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < out_features
    each = tl.arange(0, TILES)
    count = tl.sum(tl.load(counts + (token * tiles + each) * STRIDE, mask=each < tiles, other=0), 0)
    sums = tl.zeros([LISTED, COLUMNS], tl.float32)
    for first in range(0, count, LISTED):
        at = first + tl.arange(0, LISTED)
        listed = at < count
        row = tl.load(ids + token * rows + at, mask=listed, other=0).to(tl.int64)
        value = tl.load(inputs + token * rows + at, mask=listed, other=0.0)
        weight = tl.load(
            weight_t + row[:, None] * out_features + column[None, :],
            mask=listed[:, None] & inside[None, :],
            other=0.0,
        )
        sums += value[:, None] * weight.to(tl.float32)
    out = tl.sum(sums, 0)
    if bias is not None:
        out += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * out_features + column, out.to(y.dtype.element_ty), mask=inside)


# --- launches -----------------------------------------------------------------------------------------------


class Lists(NamedTuple):
    """What a token reads of a matrix by the row: ``ids [M, I]`` int32 and ``inputs [M, I]`` fp32, of which
    the first ones count: as many as ``counts`` of the token, every ``stride`` int32, add up to."""

    ids: torch.Tensor
    inputs: torch.Tensor
    counts: torch.Tensor
    stride: int

    @classmethod
    def empty(cls, like: torch.Tensor, counts: torch.Tensor, stride: int) -> Lists:
        ids, inputs = (like.new_empty(like.shape, dtype=dtype) for dtype in (torch.int32, torch.float32))
        return cls(ids, inputs, counts, stride)


def plan_pack(gate: torch.Tensor, words: torch.Tensor, shape: TwellShape, threshold: float) -> Launch:
    arguments = {"gate": gate, "words": words, "neurons": shape.hidden, "tiles": shape.tiles}
    constants = {"TILE": shape.tile, "WORDS": shape.words, "num_warps": 1}
    return Launch((gate.shape[0], shape.tiles), arguments | {"threshold": threshold} | constants)


def plan_neurons(
    words: torch.Tensor,
    gate: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    lists: Lists,
    shape: TwellShape,
    activation: Activation,
) -> Launch:
    tokens, in_features = x.shape
    features = min(FEATURES, max(triton.next_power_of_2(in_features), 16))
    busy = triton.cdiv(PROGRAMS, max(tokens * shape.tiles, 1))
    parts = min(busy, triton.cdiv(shape.capacity, NEURONS))
    return Launch(
        (tokens, shape.tiles, parts),
        {
            "words": words,
            "gate": gate,
            "x": x,
            "up": up,
            "up_bias": up_bias,
            "ids": lists.ids,
            "inputs": lists.inputs,
            "neurons": shape.hidden,
            "in_features": in_features,
            "tiles": shape.tiles,
            "parts": parts,
            "threshold": activation.threshold,
            "KIND": activation.kind,
            "EVEN": in_features % features == 0,
            "TILE": shape.tile,
            "WORDS": shape.words,
            "TILES": triton.next_power_of_2(shape.tiles),
            "NEURONS": NEURONS,
            "FEATURES": features,
            "num_warps": 4,
        },
    )


def plan_list(x: torch.Tensor, lists: Lists, threshold: float) -> Launch:
    inputs = min(INPUTS, max(triton.next_power_of_2(x.shape[1]), 16))
    arguments = {"x": x, "ids": lists.ids, "inputs": lists.inputs, "counts": lists.counts}
    sizes = {"features": x.shape[1], "threshold": threshold, "INPUTS": inputs, "num_warps": 8}
    return Launch((x.shape[0],), arguments | sizes)


def plan_add(lists: Lists, weight_t: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> Launch:
    tiles = lists.counts.shape[1]
    return Launch(
        (y.shape[0], triton.cdiv(y.shape[1], COLUMNS)),
        {
            "ids": lists.ids,
            "inputs": lists.inputs,
            "counts": lists.counts,
            "weight_t": weight_t,
            "bias": bias,
            "y": y,
            "rows": lists.ids.shape[1],
            "out_features": y.shape[1],
            "tiles": tiles,
            "STRIDE": lists.stride,
            "TILES": triton.next_power_of_2(tiles),
            "LISTED": LISTED,
            "COLUMNS": COLUMNS,
            "num_warps": 4,
        },
    )


def _run(kernel: Any, launch: Launch) -> None:
    kernel[launch.grid](**launch.arguments)


def pack(gate: torch.Tensor, shape: TwellShape, threshold: float) -> torch.Tensor:
    """:func:`.twell.pack` of what ``gate [M, hidden]`` lets through: words ``[M, tiles, words]`` int32, whose
    upper halves are 16 bits of gate's dtype."""
    words = gate.new_empty((gate.shape[0], shape.tiles, shape.words), dtype=torch.int32)
    if words.numel():
        _run(_pack, plan_pack(gate, words, shape, threshold))
    return words


def multiply_packed(
    x: torch.Tensor,
    words: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    up_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: Activation,
    shape: TwellShape,
) -> torch.Tensor:
    """``y [M, N]`` from a packed gate; ``gate`` is read for tiles alone that have overflowed."""
    y = x.new_empty((x.shape[0], down_t.shape[1]))
    lists = Lists.empty(gate, words, shape.words)
    if y.numel() and shape.tiles:
        _run(_neurons, plan_neurons(words, gate, x, up, up_bias, lists, shape, activation))
    return _added(lists, down_t, bias, y)


def multiply(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    up_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: Activation,
    shape: TwellShape,
) -> torch.Tensor:
    """:func:`.sparse_mlp.sparse_mlp_definition`; ``ValueError`` for dtypes other than bf16 and fp16, and for
    a gate in another one than x."""
    check(x, gate=gate, up=up, down_t=down_t)
    gate = gate.contiguous()
    words = pack(gate, shape, activation.threshold)
    return multiply_packed(x.contiguous(), words, gate, up, down_t, up_bias, bias, activation, shape)


def multiply_inputs(
    x: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """:func:`.sparse_input.sparse_input_definition`; ``ValueError`` for dtypes other than bf16 and fp16."""
    check(x, weight_t=weight_t)
    x = x.contiguous()
    y = x.new_empty((x.shape[0], weight_t.shape[1]))
    lists = Lists.empty(x, x.new_empty((x.shape[0], 1), dtype=torch.int32), 1)
    if y.numel():
        _run(_list, plan_list(x, lists, threshold))
    return _added(lists, weight_t, bias, y)


def check(x: torch.Tensor, **others: torch.Tensor) -> None:
    """``ValueError`` that names a tensor whose dtype the kernels do not take."""
    if x.dtype not in DTYPES:
        raise ValueError(f"activations {x.dtype} must be one of {DTYPES}")
    for name, tensor in others.items():
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be in the activations' {x.dtype}, not {tensor.dtype}")


def _added(lists: Lists, weight_t: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    if y.numel() and lists.counts.shape[1]:
        _run(_add, plan_add(lists, weight_t, bias, y))
    elif bias is not None:
        y.copy_(bias)
    else:
        y.zero_()
    return y
