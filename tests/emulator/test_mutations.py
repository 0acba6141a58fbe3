"""Kernels with one defect each: unless the emulator sees it, its passing says nothing about the real ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from .build import KERNELS, build, why_not
from .cases import DECODE, INSTANCES, Case, failure_of

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulator: {REASON}")

# More stages than slots in each CTA: slots are used again.
LONG = Case(DECODE[0], 2, 3, 7680, (64,), (64,), clusters_fit=1, seeds=(1, 2, 3, 4))
SHORT = Case(DECODE[0], 2, 16, 1024, (64,), (64,), clusters_fit=1)
# One stage and 32 tiles one after another: the CTAs of a cluster meet in the epilogue only.
MANY_TILES = Case(DECODE[0], 2, 64, 128, (0,), (256,), clusters_fit=1, seeds=tuple(range(1, 9)))


class Mutation(NamedTuple):
    old: str
    new: str
    case: Case
    seen: str  # the report matches this


MUTATIONS = {
    "metadata of the other half of the columns": Mutation(
        "((lane >> 1) & 1) * 4;", "(((lane >> 1) & 1) ^ 1) * 4;", SHORT, "results are wrong"
    ),
    "slot released while its wgmma is in flight": Mutation(
        "if (previous >= 0) release(previous);\n      previous = slot;",
        "release(slot);\n      previous = -1;",
        LONG,
        "which a wgmma in flight reads|changed while it was in flight",
    ),
    "x loaded before the prior grid has ended": Mutation(
        "cutlass::arch::wait_on_dependent_grids();\n#pragma unroll 1\n",
        "\n#pragma unroll 1\n",
        SHORT,
        "before the prior grid has ended",
    ),
    "fewer bytes expected than copied": Mutation(
        "blocks * S::kTokens * 128);",
        "blocks * S::kTokens * 128 - 16);",
        SHORT,
        "deadlock|in flight|expects bytes",
    ),
    "sums replaced before the cluster has read them": Mutation(
        'wait_acquire_cluster(sums_empty, (round - 1) & 1, "sums to be read");',
        ";",
        MANY_TILES,
        "results are wrong|depend on timing",
    ),
}


def mutated(old: str, new: str, folder: Path, pattern: str = "sm90_*.cuh") -> Path:
    """A copy of the kernels with this change in one of the files of a ``pattern``."""
    kernels = folder / "kernels"
    shutil.copytree(KERNELS, kernels)
    sources = {path: path.read_text() for path in kernels.rglob(pattern)}
    found = sum(text.count(old) for text in sources.values())
    assert found == 1, "the kernel has changed: adapt the mutation"
    for path, text in sources.items():
        path.write_text(text.replace(old, new))
    return kernels


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_defect_is_seen(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    kernels = mutated(mutation.old, mutation.new, tmp_path)
    report = failure_of(build((mutation.case.instance,), kernels), mutation.case)
    assert report, "the emulator does not see this defect"
    assert any(part in report for part in mutation.seen.split("|")), report


@pytest.mark.parametrize("case", [LONG, SHORT, MANY_TILES], ids=["long", "short", "many-tiles"])
def test_without_a_defect_the_same_cases_pass(case: Case) -> None:
    assert failure_of(build(INSTANCES), case) == ""
