"""The compiled extension and the Python packages of a GPU machine: carried there, found, or compiled."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

from benchmarks.common.results import ROOT, kernel_sources, read
from tools.find_cuda import find_cutlass, find_nvcc
from tools.gpu.run import Run

LIBRARY = ROOT / "vllm_spense" / "_C.abi3.so"
BUNDLE = ROOT / ".gpu"
"""What `make gpu-bundle` has made to be carried (tools/gpu/bundle.py)."""
HEADERS = "set CUTLASS_HOME to a CUTLASS 4.2 tree, or pip install --no-deps nvidia-cutlass==4.2.0.0"
NEEDED = ("torch", "pydantic", "safetensors", "numpy", "pytest")
WANTED = {
    "triton": "the Triton tests and torch.compile",
    "matplotlib": "the plot",
    "transformers": "pruning",
    "vllm": "serving",
}


def missing_packages() -> list[str]:
    return [name for name in NEEDED if not importlib.util.find_spec(name)]


def install_wheels(bundle: Path = BUNDLE, target: Path = ROOT / "build" / "gpu-site") -> str | None:
    """If packages are missing, install the carried wheels beside the checkout; None, or what failed.

    They are found by this process and its children.
    """
    wheels = sorted((bundle / "wheels").glob("*.whl"))
    if not wheels or not missing_packages():
        return None
    options = ("-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), *map(str, wheels)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        return ran.stderr.strip()[-1000:]
    sys.path.insert(0, str(target))
    paths = [str(target), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    invalidate_caches()
    return None


def ask_extension() -> tuple[str | None, bool]:
    """Why it does not load and whether it has CUTLASS, from a process of its own: once loaded, it stays."""
    code = (
        "import json; from vllm_spense.ops import extension; "
        "print(json.dumps([extension.why_not_loaded(), bool(extension.cutlass_capabilities())]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    try:
        reason, cutlass = json.loads(ran.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return f"vllm_spense.ops cannot be imported: {ran.stderr.strip().splitlines()[-1:]}", False
    return reason, cutlass


def library_digest(library: Path | None = None) -> str:
    library = library or LIBRARY
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16] if library.is_file() else ""


def library_fits(record: dict[str, Any]) -> str | None:
    """Why the extension that is there need not be compiled, or None."""
    if not LIBRARY.is_file():
        return None
    if record.get("library") == library_digest():
        if record.get("kernels") == kernel_sources():
            return "made from these sources, by the record of its build"
        if record.get("kernels") or record.get("trap"):
            return None
    newest = max(path.stat().st_mtime for path in (ROOT / "kernels").rglob("*"))
    return "newer than every file of kernels/" if LIBRARY.stat().st_mtime > newest else None


def carried(bundle: Path = BUNDLE) -> dict[str, Any]:
    """The record of a carried library that is made from these sources, or an empty one."""
    record, library = read(bundle / "build.json"), bundle / "_C.abi3.so"
    fits = record.get("kernels") == kernel_sources() and record.get("library") == library_digest(library)
    return record if fits else {}


def trap_library(bundle: Path = BUNDLE) -> Path:
    """The library whose kernels stop where they would hang, if it was carried; else the one for timing."""
    library = bundle / "trap" / "_C.abi3.so"
    fits = carried(bundle) and read(bundle / "build.json").get("trap_library") == library_digest(library)
    return library if fits else LIBRARY


def stage_build(run: Run, limit: float, cutlass: bool = False) -> bool:
    """True if an extension is there that loads; whether it fits the sources is in the record."""
    start, stage = run.clock(), "cutlass" if cutlass else "build"
    trap, record = os.environ.get("SPENSE_TRAP") == "1", run.state("build")
    anew = run.fresh or cutlass or trap
    fits = None if anew else library_fits(record)
    if not anew and not fits and (record := carried()):
        shutil.copy(BUNDLE / "_C.abi3.so", LIBRARY)
        fits = library_fits(record)
    reason, has_cutlass = ask_extension() if LIBRARY.is_file() else ("not built", False)
    if fits and reason is None:
        how, stale = f"accepted {LIBRARY.name}: {fits}", False
    elif find_nvcc() and find_cutlass():
        run.say(f"compiling the extension ({reason or 'the one that is there is older than kernels/'})")
        cores = os.cpu_count() or 2
        jobs = str(max(1, min(cores, _memory_gb() // 6) if cutlass else cores))
        archs = os.environ.get("SPENSE_CUDA_ARCHS", "90a")
        environment = {
            "SPENSE_CUTLASS": str(int(cutlass)),
            "SPENSE_CUDA_ARCHS": archs,
            "MAX_JOBS": os.environ.get("MAX_JOBS", jobs),
        }
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        ended = run.child(command, limit=limit, env=environment, cwd=ROOT, on_line=run.say)
        reason, has_cutlass = ask_extension() if ended.ok else (f"compiling failed: {ended.reason}", False)
        how, stale = f"compiled in {ended.seconds:.0f} s", not ended.ok
    else:
        missing = "nvcc" if not find_nvcc() else f"the CUTLASS headers ({HEADERS})"
        how, stale = f"not compiled, missing: {missing}", True
        if reason is None:
            run.say(f"NOTE {LIBRARY.name} loads, but nothing says that it was made from these kernels/")
    if trap:
        run.say("NOTE kernels with SPENSE_TRAP say where they would hang, and are slower: not for timing")
    content = {"library": library_digest(), "how": how, "stale": stale, "trap": trap}
    content["kernels"] = None if stale or trap else kernel_sources()  # the next call builds again
    state = "failed" if reason else "done"
    run.save("build", state, start, **content, reason=reason, cutlass=reason is None and has_cutlass)
    run.say(f"{'FAIL' if reason else 'PASS'} {stage}: {how}{f' ({reason})' if reason else ''}")
    return reason is None


def _memory_gb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
