"""Rows of a weight on several devices: nothing is lost, and the number of devices decides nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from vllm_spense.format import Layout
from vllm_spense.pruning import PruneConfig
from vllm_spense.pruning.solvers import rows as rows_module
from vllm_spense.pruning.solvers.hessian import Hessian
from vllm_spense.pruning.solvers.obs import SolverError, obs_rows
from vllm_spense.pruning.solvers.rows import solve_by_rows, solver_devices
from vllm_spense.pruning.solvers.solver import Solver

CPU = torch.device("cpu")
LAYOUTS = [Layout("output", 44, 48, 36), Layout("input", 30, 48, 24)]
"""36 and 30 rows to solve: no multiple of the block size, and blocks of unequal size."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "ROWS", 5)


def problem(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = Hessian(layout.in_features)
    mix = torch.randn(layout.in_features, layout.in_features, generator=generator)
    h.add(torch.randn(300, layout.in_features, generator=generator) @ mix)
    weight = torch.randn(layout.out_features, layout.in_features, generator=generator)
    return weight, h.matrix("test")


def prune(layout: Layout, devices: list[torch.device] | None, preset: str = "guided") -> torch.Tensor:
    weight, h = problem(layout)
    config = PruneConfig(calibration="x", preset=preset)
    return Solver(config, h, "layers.3.mlp.up_proj", devices).prune(weight, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("preset", ["guided", "spensegpt+"])
def test_the_number_of_devices_changes_no_bit(layout: Layout, preset: str) -> None:
    one = prune(layout, [CPU], preset)
    assert torch.equal(one, prune(layout, None, preset)), "a CPU is one device"
    for count in (2, 3, 8, 20):
        assert torch.equal(one, prune(layout, [CPU] * count, preset))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blocks_agree_with_the_whole(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = prune(layout, [CPU, CPU], "spensegpt+")
    monkeypatch.setattr(rows_module, "ROWS", 4096)
    whole = prune(layout, [CPU], "spensegpt+")
    assert torch.equal(blocks == 0, whole == 0)
    torch.testing.assert_close(blocks, whole, rtol=1e-4, atol=1e-5)


def test_every_row_comes_back_in_its_place() -> None:
    for rows in (*range(1, 24), 100):
        weight = torch.arange(3.0 * rows).view(rows, 3)
        solved = solve_by_rows(torch.add, weight, [torch.ones(3)], [CPU] * 3)
        assert torch.equal(solved, weight + 1)


@pytest.mark.parametrize(("rows", "sizes"), [(5, [5]), (6, [3, 3]), (11, [3, 3, 3, 2]), (40, [5] * 8)])
def test_blocks_do_not_depend_on_the_devices(rows: int, sizes: list[int]) -> None:
    for count in (1, 2, 8, 9):
        seen: list[int] = []

        def solve(block: torch.Tensor, seen: list[int] = seen) -> torch.Tensor:
            seen.append(len(block))
            return block

        solve_by_rows(solve, torch.zeros(rows, 2), [], [CPU] * count)
        assert sorted(seen, reverse=True) == sizes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_devices_work_at_the_same_time(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(4)  # broken unless four are here at once

    def meet_and_prune(*args: Any) -> torch.Tensor:
        meeting.wait(timeout=20)
        return obs_rows(*args)

    monkeypatch.setattr("vllm_spense.pruning.solvers.solver.obs_rows", meet_and_prune)
    prune(layout, [CPU] * 4)


def test_shared_matrices_move_once_per_device_that_works() -> None:
    """The device "meta" stands for another one: what is there cannot be read, but is seen to be there."""
    seen = []

    def solve(block: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        seen.append((block.device.type, factor.device.type, factor))
        return torch.zeros(block.shape)

    meta = torch.device("meta")
    solve_by_rows(solve, torch.zeros(20, 2), [torch.eye(2)], [CPU, meta])
    assert sorted(entry[:2] for entry in seen) == [("cpu", "cpu")] * 2 + [("meta", "meta")] * 2
    assert len({id(factor) for *_, factor in seen}) == 2


def test_a_device_without_rows_gets_no_copies() -> None:
    asked = []

    class Factor:
        def to(self, device: torch.device) -> None:
            asked.append(device.type)

    solve_by_rows(lambda block, factor: block, torch.zeros(4, 2), [Factor()], [CPU, torch.device("meta")])
    assert asked == ["cpu"]


def test_errors_cross_the_threads() -> None:
    def fail(block: torch.Tensor) -> torch.Tensor:
        raise SolverError("of one block")

    with pytest.raises(SolverError, match="of one block"):
        solve_by_rows(fail, torch.zeros(20, 2), [], [CPU] * 4)


def test_devices_of_a_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cuda = [torch.device("cuda", index) for index in range(3)]
    assert solver_devices(CPU) == [CPU]
    assert solver_devices(torch.device("cuda")) == [cuda[1], cuda[0], cuda[2]]
    assert solver_devices(cuda[2]) == [cuda[2], cuda[0], cuda[1]]
