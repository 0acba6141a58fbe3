"""The host side: the kernel's own launcher, compiled so that it records launches instead of making them.

``kernels/linear/sm90_fp8.cu`` stays as it is but for the list of instances, of which only the wanted ones are
kept: each one adds to the compile time. ``recorder.h`` replaces its CUDA calls with macros.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import NamedTuple

MAX_SHARDS = 4


class Instance(NamedTuple):
    """A tile shape of the kernel, as SPENSE_INSTANCE lists them."""

    rows: int
    tokens: int
    multicast: bool = False
    paired: bool = False
    packed: bool = False


def host_source(kernels: Path, instances: tuple[Instance, ...]) -> str:
    """Source of the recording launcher, with these instances only."""
    lines, kept = [], set()
    for line in (kernels / "linear" / "sm90_fp8.cu").read_text().splitlines():
        found = re.match(r"\s*SPENSE_INSTANCE\((\d+), (\d+), (true|false), [^,)]*((?:, \w+)*)\)", line)
        if found:
            kind = (word == "true" for word in re.findall(r"\w+", found[4]))
            instance = Instance(int(found[1]), int(found[2]), found[3] == "true", *kind)
            if instance not in instances:
                continue
            kept.add(instance)
        lines.append(line)
    if kept != set(instances):
        raise ValueError(f"the launcher has no instance {sorted(set(instances) - kept)}")
    return "\n".join(['#include "recorder.h"', *lines, ""])


class Twell(ctypes.Structure):
    """spense::Twell of mlp/twell.h."""

    _fields_ = [("tile", ctypes.c_int), ("share", ctypes.c_int), ("threshold", ctypes.c_float)]


class LinearArgs(ctypes.Structure):
    """spense::LinearArgs of linear/arguments.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int)
            for name in ("tokens", "out_features", "in_features", "output_split", "shards")
        ),
        ("sparse", ctypes.c_int * MAX_SHARDS),
        ("dense", ctypes.c_int * MAX_SHARDS),
        ("x", ctypes.c_void_p),
        ("x_scale", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("values_pitch", ctypes.c_int64),
        ("metadata", ctypes.c_void_p),
        ("metadata_rows", ctypes.c_int),
        ("dense_weight", ctypes.c_void_p),
        ("dense_pitch", ctypes.c_int64),
        ("weight_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("amax", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int),
        ("words", ctypes.c_void_p),
        ("twell", Twell),
    ]


class Sm90Config(ctypes.Structure):
    """spense::Sm90Config of linear/sm90_fp8.h."""

    _fields_ = [
        ("tile_rows", ctypes.c_int),
        ("tile_tokens", ctypes.c_int),
        ("cluster", ctypes.c_int),
        ("multicast", ctypes.c_bool),
        ("overlap", ctypes.c_bool),
    ]


class Recorded(ctypes.Structure):
    """What recorder.h keeps of a launch; `parameters` begins at a multiple of 128 bytes."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid", "block", "shared_bytes", "cluster", "launches")),
        ("padding", ctypes.c_ubyte * (128 - 5 * 4)),
        ("parameters", ctypes.c_ubyte * 4096),
    ]


class Launch(ctypes.Structure):
    """What machine.cpp runs."""

    _fields_ = [
        *(
            (name, ctypes.c_uint32)
            for name in ("grid", "cluster", "block", "shared_bytes", "shared_base", "preempt")
        ),
        ("seed", ctypes.c_uint64),
        ("parameters", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("buffer_count", ctypes.c_uint64),
    ]


class Emulator:
    """The two libraries of one build."""

    def __init__(self, folder: Path) -> None:
        self.host = ctypes.CDLL(str(folder / "launcher.so"))
        self.machine = ctypes.CDLL(str(folder / "kernels.so"))
        self.machine.emulate.restype = ctypes.c_char_p
        if self.host.linear_arguments_bytes() != ctypes.sizeof(LinearArgs):
            raise ValueError("LinearArgs of linear/arguments.h has other fields than the one here")

    def record(self, args: LinearArgs, config: Sm90Config, clusters_fit: int) -> Recorded:
        """Call the launcher on a device that runs so many clusters at once."""
        recorded = Recorded.in_dll(self.host, "recorded")
        recorded.launches = 0
        ctypes.c_int.in_dll(self.host, "recorded_clusters_fit").value = clusters_fit
        status = self.host.record(ctypes.byref(args), ctypes.byref(config))
        if status or recorded.launches != 1:
            raise RuntimeError(f"the launcher gave status {status} and made {recorded.launches} launches")
        return recorded

    def run(self, kernel: str, launch: Launch) -> str:
        """Run the translated kernel; what went wrong, or an empty string."""
        return self.machine.emulate(kernel.encode(), ctypes.byref(launch)).decode()
