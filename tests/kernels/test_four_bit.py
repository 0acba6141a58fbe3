"""What the compiler made of the 4-bit kernels, and that their operators refuse what no kernel may see."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from torch.nn.functional import linear

from tests.kernels.sass import LIBRARY, functions, tool
from tests.layers import four_bit_tensors
from vllm_spense.format import Codecs
from vllm_spense.ops import LinearSpec
from vllm_spense.ops.linear.four_bit import FourBitLayer, prepared
from vllm_spense.ops.linear.four_bit_cuda import MOST_TOKENS, _cuda_linear
from vllm_spense.ops.linear.reference import decoded

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


@pytest.mark.parametrize(
    ("tokens", "dtype", "operator"),
    [
        (3, torch.bfloat16, "linear_four_bit"),
        (MOST_TOKENS + 1, torch.bfloat16, "dequantize_four_bit"),
        (3, torch.float32, "dequantize_four_bit"),
    ],
)
def test_the_back_end_calls_the_operators_as_they_are_declared(
    tokens: int, dtype: torch.dtype, operator: str
) -> None:
    """With stand-ins for CPU tensors behind the library's own schemas."""
    spec = LinearSpec("output", 24, 64, (8, 4), (4, 8), Codecs.of("nf4"))
    tensors = four_bit_tensors(spec)
    weight = decoded(spec, tensors).to(dtype)
    x, bias = torch.randn(tokens, 64).to(dtype), torch.randn(24).to(dtype)
    layer = FourBitLayer.of(spec, prepared(spec, tensors), bias)
    called = []

    def check(name, sparse_values, meta, sparse_absmax, codes, dense_absmax, tables, *sizes) -> None:
        called.append(name)
        given = (sparse_values, meta, sparse_absmax, codes, dense_absmax, tables)
        assert all(a is b or torch.equal(a, b) for a, b in zip(given, layer[:6], strict=True))
        assert [*sizes] == [[8, 4], [4, 8], True, [64, 64], False]

    def product(x, *rest) -> None:
        *weights, bias, sparse, dense, split, blocks, shuffle, y = rest
        check("linear_four_bit", *weights, sparse, dense, split, blocks, shuffle)
        y.copy_(linear(x, weight, bias))

    def matrix(*rest) -> None:
        check("dequantize_four_bit", *rest[:-1])
        rest[-1].copy_(weight)

    library = torch.library.Library("spense", "IMPL", "CPU")
    library.impl("linear_four_bit", product)
    library.impl("dequantize_four_bit", matrix)
    y = _cuda_linear._init_fn(x, False, *layer.flat())
    library._destroy()
    assert called == [operator]
    assert torch.equal(y, linear(x, weight, bias))
