"""The PTX of the 4-bit kernels on the emulated machine: both ways to look codes up against the definition."""

from __future__ import annotations

import ctypes

import pytest

from .build import why_not
from .four_bit import Case, FourBitArgs, FourBitEmulator, failure_of

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulator: {REASON}")


@pytest.fixture(scope="module")
def emulator() -> FourBitEmulator:
    return FourBitEmulator.build()


CASES = [
    case
    for shuffle in (True, False)
    for case in (
        Case(1, 16, 128, shuffle=shuffle),
        Case(3, 20, 320, dtype="fp16", bias=True, shuffle=shuffle),  # ragged rows, warps without columns
        Case(8, 33, 96, 32, bias=True, shuffle=shuffle),
        Case(9, 17, 160, 16, dtype="fp16", shuffle=shuffle),
        Case(21, 40, 1184, bias=True, shuffle=shuffle),  # two tiles of tokens; a second step, of one warp
        Case(2, 16, 2048, 256, shuffle=shuffle),
        Case(0, 3, 96, shuffle=shuffle),
        Case(0, 37, 160, 16, dtype="fp16", shuffle=shuffle),
        Case(0, 5, 1056, 32, dtype="fp32", shuffle=shuffle),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_compute_the_layer(emulator: FourBitEmulator, case: Case) -> None:
    assert failure_of(emulator, case) == ""


@pytest.mark.parametrize(("columns", "shift", "dtype"), [(48, 6, 0), (64, 3, 0), (64, 6, 2), (0, 6, 0)])
def test_what_no_kernel_computes_is_refused(
    emulator: FourBitEmulator, columns: int, shift: int, dtype: int
) -> None:
    args = FourBitArgs(tokens=1, out_features=16, in_features=columns, block_shift=shift, dtype=dtype)
    assert emulator.host.record(ctypes.byref(args), False, True) == 1
