"""The PTX of the kernels for activation-sparse MLPs on the emulated machine, against the definition."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from tests.mlps import ACTIVATIONS

from .build import why_not
from .launcher import Twell
from .sparse_mlp import INPUT, Case, SparseMlpArgs, SparseMlpEmulator, failure_of, inputs_failure_of
from .test_mutations import mutated

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulator: {REASON}")


@pytest.fixture(scope="module")
def emulator() -> SparseMlpEmulator:
    return SparseMlpEmulator.build()


CASES = [
    *(Case(2, 72, 304, 40, activation=act, bias=True, full=(1,)) for act in ACTIVATIONS),
    *(
        Case(2, 40, 2 * tile + 24, 72, tile=tile, share=s, full=(0,))
        for tile in (128, 256)
        for s in (8, 4, 2)
    ),
    Case(1, 8, 8, 8, 0.5),
    Case(1, 1048, 256, 136, 0.05),  # more than a warp's step of up, two blocks of y
    Case(3, 2048, 520, 64, 0.02, tile=128, bias=True),
    Case(1, 16, 1200, 64, 0.3, share=2),  # more rows of down than a step
    Case(2, 24, 304, 16, 0.0, bias=True),
    Case(2, 24, 304, 16, 1.0),
    Case(2, 24, 304, 16, nan=True),
    Case(2, 24, 304, 16, nan=True, full=(0, 1)),
    Case(1, 0, 64, 16, 0.2, bias=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_compute_the_mlp(emulator: SparseMlpEmulator, case: Case) -> None:
    assert failure_of(emulator, case) == ""


@pytest.mark.parametrize("share", [8, 2])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [(1, 304, 40), (3, 512, 72), (1, 8, 8)], ids=str)
def test_inputs_of_a_plain_layer(
    emulator: SparseMlpEmulator, sizes: tuple[int, int, int], threshold: float, share: int
) -> None:
    tokens, features, outputs = sizes
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(tokens, features, generator=generator).bfloat16()
    x[:, ::3] = 0
    weight_t = torch.randn(features, outputs, generator=generator).bfloat16()
    assert inputs_failure_of(emulator, x, weight_t, threshold, share) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"neurons": 20},
        {"out_features": 12},
        {"in_features": 12},
        {"neurons": 65_536},
        {"twell": Twell(64, 8, 0.0)},
        {"twell": Twell(256, 16, 0.0)},
        {"twell": Twell(256, 8, -0.5)},
        {"twell": Twell(256, 8, float("nan"))},
        {"kind": INPUT},
        {"kind": 7},
        {"up": None},
    ],
    ids=" ".join,  # names alone: a structure shows its address
)
def test_what_no_kernel_computes_is_refused(emulator: SparseMlpEmulator, change: dict[str, object]) -> None:
    args = SparseMlpArgs(1, 16, 64, 16, Twell(256, 8, 0.0), 0, x=4096, up=4096)
    for name, value in change.items():
        setattr(args, name, value)
    assert emulator.host.record(ctypes.byref(args), False) == 1


DEFECTS = {
    "entries read before all are there": (
        "  __syncthreads();\n  return count;",
        "  return count;",
        Case(1, 16, 256, 16, 1.0),
        "",
    ),
    "an overflow taken as it is": (
        "if (count < p.twell.words()) {",
        "if (true) {",
        Case(1, 16, 256, 16, 1.0),
        "",
    ),
    "lists one behind the other": (
        "count_before(words, stride, tile);",
        "count_before(words, stride, tile + 1);",
        Case(1, 16, 512, 16, 0.2, share=2),
        "",
    ),
    "NaN closed": (
        "return !(value <= threshold);",
        "return value > threshold;",
        Case(1, 16, 64, 8, nan=True),
        "words",
    ),
    "sums read before all are there": (
        "own[1] = {sums[4], sums[5], sums[6], sums[7]};\n  __syncthreads();",
        "own[1] = {sums[4], sums[5], sums[6], sums[7]};",
        Case(1, 16, 1200, 64, 0.3, share=2),
        "",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_seen(name: str, tmp_path: Path) -> None:
    old, new, case, seen = DEFECTS[name]
    kernels = mutated(old, new, tmp_path, "*.cuh")
    failure = failure_of(SparseMlpEmulator.build(kernels), case, (1, 2, 3, 4))
    assert failure
    assert seen in failure
