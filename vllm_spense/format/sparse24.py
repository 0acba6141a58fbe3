"""2:4 compression: two kept values and one metadata nibble for every group of four weights.

The nibble is ``i0 | i1 << 2`` with ``i0 < i1``, the positions of the kept values inside the group;
the even group of a byte sits in its low nibble. Only six nibbles are legal. Where a group has fewer
than two non-zeros, zeros with the lowest positions fill up, so one matrix has exactly one encoding.
"""

from __future__ import annotations

import torch

from vllm_spense.format.layout import GROUP, META_GROUP

LEGAL_NIBBLES = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)
_CACHED_BYTES = 1 << 19
"""Decompressed in one go on a CPU: stays in the cache."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def legal_meta_bytes() -> torch.Tensor:
    """Boolean table [256]: whether both nibbles of a metadata byte are legal."""
    nibble = torch.zeros(16, dtype=torch.bool)
    nibble[list(LEGAL_NIBBLES)] = True
    byte = torch.arange(256)
    return nibble[byte & 15] & nibble[byte >> 4]


def compress(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compress a 2:4 matrix ``[rows, cols]`` of any dtype of 1, 2 or 4 bytes.

    Returns ``values [rows, cols / 2]`` in the same dtype and ``meta [rows, cols / 8]`` uint8.
    Negative zero counts as zero and is stored as +0. Raises ``ValueError`` if ``cols`` is no multiple
    of 8 or a group holds more than two non-zeros.
    """
    rows, cols = weight.shape
    if cols % META_GROUP:
        raise ValueError(f"{cols} columns are no multiple of {META_GROUP}")
    bits = _BITS[weight.element_size()]
    groups = weight.contiguous().view(bits).view(rows, cols // GROUP, GROUP)
    eight_bit_float = weight.element_size() == 1 and weight.dtype.is_floating_point  # some cannot be compared
    nonzero = (groups & 0x7F) != 0 if eight_bit_float else (weight != 0).view_as(groups)
    if groups.numel() and int(nonzero.sum(-1).max()) > 2:
        bad = int((nonzero.sum(-1) > 2).any(-1).nonzero()[0])
        raise ValueError(f"row {bad} has a group of {GROUP} with more than two non-zeros")
    first = torch.argsort((~nonzero).to(torch.int8), dim=-1, stable=True)[..., :2]
    index = first.sort(-1).values
    kept = torch.gather(groups, -1, index)
    kept = torch.where(torch.gather(nonzero, -1, index), kept, torch.zeros_like(kept))
    nibble = (index[..., 0] | index[..., 1] << 2).to(torch.uint8)
    meta = nibble[:, 0::2] | nibble[:, 1::2] << 4
    return kept.reshape(rows, cols // 2).view(weight.dtype), meta.contiguous()


def decompress(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`compress`: the matrix ``[rows, cols]`` with its zeros written out."""
    rows, half = values.shape
    if meta.shape != (rows, half * 2 // META_GROUP):
        raise ValueError(f"meta {tuple(meta.shape)} does not fit values {tuple(values.shape)}")
    if not values.numel():
        return values.new_empty(rows, half * 2)
    bits = values.contiguous().view(_BITS[values.element_size()])
    if bits.element_size() > 1:
        return _scattered(bits, meta).view(values.dtype)
    if bits.device.type != "cpu":
        return _shifted(bits, meta).view(values.dtype)
    out = torch.empty(rows, half * 2, dtype=bits.dtype)
    step = max(1, _CACHED_BYTES // max(1, half * 2))
    for part, nibbles, target in zip(bits.split(step), meta.split(step), out.split(step), strict=True):
        target.copy_(_shifted(part, nibbles))
    return out.view(values.dtype)


def _nibbles(meta: torch.Tensor) -> torch.Tensor:
    """``[rows, groups]`` uint8."""
    return torch.stack((meta & 15, meta >> 4), dim=-1).flatten(1)


def _scattered(bits: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    nibble = _nibbles(meta)
    index = torch.stack((nibble & 3, nibble >> 2), dim=-1).long()
    out = torch.zeros(*nibble.shape, GROUP, dtype=bits.dtype, device=bits.device)
    return out.scatter_(-1, index, bits.view(*nibble.shape, 2)).flatten(1)


def _shifted(bytes_: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """For values of a byte: a group is one word of four bytes, into which both are shifted."""
    nibble = _nibbles(meta).int()
    pair = bytes_.view(torch.int16).int()
    first = (pair & 0xFF) << (nibble & 3) * 8
    second = (pair >> 8 & 0xFF) << (nibble >> 2) * 8
    return (first | second).view(torch.uint8)


def magnitude_mask(score: torch.Tensor) -> torch.Tensor:
    """Boolean mask [rows, cols] that keeps the two highest scores of each group of four.

    Ties keep the earlier position, so the mask does not depend on the device or the batch.
    """
    rows, cols = score.shape
    groups = score.reshape(rows, cols // GROUP, GROUP)
    keep = torch.argsort(groups, dim=-1, descending=True, stable=True)[..., :2]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=score.device)
    return mask.scatter_(-1, keep, True).view(rows, cols)
