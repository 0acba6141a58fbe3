"""A small-step model of the Hopper kernel's barriers (kernels/linear/sm90_fp8.cuh), run in random order.

Every CTA has a producer and its consumer warpgroups; copies land at random times. The model asserts what
hardware would punish silently: a slot overwritten while it is read, a consumer that reads another stage's
bytes, partial sums replaced before every CTA has added them, and it finds deadlocks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field


class Barrier:
    """mbarrier: ``count`` arrivals and all expected transactions complete a phase."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.transactions = self.phase = 0

    def arrive(self, expect: int = 0) -> None:
        self.transactions += expect
        self.pending -= 1
        assert self.pending >= 0, "more arrivals than the barrier was made for"
        self._complete()

    def land(self) -> None:
        self.transactions -= 1  # may be below zero for a while: a peer's copy can come before the expectation
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.transactions == 0:
            self.pending = self.count
            self.phase += 1

    def passed(self, parity: int) -> bool:
        """try_wait.parity: the phase of this parity is over (a fresh barrier counts as past parity 1)."""
        return (self.phase - 1) % 2 == parity


@dataclass
class Cta:
    full: list[Barrier]
    empty: list[Barrier]
    sums_full: Barrier
    sums_empty: Barrier
    slots: list[dict] = field(default_factory=list)
    sums: dict[int, tuple] = field(default_factory=dict)


@dataclass
class Model:
    """``tiles``: stages of each tile in turn (of one cluster). ``multicast``: x is loaded by all for all."""

    stages: int
    warpgroups: int
    ctas: int
    tiles: list[int]
    multicast: bool
    seed: int
    release_early: bool = False  # a broken variant, to see the model fail
    skip_sums_empty: bool = False  # another one

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        arrivals = self.warpgroups * (self.ctas if self.multicast else 1)
        self.cluster = [
            Cta(
                [Barrier(1) for _ in range(self.stages)],
                [Barrier(arrivals) for _ in range(self.stages)],
                Barrier(self.warpgroups * self.ctas),
                Barrier(self.warpgroups * self.ctas),
                [{"readers": 0} for _ in range(self.stages)],
            )
            for _ in range(self.ctas)
        ]
        self.copies: list[tuple[int, int, str, tuple]] = []
        self.finished: list[tuple[int, int, int]] = []

    def segment(self, tile: int, rank: int) -> tuple[int, int]:
        n = self.tiles[tile]
        if self.multicast:
            return 0, n
        return n * rank // self.ctas, n * (rank + 1) // self.ctas

    def issue(self, rank: int, slot: int, work: tuple, part: str) -> None:
        targets = range(self.ctas) if part.startswith("x") and self.multicast else [rank]
        self.copies += [(target, slot, part, work) for target in targets]

    def land(self, copy: tuple[int, int, str, tuple]) -> None:
        rank, slot, part, work = copy
        content = self.cluster[rank].slots[slot]
        assert content["readers"] == 0 or content.get("tile") == work, "a slot was overwritten in use"
        content[part] = work
        self.cluster[rank].full[slot].land()

    def producer(self, rank: int) -> Iterator[None]:
        cta, slot, phase = self.cluster[rank], 0, 0
        x_part = f"x{rank}" if self.multicast else "x0"
        shares = self.ctas if self.multicast else 1

        def weights(work: tuple, at: int) -> None:
            cta.full[at].arrive(expect=1 + shares)
            self.issue(rank, at, work, "weights")

        for tile in range(len(self.tiles)):
            begin, end = self.segment(tile, rank)
            stage = begin
            if tile == 0:
                n = min(end - begin, self.stages)
                for i in range(n):
                    weights((tile, begin + i), i)
                    yield
                for i in range(n):
                    self.issue(rank, i, (tile, begin + i), x_part)
                    yield
                stage, slot, phase = begin + n, n % self.stages, int(n == self.stages)
            while stage < end:
                while not cta.empty[slot].passed(phase ^ 1):
                    yield
                weights((tile, stage), slot)
                yield
                self.issue(rank, slot, (tile, stage), x_part)
                slot, phase = (0, phase ^ 1) if slot + 1 == self.stages else (slot + 1, phase)
                stage += 1
                yield

    def consumer(self, rank: int, group: int) -> Iterator[None]:
        cta, slot, phase = self.cluster[rank], 0, 0
        parts = ["weights", *(f"x{r}" for r in range(self.ctas if self.multicast else 1))]

        def release(at: int) -> None:
            cta.slots[at]["readers"] -= 1
            for target in self.cluster if self.multicast else [cta]:
                target.empty[at].arrive()

        for tile in range(len(self.tiles)):
            begin, end = self.segment(tile, rank)
            previous, total = -1, []
            for stage in range(begin, end):
                while not cta.full[slot].passed(phase):
                    yield
                cta.slots[slot]["readers"] += 1
                cta.slots[slot]["tile"] = (tile, stage)
                if self.release_early:
                    release(slot)
                yield
                for part in parts:
                    assert cta.slots[slot][part] == (tile, stage), "a consumer read another stage's bytes"
                total.append(stage)
                if previous >= 0 and not self.release_early:
                    release(previous)
                previous = slot
                slot, phase = (0, phase ^ 1) if slot + 1 == self.stages else (slot + 1, phase)
                yield
            if previous >= 0 and not self.release_early:
                release(previous)
            if self.multicast:
                self.finished.append((tile, rank, group))
                continue
            if tile > 0 and not self.skip_sums_empty:
                while not cta.sums_empty.passed((tile - 1) % 2):
                    yield
            cta.sums[group] = (tile, total)
            yield
            for target in self.cluster:
                target.sums_full.arrive()
            while not cta.sums_full.passed(tile % 2):
                yield
            added: list[int] = []
            for peer in self.cluster:
                assert peer.sums[group][0] == tile, "sums of another tile were added"
                added += peer.sums[group][1]
                yield
            assert added == list(range(self.tiles[tile])), "the parts of K do not add up"
            self.finished.append((tile, rank, group))
            for target in self.cluster:
                target.sums_empty.arrive()

    def run(self, limit: int = 400_000) -> None:
        """Advance a random agent, or land a random copy, until all are done."""
        agents = [self.producer(r) for r in range(self.ctas)]
        agents += [self.consumer(r, g) for r in range(self.ctas) for g in range(self.warpgroups)]
        for _ in range(limit):
            if self.copies and self.random.random() < 0.5:
                self.land(self.copies.pop(self.random.randrange(len(self.copies))))
            elif agents:
                agent = self.random.choice(agents)
                try:
                    next(agent)
                except StopIteration:
                    agents.remove(agent)
            elif not self.copies:
                assert len(self.finished) == len(self.tiles) * self.ctas * self.warpgroups
                return
        raise AssertionError("deadlock")
