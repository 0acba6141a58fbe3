"""How values are stored: the codecs by their names in config.json, and the registry that knows them."""

from __future__ import annotations

from typing import TypeVar

from vllm_spense.format.codecs.base import Codec, RowCodec, Stored
from vllm_spense.format.codecs.bf16 import Bf16
from vllm_spense.format.codecs.four_bit import FourBit, Fp4, Nf4
from vllm_spense.format.codecs.fp8 import Fp8
from vllm_spense.format.codecs.int8 import Int8

__all__ = [
    "BF16",
    "FP4",
    "FP8",
    "INT8",
    "NF4",
    "Codec",
    "FourBit",
    "RowCodec",
    "Stored",
    "codec",
    "codec_names",
    "register",
    "tensor_names",
]

AnyCodec = TypeVar("AnyCodec", bound=Codec)
_CODECS: dict[str, Codec] = {}


def register(new: AnyCodec) -> AnyCodec:
    """Make a codec known by its name; ``ValueError`` if another one has it."""
    if _CODECS.setdefault(new.name, new) is not new:
        raise ValueError(f"there is a codec {new.name!r} already")
    return new


def codec(name: str) -> Codec:
    """The codec of that name; ``ValueError`` names those that there are."""
    if name not in _CODECS:
        raise ValueError(f"unknown codec {name!r} (known: {', '.join(_CODECS)})")
    return _CODECS[name]


def codec_names() -> tuple[str, ...]:
    """Names of all registered codecs, in the order of their registration."""
    return tuple(_CODECS)


def tensor_names() -> frozenset[str]:
    """Last parts of the names of all that codecs store: none passes for a tensor of the model's own."""
    found = {name for known in _CODECS.values() for name in known.names}
    companions = {name for known in _CODECS.values() for name in known.companions}
    return frozenset(found | {f"{region}_{name}" for region in ("sparse", "dense") for name in companions})


FP8 = register(Fp8())
BF16 = register(Bf16())
INT8 = register(Int8())
NF4 = register(Nf4())
FP4 = register(Fp4())
