"""The Hopper kernel that packs its output into TwELL's words, on the emulated machine."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from .build import build, why_not
from .cases import Case
from .launcher import Emulator, LinearArgs, Sm90Config, Twell
from .packed_gate import GATE, GATE_PREFILL, Packed, failure_of, overflows, unpacked
from .test_mutations import mutated

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulator: {REASON}")
INSTANCES = (GATE, GATE_PREFILL, unpacked(GATE), unpacked(GATE_PREFILL))


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return build(INSTANCES)


def case(*args: object, instance: object = GATE, **options: object) -> Case:
    return Case(instance, *args, dtype="bf16", **options)  # type: ignore[arg-type]


CASES = [
    *(
        packed
        for cluster in (1, 2, 4, 8)
        for packed in (
            Packed(case(cluster, 3, 512, (128,), (160,)), 0.05),
            Packed(case(cluster, 21, 400, (0,), (200,), bias=True), 0.3, 4),  # two token tiles
            Packed(case(cluster, 16, 640, (256,), (72,), bias=True), 0.5, 2),  # a ragged last tile
            Packed(case(cluster, 2, 128, (129,), (0,)), 0.02),  # one row in the last tile
        )
    ),
    Packed(case(2, 5, 1392, (1120,), (272,), rows=200), 0.1),  # input split
    Packed(case(2, 4, 512, (0,), (256,)), 1.0, 2),  # every positive one
    Packed(case(1, 40, 256, (384,), (384,), seeds=(1, 2)), 0.1, 4),  # many units
    *(
        Packed(case(cluster, 140, 384, (256,), (140,), instance=GATE_PREFILL, bias=True, seeds=(1, 2)), *how)
        for cluster, how in ((1, (0.05,)), (2, (0.4, 4)), (4, (0.2, 8)))
    ),
]


@pytest.mark.parametrize("packed", CASES, ids=str)
def test_the_words_are_the_definitions(emulator: Emulator, packed: Packed) -> None:
    assert failure_of(emulator, packed) == ""


def test_some_cases_overflow(emulator: Emulator) -> None:
    found = [overflows(emulator, packed) for packed in CASES]
    assert 4 <= sum(found) < len(found)


@pytest.mark.parametrize(
    ("sparse", "dense", "shards", "dtype", "twell", "status"),
    [
        ((64,), (64,), 1, 0, Twell(128, 8, 0.0), 1),
        ((128,), (128,), 1, 1, Twell(128, 8, 0.0), 2),
        ((128, 128), (0, 0), 2, 0, Twell(128, 8, 0.0), 1),
        ((128,), (64,), 1, 0, Twell(256, 8, 0.0), 1),
        ((128,), (64,), 1, 0, Twell(128, 3, 0.0), 1),
        ((128,), (64,), 1, 0, Twell(128, 8, -1.0), 1),
        ((0,), (65_664,), 1, 0, Twell(128, 8, 0.0), 1),
    ],
)
def test_what_no_kernel_computes_is_refused(
    emulator: Emulator,
    sparse: tuple[int, ...],
    dense: tuple[int, ...],
    shards: int,
    dtype: int,
    twell: Twell,
    status: int,
) -> None:
    args = LinearArgs(tokens=1, out_features=sum(sparse) + sum(dense), in_features=128, output_split=1)
    args.shards, args.out_dtype, args.twell, args.words = shards, dtype, twell, 4096
    args.sparse[:shards], args.dense[:shards] = sparse, dense
    assert (
        emulator.host.record(ctypes.byref(args), ctypes.byref(Sm90Config(128, 16, 1, False, True))) == status
    )


DEFECTS = {
    "a lane's values in front of those of the lanes before": (
        "int place = end - count;",
        "int place = end;",
        0.3,
        "an output is written twice",
    ),
    "an overflow that is not written": ("if (over && rows > 0)", "if (over && rows > 8)", 0.3, "is lost"),
    "a mask of the other half of the warp": (
        "<< (lane - own);",
        "<< (16 - lane + own);",
        0.3,
        "is not in its mask",
    ),
    "no zeros behind the values": (
        "i < room; i += kLanes) words[1 + i] = 0;",
        "i < 0; ++i) words[1 + i] = 0;",
        0.05,
        "words are wrong",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_seen(name: str, tmp_path: Path) -> None:
    old, new, density, seen = DEFECTS[name]
    kernels = mutated(old, new, tmp_path, "*.cuh")
    packed = Packed(case(2, 5, 256, (128,), (72,), seeds=(1,)), density)
    assert seen in failure_of(build((GATE, unpacked(GATE)), kernels), packed)
