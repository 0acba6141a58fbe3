"""What the compiler made of the Hopper kernel: the instructions it is for, and no spills."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

import vllm_spense
from tests.kernels.sass import LIBRARY, disassembly, tool


def test_every_configuration_is_compiled() -> None:
    numbers = [list(map(int, re.findall(r"L[ib](\d+)E", name + "E"))) for name in disassembly()]
    tiles = {(groups, tokens, multicast, *kind) for groups, tokens, multicast, _, *kind in numbers}
    decode = {(groups, tokens, 0, 0, 0) for groups in (1, 2) for tokens in (8, 16, 32, 64, 128)}
    joined = {
        (2, tokens, int(tokens == 128), *kind) for tokens in (8, 16, 32, 64, 128) for kind in ((1, 0), (0, 1))
    }
    assert tiles == decode | joined | {(2, 128, 1, 0, 0), (2, 256, 1, 0, 0)}


def test_the_tensor_cores_run_sparse_and_dense_fp8() -> None:
    for name, sass in disassembly().items():
        tokens = re.findall(r"L[ib](\d+)E", name + "E")[1]
        shape = f"64x{tokens}x"
        assert f"QGMMA.SP.{shape}64.F32.E4M3.E4M3" in sass, name
        assert f"QGMMA.{shape}32.F32.E4M3.E4M3" in sass, name


def test_nothing_is_spilled_and_wgmmas_stay_in_flight() -> None:
    for name, sass in disassembly().items():
        assert not re.search(r"\b(STL|LDL)\b", sass), f"{name} spills registers"
        waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", sass)
        assert "0x1" in waits, f"{name} waits for every stage: ptxas has serialised the wgmmas"


def test_the_library_needs_no_cuda_to_load() -> None:
    run = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.+?)\]", run.stdout)
    assert not [name for name in needed if "cuda" in name.lower()], needed


def test_a_call_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="linear_sm90 failed with CUDA error"):
        torch.ops.spense.sm90_clusters(128, 16, 2, False)


@pytest.mark.parametrize(
    "shape",
    [(96, 16, 1, False), (128, 24, 1, False), (128, 16, 3, False), (128, 256, 8, True), (64, 128, 1, True)],
)
def test_shapes_that_are_not_compiled_are_refused(shape: tuple) -> None:
    with pytest.raises(RuntimeError, match="refused the call with status 1"):
        torch.ops.spense.sm90_clusters(*shape)
    with pytest.raises(RuntimeError, match="refused the call with status 1"):
        torch.ops.spense.sm90_clusters(*shape, False, True)


def check_object(pattern: str) -> str:
    """SASS of an object that `make kernels-check` or `make kernels` compiled."""
    root = Path(vllm_spense.__file__).parents[1]
    found = sorted(root.glob(f"build/temp*/spense/{pattern}.o"))
    if not found:
        pytest.skip(f"{pattern} is not built (make kernels-check)")
    tools = str(Path(tool("nvdisasm")).parent)
    command = [tool("cuobjdump"), "-sass", str(found[0])]
    env = {"PATH": f"{tools}:/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


@pytest.mark.parametrize(
    ("pattern", "instructions"),
    [
        ("linear_cutlass_fp8_90a_0", (r"QGMMA\.SP\.64x256x64\.F32\.E4M3\.E4M3",)),
        # Blackwell's sparse MMA prints no suffix; only sparse ones copy metadata to tensor memory (UTCCP).
        ("linear_cutlass_fp8_100[af]_4", (r"\bUTCQMMA\b", r"\bUTCCP\b")),
    ],
)
def test_the_cutlass_instances_use_sparse_tensor_cores(pattern: str, instructions: tuple[str, ...]) -> None:
    sass = check_object(pattern)
    for instruction in instructions:
        assert re.search(instruction, sass), instruction
    assert "ACQBULK" in sass, "no griddepcontrol.wait: a race under programmatic dependent launch"
    assert not re.search(r"\b(STL|LDL)\b", sass), "spills registers"
