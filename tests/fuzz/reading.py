"""A second, slow reader of Spense checkpoints: numpy and struct only, nothing of the project.

What the plugin loads must be what this says the files hold. Written from docs/format.md.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
PAIRS = {4: (0, 1), 8: (0, 2), 12: (0, 3), 9: (1, 2), 13: (1, 3), 14: (2, 3)}
"""Legal nibbles: the positions of the two values of a group of four."""
_POSITION = [np.array([PAIRS.get(code, (0, 0))[place] for code in range(16)]) for place in range(2)]
_WIDTH = {"F8_E4M3": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4}


class InvalidError(Exception):
    """The files hold no Spense checkpoint; the product must refuse them, too."""


@dataclass
class Linear:
    """``stored [N, K]`` fp32 without scale, zeros written out; ``scale``, ``bias``: ``[N]`` fp32 or None."""

    stored: Array
    scale: Array | None
    bias: Array | None
    sparse: int
    split: str


def e4m3() -> Array:
    """Value of each of the 256 bytes: 1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7F and 0xFF are NaN."""
    table = np.zeros(256, dtype=np.float32)
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        value = (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        table[byte] = np.nan if byte & 0x7F == 0x7F else (-value if byte >> 7 else value)
    return table


_E4M3 = e4m3()


def read(directory: Path) -> tuple[dict[str, Linear], dict[str, Array]]:
    """Every module of ``quantization_config``, and every tensor, by name; raises :class:`InvalidError`."""
    try:
        config = json.loads((directory / "config.json").read_bytes())["quantization_config"]
        tensors = _read_tensors(directory)
        fp8 = config["weight_dtype"] == "float8_e4m3fn"
        linears = {name: _linear(name, spec, tensors, fp8) for name, spec in config["modules"].items()}
        return linears, tensors
    except InvalidError:
        raise
    except (KeyError, ValueError, TypeError, OSError, RecursionError, struct.error, AttributeError) as error:
        raise InvalidError(repr(error)) from error


def _linear(name: str, spec: dict[str, Any], tensors: dict[str, Array], fp8: bool) -> Linear:
    rows, columns, split = spec["out_features"], spec["in_features"], spec["split"]
    stored = np.full((rows, columns), np.nan, dtype=np.float32)
    sparse = spec["sparse"]
    by_rows = split == "output"
    if sparse:
        values, meta = tensors[f"{name}.sparse_values"], tensors[f"{name}.sparse_meta"]
        target = stored[:sparse] if by_rows else stored[:, :sparse]
        target[...] = 0
        nibbles = np.stack([meta & 15, meta >> 4], axis=-1).reshape(len(meta), -1)
        if not np.isin(nibbles, list(PAIRS)).all():
            raise InvalidError(f"{name}: an illegal nibble")
        groups = 4 * np.arange(nibbles.shape[1])
        for place in range(2):
            position = _POSITION[place][nibbles]
            np.put_along_axis(target, groups + position, values[:, place::2], axis=1)
        if values.shape != (target.shape[0], target.shape[1] // 2):
            raise InvalidError(f"{name}: shape of values")
    if spec["dense"]:
        dense = tensors[f"{name}.dense_weight"]
        target = stored[sparse:] if by_rows else stored[:, sparse:]
        if dense.shape != target.shape:
            raise InvalidError(f"{name}: shape of the dense region")
        target[...] = dense
    scale = tensors[f"{name}.weight_scale"] if fp8 else None
    bias = tensors[f"{name}.bias"] if spec.get("bias") else None
    for what in (stored, scale, bias):
        if what is not None and not np.isfinite(what).all():
            raise InvalidError(f"{name}: NaN or infinity")
        if what is not None and what.shape[0] != rows:
            raise InvalidError(f"{name}: shape of a vector")
    if scale is not None and not (scale > 0).all():
        raise InvalidError(f"{name}: scale")
    return Linear(stored, scale, bias, sparse, split)


def _read_tensors(directory: Path) -> dict[str, Array]:
    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    found: dict[str, Array] = {}
    for name in names:
        data = (directory / name).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        payload = memoryview(data)[8 + length :]
        for tensor, entry in header.items():
            if tensor != "__metadata__" and entry["dtype"] in _WIDTH:
                start, end = entry["data_offsets"]
                found[tensor] = _array(payload[start:end], entry["dtype"], entry["shape"])
    return found


def _array(data: memoryview, dtype: str, shape: list[int]) -> Array:
    raw = np.frombuffer(data, dtype=np.uint8)
    if len(raw) != _WIDTH[dtype] * int(np.prod(shape)):
        raise InvalidError("offsets do not fit the shape")
    if dtype == "U8":
        flat: Array = raw
    elif dtype == "F8_E4M3":
        flat = _E4M3[raw]
    elif dtype == "BF16":
        flat = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        flat = raw.view("<f2" if dtype == "F16" else "<f4").astype(np.float32)
    return flat.reshape(shape)
