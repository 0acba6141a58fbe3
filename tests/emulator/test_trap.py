"""SPENSE_TRAP: the same results, and a wait without end says which it is and stops the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from .build import build, why_not
from .cases import DECODE, Case, failure_of
from .test_mutations import mutated

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulator: {REASON}")
TRAP = ("SPENSE_TRAP=1",)
SPLIT_K = Case(DECODE[0], 2, 3, 1024, (64,), (64,), clusters_fit=1)


def test_the_results_are_the_same() -> None:
    assert failure_of(build((DECODE[0],), defines=TRAP), SPLIT_K) == ""


@pytest.mark.parametrize(
    ("old", "new", "waits_for"),
    [
        ("blocks * S::kTokens * 128);", "blocks * S::kTokens * 128 + 16);", "a stage"),
        ("if (uint32_t(t) < ctas) arrive_release_cluster(sums_full, t);", "", "sums of its peers"),
    ],
)
def test_a_wait_without_end_says_which(old: str, new: str, waits_for: str, tmp_path: Path) -> None:
    report = failure_of(build((DECODE[0],), mutated(old, new, tmp_path), TRAP), SPLIT_K)
    assert "trap: spense: block" in report, report
    assert f"waits for {waits_for}, phase" in report, report
