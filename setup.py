"""Builds the extensions of ``kernels/``: CUDA with nvcc, CPU with g++; the rest is in pyproject.toml.

torch is needed for its headers only, a CPU build will do, and the result loads under torch 2.11 and later,
with and without CUDA (libtorch stable ABI). Without nvcc, torch or the CUTLASS headers the CUDA extension is
left out with a message; the CPU one (5 s) without g++ or torch, or on other machines than x86-64.

Environment: ``SPENSE_CUDA_ARCHS`` ("90a;100f", before CUDA 12.9 "90a;100a"; empty: no CUDA extension),
``SPENSE_CUTLASS`` (0 leaves out the CUTLASS instances, most of the build time; ``check`` compiles one of them
per architecture as a test),
``SPENSE_TRAP`` (1: kernels stop with a message where they would hang, for first runs on new hardware),
``SPENSE_CPU`` (0: no CPU extension, 1: an error if it does not compile), ``MAX_JOBS`` (2; a CUTLASS instance
takes 5 GB), ``NVCC`` or ``CUDA_HOME``, ``CUTLASS_HOME``.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # pip runs this file without its folder on the path
from tools.find_cuda import NO_CUTLASS, NO_NVCC, find_cutlass, find_nvcc, find_package  # noqa: E402

KERNELS = ROOT / "kernels"
CUTLASS = os.environ.get("SPENSE_CUTLASS", "1")
NO_TORCH = "torch is not importable in the build environment (use --no-build-isolation)"
TORCH_TARGET = "0x020b000000000000ULL"  # the oldest torch whose stable ABI is used: 2.11
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f")
AVX512_BF16 = (*AVX512, "-mavx512bw", "-mavx512bf16")
AVX512_VNNI = (*AVX512, "-mavx512bw", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni")
AMX = ("-mamx-tile", "-mamx-bf16", "-mamx-int8")
CPU_UNITS: dict[str, tuple[str, ...]] = {  # instruction sets are chosen when the kernels run
    "linear/cpu/bindings": (),
    "linear/cpu/avx2": AVX2,
    "linear/cpu/avx512": AVX512,
    "linear/cpu/avx512_bf16": AVX512_BF16,
    "linear/cpu/amx": (*AVX512_BF16, *AMX),
    "linear/cpu/four_bit_bindings": (),
    "linear/cpu/four_bit_avx512_bf16": AVX512_BF16,
    "linear/cpu/four_bit_amx": (*AVX512_BF16, *AMX),
    "linear/cpu/int8_avx2": AVX2,
    "linear/cpu/int8_avx_vnni": (*AVX2, "-mavxvnni"),
    "linear/cpu/int8_avx512_vnni": AVX512_VNNI,
    "linear/cpu/int8_amx": (*AVX512_VNNI, *AMX),
    "mlp/cpu/bindings": (),
    "mlp/cpu/avx2": AVX2,
    "mlp/cpu/avx512": AVX512,
    "mlp/cpu/avx512_bf16": AVX512_BF16,
}
CUTLASS_INSTANCES = {"90a": range(4), "100a": range(4, 12), "100f": range(4, 12)}  # cutlass_fp8.h
FOUR_BIT_ARCHS = ("80", "90")  # sm_80's code runs on 8.x; what is newer compiles the PTX when it loads it
FOUR_BIT_PTX = "-gencode=arch=compute_80,code=compute_80"
MACROS = {"90a": ("SM90",), "100a": ("SM100",), "100f": ("SM100", "SM100_FAMILY")}


def architectures() -> list[str]:
    """What to compile for; code for the family 100f runs on B300 (10.3) as well as on B200."""
    if (asked := os.environ.get("SPENSE_CUDA_ARCHS")) is None:
        nvcc = find_nvcc()
        told = (
            subprocess.run([str(nvcc), "--version"], stdout=subprocess.PIPE, text=True).stdout if nvcc else ""
        )
        release = re.search(r"release (\d+)\.(\d+)", told)
        family = release is None or tuple(map(int, release.groups())) >= (12, 9)
        asked = "90a;100f" if family else "90a;100a"
    archs = [arch for arch in asked.split(";") if arch]
    if unknown := set(archs) - set(CUTLASS_INSTANCES):
        raise SystemExit(
            f"SPENSE_CUDA_ARCHS: there are no kernels for {', '.join(sorted(unknown))}; "
            f"known are {', '.join(CUTLASS_INSTANCES)}"
        )
    return archs


def toolkit_of(nvcc: Path) -> Path:
    """Root of the CUDA toolkit; nvcc on PATH may be a wrapper script, so it is asked where it lives."""
    dry = [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    told = subprocess.run(dry, stderr=subprocess.PIPE, text=True).stderr
    top = next((line.split("TOP=", 1)[1] for line in told.splitlines() if "TOP=" in line), nvcc.parent.parent)
    return Path(top).resolve()


def why_not_cpu() -> str | None:
    """Why the CPU extension cannot be built here, in one line."""
    if os.environ.get("SPENSE_CPU") == "0":
        return "SPENSE_CPU is 0"
    if (system := (platform.system(), platform.machine())) != ("Linux", "x86_64"):
        return f"they are written for x86-64 Linux, not {' '.join(system)}"
    if not shutil.which("g++"):
        return "no g++ found"
    if not find_package("torch"):
        return NO_TORCH
    version = metadata.version("torch")
    return (
        None if tuple(map(int, version.split(".")[:2])) >= (2, 11) else f"torch {version} is older than 2.11"
    )


def why_not() -> str | None:
    """Why the CUDA extension cannot be built here, in one line."""
    if not ARCHS:
        return "SPENSE_CUDA_ARCHS is empty"
    if not find_nvcc():
        return NO_NVCC
    if not find_package("torch"):
        return NO_TORCH
    if not find_cutlass():
        return NO_CUTLASS
    return None


class Build(build_ext):
    """Compiles each translation unit in parallel, skipping objects newer than all sources, and links them."""

    def build_extension(self, ext: Extension) -> None:
        objects = Path(self.build_temp).resolve() / "spense"
        objects.mkdir(parents=True, exist_ok=True)
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        if ext.name != CPU_EXTENSION:
            self.build_cuda(objects, out)
            return
        try:
            self.build_cpu(objects, out)
        except (SystemExit, subprocess.CalledProcessError) as error:
            if os.environ.get("SPENSE_CPU") == "1":
                raise
            raise CompileError(
                f"CPU kernels are not built: {error}"
            ) from error  # optional: the rest installs

    def build_cpu(self, objects: Path, out: Path) -> None:
        torch = find_package("torch")
        if not torch:
            raise SystemExit(NO_TORCH)
        host = [
            *("g++", "-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
            *(f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{torch / 'include'}", f"-I{KERNELS}"),
        ]
        commands = {}
        for unit, flags in CPU_UNITS.items():
            name = unit.replace("/", "_")
            source = KERNELS / f"{unit}.cpp"
            commands[name] = [*host, *flags, "-c", str(source), "-o", str(objects / f"{name}.o")]
        compile_units(objects, commands)
        link(out, torch, [objects / f"{name}.o" for name in commands])
        print(f"built {out} ({out.stat().st_size / 1e6:.1f} MB)")

    def build_cuda(self, objects: Path, out: Path) -> None:
        nvcc, torch, cutlass = find_nvcc(), find_package("torch"), find_cutlass()
        if not (nvcc and torch and cutlass):
            raise SystemExit(why_not())
        cuda = toolkit_of(nvcc)
        device = [
            *(str(nvcc), "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr"),
            *(["-DSPENSE_TRAP=1"] if os.environ.get("SPENSE_TRAP") == "1" else []),
            *("-DCUTLASS_ENABLE_GDC_FOR_SM90=1", "-DCUTLASS_ENABLE_GDC_FOR_SM100=1"),
            *("-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"),
            *(f"-I{path}" for path in (KERNELS, cutlass / "include", cutlass / "tools/util/include")),
        ]
        host = [
            *("g++", "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DUSE_CUDA"),
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            *(f"-I{path}" for path in (KERNELS, torch / "include", cuda / "include")),
        ]
        commands: dict[str, list[str]] = {}

        def unit(name: str, source: str, *flags: str) -> None:
            commands[name] = [*flags, "-c", str(KERNELS / source), "-o", str(objects / f"{name}.o")]

        unit("linear_sm90_fp8", "linear/sm90_fp8.cu", *device, gencode("90a"))
        unit("linear_four_bit", "linear/four_bit.cu", *device, *map(gencode, FOUR_BIT_ARCHS), FOUR_BIT_PTX)
        unit("linear_four_bit_bindings", "linear/four_bit_bindings.cpp", *host)
        unit("sparse_mlp", "mlp/sparse_mlp.cu", *device, gencode("90a"))
        unit("sparse_mlp_bindings", "mlp/sparse_mlp_bindings.cpp", *host)
        built = ARCHS if CUTLASS == "1" else []
        for arch in ARCHS if CUTLASS != "0" else []:
            instances = CUTLASS_INSTANCES[arch]
            for n in instances if arch in built else instances[:1]:
                name, instance = f"linear_cutlass_fp8_{arch}_{n}", f"-DSPENSE_CUTLASS_INSTANCE={n}"
                unit(name, "linear/cutlass_fp8.cu", *device, gencode(arch), instance)
        with_archs = [f"-DSPENSE_WITH_{macro}=1" for arch in built for macro in MACROS[arch]]
        if built:
            unit("linear_cutlass_fp8_host", "linear/cutlass_fp8_host.cpp", *host, *with_archs)
        with_cutlass = ["-DSPENSE_WITH_CUTLASS=1", *with_archs] if built else []
        unit("linear_bindings", "linear/bindings.cpp", *host, *with_cutlass)

        compile_units(objects, commands)
        linked = [name for name in commands if built or not name.startswith("linear_cutlass")]
        library = next(p for p in (cuda / "lib64", cuda / "lib") if (p / "libcudart_static.a").exists())
        runtime = [f"-L{library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        link(out, torch, [objects / f"{name}.o" for name in linked], *runtime)
        print(f"built {out} for {', '.join(ARCHS)} ({out.stat().st_size / 1e6:.1f} MB)")


def gencode(arch: str) -> str:
    return f"-gencode=arch=compute_{arch},code=sm_{arch}"


def link(out: Path, torch: Path, objects: list[Path], *libraries: str) -> None:
    subprocess.run(
        [
            *("g++", "-shared", "-o", f"{out}.tmp", *map(str, objects), f"-L{torch / 'lib'}"),
            *("-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", *libraries),
        ],
        check=True,
    )
    os.replace(f"{out}.tmp", out)


def compile_units(objects: Path, commands: dict[str, list[str]]) -> None:
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        list(pool.map(lambda item: compile_unit(objects, *item), commands.items()))


def compile_unit(objects: Path, name: str, command: list[str]) -> None:
    """Run one compiler; its command and output are kept beside the object, and a failure prints them."""
    target, log = objects / f"{name}.o", objects / f"{name}.log"
    line = " ".join(command)
    newest = max(path.stat().st_mtime for path in KERNELS.rglob("*"))
    if target.exists() and target.stat().st_mtime > newest and log.read_text().startswith(line + "\n"):
        return
    start = time.monotonic()
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log.write_text(f"{line}\n{run.stdout}")
    if run.returncode:
        target.unlink(missing_ok=True)
        raise SystemExit(f"{name}: compiler exit code {run.returncode}\n{line}\n{run.stdout[-4000:]}")
    print(f"compiled {name} in {time.monotonic() - start:.0f} s", flush=True)


ARCHS = architectures()
CPU_EXTENSION = "vllm_spense._cpu"
REASONS = {"vllm_spense._C": why_not(), CPU_EXTENSION: why_not_cpu()}
for name, reason in REASONS.items():
    if reason:
        kind = "CPU" if name == CPU_EXTENSION else "CUDA"
        print(f"vllm-spense: {kind} kernels are not built: {reason}", file=sys.stderr)
setup(
    ext_modules=[
        Extension(name, sources=[], py_limited_api=True, optional=name == CPU_EXTENSION)
        for name, reason in REASONS.items()
        if not reason
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
