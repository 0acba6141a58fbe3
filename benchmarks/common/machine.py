"""The CPU that figures were measured on: the name that results go by, and what tells two CPUs apart.

Virtual machines hide names (`Intel(R) Xeon(R) Processor`), so the code name is looked up by family and model.
The instruction set in a name is the CPU's best for matrices, whatever our kernels use of it: a new kernel
does not make a new CPU.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
MATRIX_FLAGS = {
    "amx_int8": "amx",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "avx512f": "avx512",
    "avx2": "avx2",
}
"""Flags of Linux, best first, and what they are called here."""
CODE_NAMES = {
    ("GenuineIntel", 6, 85): "Skylake or Cascade Lake",
    ("GenuineIntel", 6, 106): "Ice Lake",
    ("GenuineIntel", 6, 143): "Sapphire Rapids",
    ("GenuineIntel", 6, 207): "Emerald Rapids",
    ("GenuineIntel", 6, 173): "Granite Rapids",
    ("AuthenticAMD", 23, 49): "Rome",
    ("AuthenticAMD", 25, 1): "Milan",
    ("AuthenticAMD", 25, 17): "Genoa",
    ("AuthenticAMD", 26, 2): "Turin",
}


@cache
def cpuinfo(path: Path = CPUINFO) -> dict[str, str]:
    """The first processor's lines; empty where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def describe(info: dict[str, str]) -> str:
    """Name, code name where it is known, and best instruction set: ``AMD EPYC (Genoa), avx512_bf16``."""
    flags = info.get("flags", "").split()
    best = next((short for flag, short in MATRIX_FLAGS.items() if flag in flags), platform.machine())
    family, model = (int(info.get(name, "0")) for name in ("cpu family", "model"))
    name = info.get("model name", "CPU").replace("(R)", "").replace(" Processor", "")
    code = CODE_NAMES.get((info.get("vendor_id", ""), family, model))
    return f"{name} ({code}), {best}" if code else f"{name}, {best}"


def cpu_name(threads: int) -> str:
    """What results of this machine go by: the CPU and how many cores of it were used."""
    return f"{describe(cpuinfo())}, {threads} core{'s' if threads > 1 else ''}"


def facts() -> dict[str, Any]:
    """What else tells two machines apart."""
    info = cpuinfo()
    names = ("model name", "cpu family", "model", "stepping", "cache size")
    return {name: info.get(name) for name in names} | {"cores": len(os.sched_getaffinity(0))}
