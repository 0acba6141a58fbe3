"""Builds the emulator: nvcc for the launcher and the PTX, the translation, and g++ for the machine.

What is built lies under ``build/emulator``, in a folder named by a hash of the kernels, of the emulator and
of the instances, so that it is never out of date; the machine itself is compiled once for all of them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from tools.find_cuda import NO_CUTLASS, NO_NVCC, find_cutlass, find_nvcc

from .launcher import Emulator, Instance, host_source
from .translate import strings, translate

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
KERNELS = ROOT / "kernels"
OUTPUT = ROOT / "build" / "emulator"
OPTIMISE = "-O1"  # of the translated kernels: the compile time counts as much as the run


def why_not() -> str | None:
    """Why the emulator cannot be built here, in one line."""
    if platform.machine() != "x86_64":
        return "the emulator switches stacks in x86-64 assembly"
    if not find_nvcc():
        return NO_NVCC
    if not shutil.which("g++"):
        return "no g++ found"
    if not find_cutlass():
        return NO_CUTLASS
    return None


def digest(*paths: Path, extra: str = "") -> str:
    total = hashlib.sha256(extra.encode())
    for path in sorted(paths):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def run(*command: str | Path) -> None:
    """Run a compiler; its output is shown only if it fails."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(
            f"exit status {done.returncode}: {' '.join(map(str, command))}\n{done.stdout[-4000:]}"
        )


def build_machine() -> Path:
    """The machine without kernels, as an object file."""
    sources = [*HERE.glob("*.h"), HERE / "machine.cpp"]
    target = OUTPUT / f"machine-{digest(*sources)}.o"
    if not target.exists():
        OUTPUT.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.o")
        run("g++", "-std=c++20", "-O2", "-fPIC", "-c", HERE / "machine.cpp", "-o", partial)
        partial.replace(target)
    return target


def build(
    instances: tuple[Instance, ...], kernels: Path = KERNELS, defines: tuple[str, ...] = ()
) -> Emulator:
    """The emulator for these instances of the kernel sources in `kernels`, compiled with `defines`."""
    return Emulator(assemble(host_source(kernels, instances), "90a", kernels, defines))


def assemble(host: str, architecture: str, kernels: Path = KERNELS, defines: tuple[str, ...] = ()) -> Path:
    """Folder with the libraries of a launcher's source, recording included, and of the kernels in it."""
    nvcc, cutlass = find_nvcc(), find_cutlass()
    if not nvcc or not cutlass:
        raise RuntimeError(why_not())
    files = [p for p in (*kernels.rglob("*"), *HERE.iterdir()) if p.suffix in (".cu", ".cuh", ".h", ".cpp")]
    files += [HERE / name for name in ("build.py", "launcher.py", "translate.py")]
    folder = OUTPUT / digest(*files, extra=f"{host} {architecture} {defines} {nvcc} {cutlass}")
    if folder.exists():
        return folder
    machine = build_machine()
    partial = folder.with_suffix(f".{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    source = partial / "launcher.cu"
    source.write_text(host)
    virtual = f"compute_{architecture}"
    # PTX only, no machine code; --keep leaves it beside the library.
    run(
        *(
            nvcc,
            "-std=c++17",
            "-O3",
            "-DNDEBUG",
            "--expt-relaxed-constexpr",
            "-DCUTLASS_ENABLE_GDC_FOR_SM90=1",
            *(f"-D{define}" for define in defines),
        ),
        *(f"-gencode=arch={virtual},code={virtual}", "-shared", "-Xcompiler=-fPIC"),
        *("--keep", f"--keep-dir={partial}", f"-I{HERE}", f"-I{kernels}", f"-I{cutlass / 'include'}"),
        *(source, "-o", partial / "launcher.so"),
    )
    ptx = (partial / "launcher.ptx").read_text()
    translated = translate(ptx)
    names = sorted(translated)
    code = ['#include "device.h"', strings(ptx), *(translated[name] for name in names)]
    entries = "".join(f'{{"{name}", {name}}}, ' for name in names)
    code.append(f"extern KernelEntry const kernel_table[] = {{{entries}{{nullptr, nullptr}}}};\n")
    (partial / "kernels.cpp").write_text("\n".join(code))
    flags = ("-std=c++20", OPTIMISE, "-w", "-fPIC", "-shared", f"-I{HERE}")
    run("g++", *flags, partial / "kernels.cpp", machine, "-o", partial / "kernels.so")
    for kept in list(partial.iterdir()):
        if kept.name not in ("launcher.so", "kernels.so", "kernels.cpp", "launcher.ptx"):
            kept.unlink()
    try:
        partial.replace(folder)
    except OSError:  # another process has built the same one meanwhile
        shutil.rmtree(partial)
    return folder
