"""What the compiler made of the 4-bit kernels, and that their operators refuse what no kernel may see."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from tests.kernels.sass import LIBRARY, functions, tool

ARCHITECTURES = ("sm_80", "sm_90")
PRODUCT = r"linear_kernelI(13__nv_bfloat16|6__half)Li([12])ELb([01])ELb([01])EEEv"
MATRIX = r"dequantize_kernelI(13__nv_bfloat16|6__half|f)Lb([01])ELb([01])EEEv"
CODES = {"0": 64, "1": 64 + 32}
"""What a thread of the product looks up in a step, without and with a 2:4 region."""
CODES_OF_MATRIX = {"0": 8, "1": 4}
"""Of the dense and of the 2:4 region's matrix: all that a thread looks up."""


def kernels(architecture: str, pattern: str) -> dict[tuple[str, ...], str]:
    found = {name: re.search(rf"8four_bit\d+{pattern}", name) for name in functions(architecture)}
    return {match.groups(): functions(architecture)[name] for name, match in found.items() if match}


def count(sass: str, opcode: str) -> int:
    return len(re.findall(rf"(?<![\w.]){opcode}\b", sass))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instance_is_compiled_without_local_memory(architecture: str) -> None:
    products, matrices = kernels(architecture, PRODUCT), kernels(architecture, MATRIX)
    assert (len(products), len(matrices)) == (16, 12)
    for sass in (*products.values(), *matrices.values()):
        assert not re.search(r"\b(STL|LDL)\b", sass)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_product_runs_on_tensor_cores(architecture: str) -> None:
    for (kind, tiles, *_), sass in kernels(architecture, PRODUCT).items():
        assert count(sass, "HMMA.16816.F32" + (".BF16" if "bfloat" in kind else "")) >= 8 * int(tiles)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_codes_are_looked_up_as_asked(architecture: str) -> None:
    """The product's sums go through shared memory, too, those of eight warps."""
    for (_, tiles, shuffle, sparse), sass in kernels(architecture, PRODUCT).items():
        shuffles, loads = count(sass, "SHFL"), count(sass, "LDS")
        if shuffle == "1":
            assert shuffles >= CODES[sparse]
            assert loads < CODES["0"]
        else:
            assert shuffles == 0
            assert loads >= CODES[sparse] + 8 * int(tiles)
    for (_, shuffle, sparse), sass in kernels(architecture, MATRIX).items():
        codes = CODES_OF_MATRIX[sparse]
        assert (count(sass, "SHFL"), count(sass, "LDS")) == ((codes, 0) if shuffle == "1" else (0, codes))


def test_there_is_code_for_later_gpus() -> None:
    """PTX of sm_80: their driver compiles it."""
    listed = [tool("cuobjdump"), "-lptx", str(LIBRARY)]
    run = subprocess.run(listed, capture_output=True, text=True, check=True)
    assert "sm_80.ptx" in run.stdout


def test_loading_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="load_four_bit failed with CUDA error"):
        torch.ops.spense.load_four_bit()
