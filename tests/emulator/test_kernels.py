"""The Hopper kernel's PTX on the emulated machine: tile kinds, splits and cluster sizes against float64."""

from __future__ import annotations

import pytest

from .build import build, why_not
from .cases import DECODE, INSTANCES, PAIR, PAIR_PREFILL, PREFILL, PREFILL_LARGE, WIDE, Case, failure_of
from .launcher import Emulator, Instance

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulator: {REASON}")


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return build(INSTANCES)


def decode_cases(instance: Instance, cluster: int) -> list[Case]:
    """K is split over the cluster."""
    tile = instance.tokens

    def case(*args: object, **options: object) -> Case:
        return Case(instance, cluster, *args, **options)

    return [
        case(3, 512, (96,), (160,)),
        case(tile, 1392, (1120,), (272,), rows=200),  # input split, ragged K
        case(tile + 5, 400, (40, 24), (30, 33), bias=True, dtype="bf16"),  # two shards, two token tiles
        case(7, 2064, (1048,), (1016,), rows=130, dtype="fp16", bias=True),
        case(2, 128, (0,), (64,)),  # one stage: most CTAs of the cluster have none
        case(2, 5120, (64,), (64,)),  # more stages than slots
        case(40, 640, (300, 300), (200, 200), seeds=(1, 2)),  # many units per cluster
    ]


def prefill_cases(cluster: int) -> list[Case]:
    """x is multicast over the cluster."""
    return [
        Case(PREFILL, cluster, 130, 512, (140,), (130,), seeds=(1, 2)),
        Case(PREFILL, cluster, 200, 1104, (592,), (512,), rows=200, bias=True, dtype="bf16", seeds=(1, 2)),
        Case(PREFILL_LARGE, cluster, 300, 400, (200,), (150,), seeds=(1, 2)),
        Case(PREFILL_LARGE, cluster, 257, 656, (336,), (320,), rows=300, seeds=(1,)),
    ]


def paired_cases(cluster: int) -> list[Case]:
    """silu(gate) * up, with the largest |y| of each token."""
    return [
        Case(PAIR, cluster, 13, 512, (72, 72), (88, 88), bias=True, dtype="bf16"),
        Case(PAIR, cluster, 20, 528, (64, 64), (0, 0)),
        Case(PAIR, cluster, 3, 528, (0, 0), (70, 70), dtype="fp16"),
        Case(PAIR_PREFILL, cluster, 140, 400, (100, 100), (77, 77), seeds=(1, 2)),
    ]


CASES = [
    *(case for instance in DECODE for cluster in (1, 2, 4, 8) for case in decode_cases(instance, cluster)),
    Case(WIDE, 1, 100, 768, (100,), (90,)),
    Case(WIDE, 2, 128, 1040, (528,), (512,), rows=64),
    *(case for cluster in (1, 2, 4) for case in prefill_cases(cluster) + paired_cases(cluster)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_computes_the_layer(emulator: Emulator, case: Case) -> None:
    assert failure_of(emulator, case) == ""
