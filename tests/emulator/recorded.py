"""Run what a launcher has recorded: its kernels one after another on the emulated machine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from .cases import PREEMPT, Buffers
from .launcher import Launch, Recorded


def run_recorded(
    host: ctypes.CDLL,
    machine: ctypes.CDLL,
    record: Callable[[], int],
    kernels: list[str],
    buffers: Buffers,
    seed: int,
) -> str:
    """Call the launcher by ``record``, which gives its status, and run what it launches, which are these
    ``kernels``; what went wrong, or an empty string."""
    recorded = (Recorded * 2).in_dll(host, "recorded")
    made = ctypes.c_uint.in_dll(host, "launches")
    made.value = 0
    status = record()
    if status or made.value != len(kernels):
        return f"the launcher gave status {status} and made {made.value} launches"
    table = np.array(buffers.rows, np.uint64)
    error = ""
    for one, kernel in zip(recorded, kernels, strict=False):
        launch = Launch(
            grid=one.grid,
            cluster=1,
            block=one.block,
            shared_bytes=one.shared_bytes,
            shared_base=1024,
            preempt=PREEMPT[seed % len(PREEMPT)],
            seed=seed,
            parameters=ctypes.addressof(one.parameters),
            buffers=table.ctypes.data,
            buffer_count=len(buffers.rows),
        )
        error = error or machine.emulate(kernel.encode(), ctypes.byref(launch)).decode()
    return error
