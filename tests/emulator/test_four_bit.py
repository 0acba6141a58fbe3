"""The PTX of the 4-bit kernels on the emulated machine: both ways to look codes up against the definition."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from .build import why_not
from .four_bit import Case, FourBitArgs, FourBitEmulator, failure_of
from .test_mutations import mutated

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulator: {REASON}")


@pytest.fixture(scope="module")
def emulator() -> FourBitEmulator:
    return FourBitEmulator.build()


CASES = [
    case
    for shuffle in (True, False)
    for case in (
        Case(1, (0,), (16,), 128, shuffle=shuffle),
        Case(3, (0, 0), (13, 7), 320, dtype="fp16", bias=True, shuffle=shuffle),  # warps without columns
        Case(9, (0,), (17,), 160, block=16, dtype="fp16", shuffle=shuffle),
        Case(21, (0,), (40,), 1184, bias=True, shuffle=shuffle),  # tiles of tokens; one warp steps twice
        Case(2, (0,), (16,), 2048, block=256, shuffle=shuffle),
        Case(1, (16,), (0,), 128, shuffle=shuffle),
        Case(5, (33,), (20,), 96, block=16, bias=True, shuffle=shuffle),
        Case(17, (20, 5, 0, 16), (3, 16, 7, 0), 352, block=32, dtype="fp16", bias=True, shuffle=shuffle),
        Case(2, (1184,), (96,), 18, "input", bias=True, shuffle=shuffle),
        Case(3, (96,), (32,), 33, "input", block=16, dtype="fp16", shuffle=shuffle),
        Case(4, (64,), (0,), 16, "input", shuffle=shuffle),
        Case(0, (0,), (3,), 96, shuffle=shuffle),
        Case(0, (0,), (37,), 160, block=16, dtype="fp16", shuffle=shuffle),
        Case(0, (0,), (5,), 1056, block=32, dtype="fp32", shuffle=shuffle),
        Case(0, (20, 5, 0, 16), (3, 16, 7, 0), 160, block=32, shuffle=shuffle),
        Case(0, (96,), (64,), 21, "input", block=16, dtype="fp16", shuffle=shuffle),
        Case(0, (9,), (0,), 96, dtype="fp32", shuffle=shuffle),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_compute_the_layer(emulator: FourBitEmulator, case: Case) -> None:
    assert failure_of(emulator, case) == ""


@pytest.mark.parametrize(("columns", "shift", "dtype"), [(48, 6, 0), (64, 3, 0), (64, 6, 2)])
def test_what_no_kernel_computes_is_refused(
    emulator: FourBitEmulator, columns: int, shift: int, dtype: int
) -> None:
    args = FourBitArgs(tokens=1, out_features=16, in_features=columns, output_split=1, shards=1, dtype=dtype)
    args.dense[0], args.dense_weight.rows, args.dense_weight.columns = 16, 16, columns
    args.dense_weight.block_shift = shift
    assert emulator.host.record(ctypes.byref(args), False, True) == 1


DEFECTS = {
    "sums read before all are there": (
        "  __syncthreads();\n  for (int i = threadIdx.x;",
        "  for (int i = threadIdx.x;",
        Case(3, (0,), (16,), 1024),
        "results are wrong",
    ),
    "rows beyond the region": (
        "min(row + group + 8, end - 1)",
        "row + group + 8",
        Case(3, (0,), (20,), 128),
        "is in no buffer",
    ),
    "the second value of a group at another place": (
        "position == nibble >> 2 ? 0x32",
        "position == (nibble >> 2 ^ 1) ? 0x32",
        Case(3, (16,), (0,), 128),
        "results are wrong",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_seen(name: str, tmp_path: Path) -> None:
    old, new, case, seen = DEFECTS[name]
    kernels = mutated(old, new, tmp_path, "four_bit*.cuh")
    assert seen in failure_of(FourBitEmulator.build(kernels), case)
