"""PTX that looks 4-bit codes up by shuffles. Text only, no Triton.

Lane i of a warp holds entry i mod 16 of the table. ``shfl.sync.idx`` in halves of a warp (0x101f) reads the
low four bits of a lane's index alone, so a code needs a shift, but no mask. All lanes of a warp take part:
loops and branches of the kernel depend on nothing that differs between them.
"""

from __future__ import annotations


def _shuffle(out: int, codes: str, entry: int) -> str:
    return f"shfl.sync.idx.b32 ${out}, ${entry}, {codes}, 0x101f, 0xffffffff;"


def _ptx(registers: str, lines: list[str]) -> str:
    return "{\n" + registers + "\n" + "\n".join(lines) + "\n}"


def table_entry() -> str:
    """Output 0: the lane's entry of the table at address 1."""
    return _ptx(
        ".reg .b32 lane;\n.reg .b64 address;",
        [
            "mov.u32 lane, %laneid;",
            "and.b32 lane, lane, 15;",
            "mad.wide.u32 address, lane, 4, $1;",
            "ld.global.nc.f32 $0, [address];",
        ],
    )


def look_up_bytes() -> str:
    """Outputs 0-3, 4-7: first and second codes of four bytes; inputs 8: the bytes; 9-12: the lane's entry."""
    lines = []
    for element in range(4):
        for out, nibble in ((element, 2 * element + 1), (4 + element, 2 * element)):
            lines += [f"shr.b32 c, $8, {4 * nibble};", _shuffle(out, "c", 9)]
    return _ptx(".reg .b32 c;", lines)


def look_up_groups() -> str:
    """Outputs 0-3: the four codes of a group; inputs 4: 16 bits of codes, the first lowest; 5: the entry."""
    lines = []
    for position in range(4):
        lines += [f"shr.b32 c, $4, {4 * position};", _shuffle(position, "c", 5)]
    return _ptx(".reg .b32 c;", lines)
