"""The pipeline and split-K protocol of the Hopper kernel, in thousands of random interleavings."""

from __future__ import annotations

import random

import pytest

from tests.kernels.barrier_model import Model


def random_model(seed: int, multicast: bool, **broken: bool) -> Model:
    choose = random.Random(seed)
    ctas = choose.choice((1, 2, 4) if multicast else (1, 2, 4, 8))
    tiles = [choose.randint(1 if multicast else 0, 12) for _ in range(choose.randint(1, 4))]
    return Model(choose.randint(2, 5), choose.choice((1, 2)), ctas, tiles, multicast, seed, **broken)


def run_many(multicast: bool, **broken: bool) -> None:
    for seed in range(150):
        random_model(seed, multicast, **broken).run()


@pytest.mark.parametrize("multicast", [False, True], ids=["split-k", "multicast"])
def test_no_interleaving_deadlocks_or_mixes_stages(multicast: bool) -> None:
    run_many(multicast)


def test_the_model_sees_a_slot_released_before_it_was_read() -> None:
    with pytest.raises(AssertionError, match=r"bytes|overwritten"):
        run_many(True, release_early=True)


def test_the_model_sees_sums_replaced_too_early() -> None:
    with pytest.raises(AssertionError, match=r"sums of another tile|arrivals"):
        run_many(False, skip_sums_empty=True)
