"""Fill .gpu/ with what a GPU machine without network, CUTLASS or pydantic needs for `make gpu`.

usage: python -m tools.gpu.bundle [--python 3.12]

.gpu/_C.abi3.so       the Hopper kernel, compiled for sm_90a (half a minute), and a record of its sources
.gpu/trap/_C.abi3.so  the same, with kernels that stop and say where they would hang, for first light
.gpu/wheels/          pydantic and what it needs, for that version of Python on x86-64 Linux

Take the checkout and .gpu/ along. Needs nvcc 13.0, torch's and CUTLASS's headers, and a package index.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from benchmarks.common.results import ROOT, commit, kernel_sources, write
from tools.gpu.build import BUNDLE, library_digest

WHEELS = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions")
GLIBC = (17, 24, 27, 28)
"""pip matches manylinux_2_N exactly."""
VLLM = ROOT / ".gpu-vllm"
"""What tools/gpu/bundle_vllm.py makes."""
MOST = 12e6
"""Bytes of everything that one has to take along: a small upload is a fast start."""


def compile_library(target: Path, trap: bool) -> None:
    """Our own kernel without CUTLASS instances, as setup.py compiles it."""
    work = ROOT / "build" / ("bundle-trap" if trap else "bundle")
    environment = {"SPENSE_CUTLASS": "0", "SPENSE_CUDA_ARCHS": "90a", "SPENSE_CPU": "0"}
    subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "build_ext"),
            *("--build-lib", str(work / "lib"), "--build-temp", str(work / "temp")),
        ],
        cwd=ROOT,
        env=dict(os.environ) | environment | {"SPENSE_TRAP": str(int(trap))},
        check=True,
    )
    built = next((work / "lib" / "vllm_spense").glob("_C*.so"), None)
    if built is None:
        raise SystemExit("setup.py compiled no CUDA extension: it says why above")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(built, target)


def download_wheels(folder: Path, python: str) -> None:
    """The versions that are installed here, for the other machine's Python."""
    shutil.rmtree(folder, ignore_errors=True)
    platforms = ["manylinux1_x86_64", "manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in GLIBC)]
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    wanted = [f"{name}=={metadata.version(name)}" for name in WHEELS]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", *options, "--dest", str(folder)),
            *(part for platform in platforms for part in ("--platform", platform)),
            *wanted,
        ],
        check=True,
    )


def newest_glibc(library: Path) -> str:
    """The youngest symbol version that the library asks for: the machine's glibc must have it."""
    found = {tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_(\d+\.\d+)", library.read_bytes())}
    return ".".join(map(str, max(found, default=())))


def bytes_of(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def tree() -> int:
    """Bytes of the checkout: tracked files and those that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return bytes_of(ROOT / name for name in names if name and not (ROOT / name).is_symlink())


def sizes(bundle: Path = BUNDLE) -> int:
    """Print what each part weighs; the sum."""
    parts = {"checkout": tree(), **{p.name: bytes_of([p, *p.rglob("*")]) for p in sorted(bundle.iterdir())}}
    for name, size in parts.items():
        print(f"{size / 1e6:7.2f} MB  {name}")
    total, vllm = sum(parts.values()), bytes_of(VLLM.glob("*"))
    print(f"{total / 1e6:7.2f} MB  to take along in every call ({total / 2**20:.1f} MiB)")
    if vllm:
        print(
            f"{(total + vllm) / 1e6:7.2f} MB  with vLLM, in the last one ({(total + vllm) / 2**20:.1f} MiB)"
        )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    options = parser.parse_args()
    library, trap = BUNDLE / "_C.abi3.so", BUNDLE / "trap" / "_C.abi3.so"
    sources = kernel_sources()
    compile_library(library, trap=False)
    compile_library(trap, trap=True)
    if kernel_sources() != sources:
        raise SystemExit("kernels/ changed while it was compiled: run this again")
    download_wheels(BUNDLE / "wheels", options.python)
    record = {"kernels": sources, "library": library_digest(library), "trap_library": library_digest(trap)}
    write(BUNDLE / "build.json", record | {"commit": commit(), "date": time.strftime("%Y-%m-%d %H:%M")})
    print(f"the libraries ask for glibc {newest_glibc(library)} or later")
    if (total := sizes()) > MOST:
        raise SystemExit(f"that is more than {MOST / 1e6:.0f} MB: {total} bytes")


if __name__ == "__main__":
    main()
