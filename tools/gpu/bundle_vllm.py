"""CUDA vLLM for a GPU machine without network, as one file: .gpu-vllm/vllm.tar.xz, for the stage `serving`.

usage: python -m tools.gpu.bundle_vllm [--python PYTHON3.12]

For x86-64 Linux with Python 3.12, torch 2.11 for CUDA 13, triton and transformers. To be small it leaves out
what a dense model on a Hopper GPU does not use: machine code of other GPUs (its bytes become zeros, so that
nothing moves and the rest compresses), flash-attn (vLLM needs `attention_backend="TRITON_ATTN"` then),
flashinfer, DeepGEMM, and vocabularies of Mistral. Compiled and packed, never yet run. `tools/gpu/command.py`
unpacks it beside the checkout where vLLM is missing. Needs 2 GB of disk, a package index and five minutes.
"""

from __future__ import annotations

import argparse
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common.results import ROOT

BUNDLE = ROOT / ".gpu-vllm" / "vllm.tar.xz"
MOST = 52 << 20
"""Bytes: with the checkout and .gpu/ it stays below 64 MiB."""
LEFT_OUT = (
    *("bin", "pycountry/locales", "xgrammar/lib/libxgrammar.a", "mistral_common/data", "vllm/vllm-rs"),
    *("vllm/third_party/deep_gemm", "vllm/third_party/fmha_sm100", "vllm/vllm_flash_attn/*.so"),
    *("vllm/_flashmla*", "vllm/_qutlass*", "vllm/_rust_tool_parser*"),
)
STRIPPED = ("xgrammar/libxgrammar_bindings.so",)
FATBIN, IMAGE = struct.Struct("<IHHQ"), struct.Struct("<HHIQIIHHI")
MAGIC, PTX, CUBIN, HOPPER = 0xBA55ED50, 1, 2, 90
ENTRY_POINT = "[vllm.general_plugins]\nspense = vllm_spense.serving.plugin:register\n"


def section(library: bytearray, name: bytes = b".nv_fatbin") -> tuple[int, int]:
    """Where a section of a 64-bit ELF file begins and ends; (0, 0) if it has none."""
    (table,) = struct.unpack_from("<Q", library, 40)
    size, count, names = struct.unpack_from("<HHH", library, 58)
    heads = [struct.unpack_from("<IIQQQQ", library, table + i * size) for i in range(count)]
    for head in heads:
        start = heads[names][4] + head[0]
        if library[start : library.index(0, start)] == name:
            return head[4], head[4] + head[5]
    return 0, 0


def images(library: bytearray) -> Iterator[list[tuple[int, int, int, int]]]:
    """Images of each fat binary: kind, architecture, place and size of its images."""
    at, end = section(library)
    while at + FATBIN.size <= end:
        magic, _, head, size = FATBIN.unpack_from(library, at)
        if magic != MAGIC:
            at += 8
            continue
        found, place, stop = [], at + head, at + head + size
        while place < stop:
            kind, _, header, length, _, _, _, _, arch = IMAGE.unpack_from(library, place)
            found.append((kind, arch, place + header, length))
            place += header + length
        yield found
        at = stop


def keep_hopper(path: Path) -> int:
    """Zero what a Hopper GPU does not load: other machine code, and PTX where there is code for it; bytes."""
    library, zeroed = bytearray(path.read_bytes()), 0
    for fat in images(library):
        native = any((kind, arch) == (CUBIN, HOPPER) for kind, arch, _, _ in fat)
        for kind, arch, place, size in fat:
            if (kind == CUBIN and arch != HOPPER) or (kind == PTX and native):
                library[place : place + size] = bytes(size)
                zeroed += size
    path.write_bytes(library)
    return zeroed


def make_site(site: Path, python: str) -> None:
    """Download, install and slim everything; this package's plugin is announced there as well."""
    wheels = site.with_name("wheels")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    wanted = ["-r", str(ROOT / "requirements" / "gpu-vllm.txt")]
    options = ["-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "download", *options, "--dest", str(wheels), *wanted], check=True)
    files = map(str, sorted(wheels.glob("*.whl")))
    options = ["-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([*pip, "install", *options, *files], check=True)
    for pattern in LEFT_OUT:
        for path in list(site.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in STRIPPED:
        subprocess.run(["strip", "--strip-unneeded", str(site / name)], check=True)
    for path in sorted((site / "vllm").glob("*.so")):
        if zeroed := keep_hopper(path):
            print(f"{path.name}: {zeroed / 1e6:.0f} of {path.stat().st_size / 1e6:.0f} MB are zeros now")
    info = site / "vllm_spense-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-spense\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINT)


def unpack(bundle: Path = BUNDLE, target: Path = ROOT / "build" / "gpu-vllm") -> Path | None:
    """Where the packages lie, for this process and its children; None if vLLM is there or was not carried."""
    if find_spec("vllm") or not bundle.is_file():
        return None
    if not (target / "site").is_dir():
        with tarfile.open(bundle) as archive:
            archive.extractall(target, filter="data")
    sys.path.append(str(target / "site"))
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(target / "site")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return target / "site"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=shutil.which("python3.12"), help="a Python 3.12 with pip")
    options = parser.parse_args()
    if not options.python:
        raise SystemExit("no python3.12 found: --python")
    BUNDLE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make_site(Path(folder) / "site", options.python)
        with lzma.open(BUNDLE, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(Path(folder) / "site", "site")
    size = BUNDLE.stat().st_size
    print(f"{size / 2**20:.1f} MiB  {BUNDLE.relative_to(ROOT)}")
    if size > MOST:
        raise SystemExit(f"that is more than {MOST >> 20} MiB: it does not fit beside the checkout and .gpu/")


if __name__ == "__main__":
    main()
