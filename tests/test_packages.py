"""What people install: the sdist builds, its wheel works in a clean environment, with kernels of its own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = """
import sys
from pathlib import Path

import torch
import vllm_spense
from vllm_spense.format import FP8_DTYPE, Layout
from vllm_spense.format.online import prune_and_pack
from vllm_spense.ops import LinearArguments, LinearSpec, quantize_per_token
from vllm_spense.ops.linear import cpu
from vllm_spense.ops.linear.reference import reference_linear

assert cpu.why_not_here() is None, cpu.why_not_here()
here = Path(vllm_spense.__file__).parent
assert here.is_relative_to(sys.prefix), here
assert torch.ops.loaded_libraries == {str(here / "_cpu.abi3.so")}, torch.ops.loaded_libraries

torch.manual_seed(0)
layout = Layout("output", 48, 144, 16)
spec = LinearSpec.of([layout])
parts = prune_and_pack(torch.randn(48, 144), layout)
layer = LinearArguments.of(spec, parts)
x = torch.randn(3, 144)
expected = reference_linear(*quantize_per_token(x), layer, x.dtype)
y = torch.ops.spense.linear_cpu(x, *cpu.interleave(spec, layer).compiled())
torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
assert expected.abs().max() > 1
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Listed anew, so that no list of an earlier build hides what MANIFEST.in lacks."""
    out = tmp_path_factory.mktemp("sdist")
    run(
        *(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", out, "sdist", "--dist-dir", out),
        cwd=ROOT,
        SPENSE_CUDA_ARCHS="",
    )
    (archive,) = out.glob("*.tar.gz")
    return archive


def test_sdist_holds_what_setup_compiles_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {str(p.relative_to(ROOT)) for p in (ROOT / "kernels").rglob("*") if p.is_file()}
    others = {"setup.py", "tools/find_cuda.py", "pyproject.toml", "LICENSE", "vllm_spense/py.typed"}
    assert kernels | others <= names
    assert not [name for name in names if name.endswith((".so", ".o")) or name.startswith("tests/")]


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64") or not shutil.which("g++"),
    reason="CPU kernels need g++ on x86-64 Linux",
)
def test_wheel_of_the_sdist_works_in_a_clean_environment(sdist: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(
        *(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", tmp_path, sdist),
        cwd=tmp_path,
        SPENSE_CUDA_ARCHS="",
        SPENSE_CPU="1",
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name

    home = tmp_path / "environment"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    run(*pip, "--python", python, "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    # torch and the rest come from here. Where a checkout is installed for editing, that is a .pth file, which
    # does not count in a folder added by another one.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")

    run(python, "-c", SMOKE, cwd=tmp_path)
    report = run(home / "bin" / "spense", "doctor", cwd=tmp_path)
    lines = {line.split("  ")[0]: line.split() for line in report.splitlines()}
    assert {"ok"} <= set(lines["vllm-spense"]), report
    assert {"ok"} <= set(lines["CPU kernels"]), report
