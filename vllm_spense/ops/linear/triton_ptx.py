"""PTX for four metadata bytes at a time: byte permutes instead of shifts. Text only, no Triton.

``prmt d, a, b, s`` picks each byte of d from the eight bytes of a (0-3) and b (4-7) by a nibble of s. It
serves twice: to look up selectors by metadata nibble, and to place values by selector (b = 0: zeros).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vllm_spense.format.sparse24 import LEGAL_NIBBLES


def _table(entry: Callable[[int, int], int]) -> str:
    """Eight bytes as two ``prmt`` operands, indexed by the hash ``(n ^ n >> 1) & 7`` of a nibble.

    The hash separates the six legal nibbles and leaves bit 3, which means "sign" to ``prmt``, clear.
    """
    table = [0] * 8
    for nibble in LEGAL_NIBBLES:
        table[(nibble ^ nibble >> 1) & 7] = entry(nibble & 3, nibble >> 2)
    low, high = (int.from_bytes(bytes(part), "little") for part in (table[:4], table[4:]))
    return f"{low:#010x}, {high:#010x}"


def _source(position: int, first: int, second: int, codes: tuple[int, int, int]) -> int:
    """Selector code of one position of a group: of its first value, its second value, or zero."""
    return codes[0] if position == first else codes[1] if position == second else codes[2]


def _hash(meta: str) -> list[str]:
    """``h0``, ``h1``: hashes of the eight nibbles of a register, four in the low half of each."""
    return [
        f"shr.b32 h0, {meta}, 1;",
        f"xor.b32 h0, h0, {meta};",
        "and.b32 h0, h0, 0x77777777;",
        "shr.b32 h1, h0, 16;",
    ]


def _ptx(registers: str, lines: list[str]) -> str:
    return "{\n.reg .b32 " + registers + ";\n" + "\n".join(lines) + "\n}"


def spread_bytes() -> str:
    """Outputs 0-3, 4-7: words of the even and odd groups; inputs 8-11: four values each; 12: metadata."""
    lines = _hash("$12")
    for name, positions in (("p", (0, 1)), ("q", (2, 3))):
        table = _table(
            lambda i, j, pair=positions: sum(  # type: ignore[misc]
                _source(p, i, j, (0, 1, 4)) << 4 * (p & 1) for p in pair
            )
        )
        lines += [f"prmt.b32 {name}{half}, {table}, h{half};" for half in (0, 1)]
    for element in range(4):
        half, byte = element // 2, element % 2 * 2
        p, q = f"p{half}", f"q{half}"
        lines += [
            f"prmt.b32 s, {p}, {q}, {byte | byte + 4 << 4:#x};",
            f"prmt.b32 ${element}, ${8 + element}, 0, s;",
            f"prmt.b32 s, {p}, {q}, {byte + 1 | byte + 5 << 4:#x};",
            "xor.b32 s, s, 0x2222;",  # values 2, 3 instead of 0, 1; zero stays zero
            f"prmt.b32 ${4 + element}, ${8 + element}, 0, s;",
        ]
    return _ptx("h0, h1, p0, p1, q0, q1, s", lines)


class _Half(NamedTuple):
    """Constants of a 16-bit float type, twice in a word: see :func:`_widen` for the method."""

    ptx: str
    shift: int
    magnitude: int
    bias: int
    two: int
    minus_least_normal: int


BF16 = _Half("bf16x2", 4, 0x07F007F0, 0x3C003C00, 0x40004000, 0xBC80BC80)
FP16 = _Half("f16x2", 1, 0x3F803F80, 0x20002000, 0x40004000, 0xA400A400)


def _constants(half: _Half) -> list[str]:
    return [f"mov.b32 two, {half.two:#x};", f"mov.b32 least, {half.minus_least_normal:#x};"]


def _widen_pair(half: _Half, out: str, source: str, pair: int) -> list[str]:
    """Two e4m3 bytes of ``source`` (the low or the high pair) to two halves of ``out``."""
    return [
        f"prmt.b32 t, {source}, 0, {0x3424 if pair else 0x1404:#x};",
        f"shr.b32 u, t, {half.shift};",
        f"and.b32 u, u, {half.magnitude:#x};",
        f"add.u32 u, u, {half.bias:#x};",
        f"fma.rn.{half.ptx} w, u, two, least;",
        f"min.{half.ptx} u, u, w;",
        "and.b32 t, t, 0x80008000;",
        f"or.b32 {out}, t, u;",
    ]


def spread_halves(half: _Half) -> str:
    """Outputs 0-15: word i of element e is 4 i + e; inputs 16-19: four values each; 20: metadata.

    Values are widened before they are placed: half as many as afterwards.
    """
    lines = _hash("$20") + _constants(half)
    for p in range(4):
        table = _table(lambda i, j, p=p: _source(p, i, j, (0x10, 0x32, 0x44)))  # type: ignore[misc]
        lines += [f"prmt.b32 s{p}{h}, {table}, h{h};" for h in (0, 1)]
    for element in range(4):
        for group in (0, 1):
            lines += _widen_pair(half, "v", f"${16 + element}", group)
            byte = element % 2 * 2 + group
            for word in (0, 1):
                low, high = f"s{2 * word}{element // 2}", f"s{2 * word + 1}{element // 2}"
                out = 4 * (2 * group + word) + element
                lines += [
                    f"prmt.b32 t, {low}, {high}, {byte | byte + 4 << 4:#x};",
                    f"prmt.b32 ${out}, v, 0, t;",
                ]
    tables = ", ".join(f"s{p}{h}" for p in range(4) for h in (0, 1))
    return _ptx(f"h0, h1, {tables}, t, u, v, w, two, least", lines)


def widen_bytes(half: _Half) -> str:
    """Outputs 0, 1: four halves; input 2: four e4m3 bytes."""
    lines = _constants(half)
    for pair in (0, 1):
        lines += _widen_pair(half, f"${pair}", "$2", pair)
    return _ptx("t, u, w, two, least", lines)
