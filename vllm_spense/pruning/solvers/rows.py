"""Rows of a weight share a Hessian and know nothing else of each other: solve them on several devices.

What is computed does not depend on the devices: rows are cut into the same blocks for one device as for
eight, each matrix product has the same shape, and each block starts the same random numbers. So devices of
one kind give bit-identical weights in any number. A power of two of blocks suits one, two, four or eight.

Memory: each device that takes part holds its own copy of the shared matrices (with refinement H and the
Cholesky factor, 8 K² bytes: 5.2 GB for the 25600 inputs of Qwen3-32B's down) and the temporaries of one block
(about twelve of rows x K fp32). The home device holds the whole weight, too.

Time: a block is a task of its device's thread. Matrix products of different devices overlap; the OBS sweep
is many small launches from Python and gains little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

ROWS = 4096
"""Most rows in a block. It bounds the temporaries; less costs more launches of small kernels."""


def solver_devices(home: torch.device) -> list[torch.device]:
    """Every visible CUDA device, ``home`` first, if ``home`` is one of them; else ``home`` alone."""
    if home.type != "cuda":
        return [home]
    first = torch.cuda.current_device() if home.index is None else home.index
    others = [index for index in range(torch.cuda.device_count()) if index != first]
    return [torch.device("cuda", index) for index in (first, *others)]


def solve_by_rows(
    solve: Callable[..., torch.Tensor],
    weight: torch.Tensor,
    shared: Sequence[torch.Tensor],
    devices: Sequence[torch.device],
) -> torch.Tensor:
    """``solve(block, *shared)`` [rows, …] for every block of rows of ``weight [N, K]``, one below the other.

    Blocks are dealt out to ``devices``, which need not be different ones; ``solve`` runs in one thread per
    device, and what it raises is raised here. The result is on ``weight``'s device.
    """
    blocks = weight.tensor_split(_count(len(weight)))
    takes_part = devices[: len(blocks)]

    def work(number: int) -> list[torch.Tensor]:
        device = takes_part[number]
        here = [tensor.to(device) for tensor in shared]
        mine = blocks[number :: len(takes_part)]
        return [solve(block.to(device), *here).to(weight.device) for block in mine]

    if len(takes_part) == 1:
        return torch.cat(work(0))
    with ThreadPoolExecutor(len(takes_part)) as pool:
        solved = list(pool.map(work, range(len(takes_part))))
    return torch.cat([solved[i % len(solved)][i // len(solved)] for i in range(len(blocks))])


def _count(rows: int) -> int:
    count = 1
    while count * ROWS < rows:
        count *= 2
    return count
