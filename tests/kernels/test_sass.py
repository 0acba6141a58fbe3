"""Metadata registers of wgmma.sp stay as they are until the tensor cores have read them."""

from __future__ import annotations

import re

import pytest

from tests.kernels.sass import disassembly, instructions, overwritten

LOOP = """
        /*0000*/                   LDS R60, [R8] ;             /* 0x0000000000007984 */
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   QGMMA.SP.64x8x64.F32.E4M3.E4M3 R24, gdesc[UR8], R24, R60, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, {waits} ;
        /*0040*/                   LDS{width} {other}, [R8+0x8] ;
        /*0050*/                   QGMMA.SP.64x8x64.F32.E4M3.E4M3 R24, gdesc[UR8], R24, {other}, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, {waits} ;
        /*0070*/                   ISETP.GE.AND P5, PT, R60, R97, PT ;
        /*0080*/              @!P5 BRA 0x0 ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/               @P1 SHFL.BFLY P5, R60, R26, R9, R10 ;
        /*00b0*/                   EXIT ;
"""
"""Two stages a turn; the first load of the second turn must find its register free."""


def loop(other: str = "R61", waits: str = "0x1", width: str = "") -> str:
    return LOOP.format(other=other, waits=waits, width=width)


def test_two_sets_take_turns() -> None:
    assert overwritten(loop()) == []
    assert overwritten(loop("R60", waits="0x0")) == [], "one set is enough if every stage waits"


@pytest.mark.parametrize(
    ("sass", "written"),
    [
        (loop("R60"), ["0x0 LDS R60, [R8] writes R60", "0x40 LDS R60, [R8+0x8] writes R60"]),
        (loop("R59", width=".64"), ["0x40 LDS.64 R59, [R8+0x8] writes R60"]),
        (loop("R26"), ["0x20 QGMMA.SP.64x8x64.F32.E4M3.E4M3 R24, gdesc[UR8], R24, R60, gsb0 writes R26"]),
        (loop(waits="0x2"), ["0x0 LDS R60, [R8] writes R60", "0x40 LDS R61, [R8+0x8] writes R61"]),
        (
            loop().replace("gsb0, 0x0", "gsb0, 0x1").replace("R60, R26", "R61, R26"),
            ["0xa0 SHFL.BFLY P5, R61, R26, R9, R10 writes R61"],
        ),
    ],
    ids=["one set", "wide load", "accumulator", "late wait", "behind the loop"],
)
def test_registers_in_flight_are_seen(sass: str, written: list[str]) -> None:
    found = overwritten(sass)
    assert [line for line in found if line in written] == written


def test_what_cannot_be_followed_is_refused() -> None:
    compare = "ISETP.GE.AND P5, PT, R60, R97, PT"
    with pytest.raises(ValueError, match="BRX at 0x70: a jump"):
        overwritten(loop().replace(compare, "BRX R2"))
    with pytest.raises(ValueError, match=r"0x70: CALL.REL.NOINC with wgmmas in flight"):
        overwritten(loop().replace(compare, "CALL.REL.NOINC 0xb0"))
    with pytest.raises(ValueError, match="without a wait"):
        overwritten(loop().replace("WARPGROUP.DEPBAR.LE", "NOP"))


def test_metadata_is_not_overwritten_in_flight() -> None:
    kernels = disassembly()
    assert kernels
    for name, sass in kernels.items():
        metadata = [i.metadata for i in instructions(sass) if i.metadata is not None]
        assert len(metadata) in (4, 8), name
        assert len(set(metadata)) == len(metadata), f"{name}: no two sets of registers"
        assert overwritten(sass) == [], name


def test_the_check_sees_it_in_a_kernel_of_ours() -> None:
    """The second set of registers renamed to the first: what a compiler may do without the source's fence."""
    for name, sass in disassembly().items():
        registers = [i.metadata for i in instructions(sass) if i.metadata is not None]
        half = len(registers) // 2
        for first, second in zip(registers[:half], registers[half:], strict=True):
            sass = re.sub(rf"\bR{second}\b", f"R{first}", sass)
        found = overwritten(sass)
        loads = {f"LDS R{r}" for r in registers[:half]}
        assert {load for load in loads if any(load in line for line in found)} == loads, name
