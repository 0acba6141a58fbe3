"""The Triton kernel without a GPU: interpreted, its PTX evaluated, and compiled ahead of time.

Triton decides when it is imported whether to interpret, so interpreted kernels run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from tests.layers import ACCUMULATION, ROUNDING, assert_within_rounding, layouts_of, make_layer
from vllm_spense.format import FP8_DTYPE, Codecs
from vllm_spense.format.sparse24 import LEGAL_NIBBLES, decompress
from vllm_spense.ops import LinearArguments, quantize_per_token
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.ops.linear.triton import TritonBackend, triton_linear

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

INTERPRETED = ROUNDING | {torch.bfloat16: 2.0**-7}
"""The interpreter cuts bf16 off where a GPU rounds."""
TENSOR_CORES = 2.0**-16
FP8_TENSOR_CORES = 2.0**-9
"""Some 14 bits (Hopper, Ada) within one tile of features."""
SHARED_MEMORY = 99 * 1024
"""Per block on sm_86, sm_89 and sm_120, the smallest of what the kernel is for."""
FINITE = [code for code in range(256) if code & 0x7F != 0x7F]
Arguments = tuple[torch.Tensor, torch.Tensor | None, LinearArguments, torch.dtype]


# --- layers ---------------------------------------------------------------------------------------------


def arguments(
    split: str,
    sparse: list[int],
    dense: list[int],
    other: int,
    tokens: int,
    x_dtype: torch.dtype = FP8_DTYPE,
    out: torch.dtype = torch.float32,
    bias: bool = True,
) -> Arguments:
    """Operator arguments; ``other``: features of an output split, rows of an input split."""
    extent = sum(sparse) + sum(dense)
    rows, features = (extent, other) if split == "output" else (other, extent)
    spec = LinearSpec(split, rows, features, tuple(sparse), tuple(dense))
    layer = make_layer(layouts_of(spec), bias=bias, seed=tokens + other)
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens + other))
    xq, x_scale = quantize_per_token(x) if x_dtype == FP8_DTYPE else (x.to(x_dtype), None)
    return xq, x_scale, layer.arguments(), out


def check(
    given: Arguments,
    y: torch.Tensor,
    rounding: dict[torch.dtype, float] = INTERPRETED,
    accumulation: float = ACCUMULATION,
) -> None:
    x, x_scale, layer, out = given
    assert_within_rounding(y, x, x_scale, layer, out, rounding=rounding, accumulation=accumulation)


# --- in Triton's interpreter ----------------------------------------------------------------------------


def interpreted(given: Arguments, capability: int | None = None) -> torch.Tensor:
    """Runs in the interpreting process; with the tiles of a GPU of some ``capability``, or its own."""
    from vllm_spense.ops.linear import triton_kernel

    if capability is None:
        return triton_linear(*given)
    x, x_scale, layer, out = given
    y = torch.empty(x.shape[0], layer.out_features, dtype=out)
    launch = triton_kernel.plan(y, x, x_scale, layer, capability)
    triton_kernel._kernel[launch.grid](**launch.arguments | {"PTX": False})
    return y


def applied(spec: LinearSpec, tensors: dict[str, torch.Tensor], x: torch.Tensor, capability: tuple[int, int]):
    """The back end in the interpreting process: eager, and as one graph."""
    backend = TritonBackend()
    prepared = backend.prepare(spec, tensors)
    assert set(prepared) == {"sparse_values", "sparse_meta", "weight_packed", "weight_scale"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

        def forward(x: torch.Tensor) -> torch.Tensor:
            return backend.apply(spec, prepared, x * 2, None)

        torch._dynamo.reset()
        compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
        return forward(x), compiled(x)


def opchecked(given: Arguments, checks: tuple[str, ...]) -> None:
    x, x_scale, layer, out = given
    flat = (x, x_scale, *layer.flat(), out)
    torch.library.opcheck(torch.ops.spense.triton_linear.default, flat, test_utils=checks)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(int).result()  # starts the process
    yield pool
    pool.shutdown()


LAYERS = {
    "ragged": ("output", [37], [33], 40),
    "dense": ("output", [0], [70], 24),
    "sparse": ("output", [70], [0], 24),
    "gate_up": ("output", [24, 24], [40, 40], 72),
    "qkv": ("output", [0, 24, 3], [24, 0, 70], 264),
    "columns": ("input", [56], [88], 70),
    "no sparse columns": ("input", [0], [144], 24),
    "no dense columns": ("input", [144], [0], 24),
    "one column of each": ("input", [8], [1], 5),
    "whole tiles": ("input", [512], [256], 65),
    "tiles and a rest": ("input", [264], [300], 130),
}


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("name", LAYERS)
def test_fp8(interpreter: ProcessPoolExecutor, name: str, tokens: int) -> None:
    given = arguments(*LAYERS[name], tokens)
    check(given, interpreter.submit(interpreted, given).result())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [40, 70, 130])
@pytest.mark.parametrize("name", ["ragged", "tiles and a rest"])
def test_tiles_of_many_tokens(
    interpreter: ProcessPoolExecutor, name: str, tokens: int, capability: int
) -> None:
    given = arguments(*LAYERS[name], tokens)
    check(given, interpreter.submit(interpreted, given, capability).result())


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "tokens"), [("gate_up", 1), ("qkv", 3), ("columns", 17), ("ragged", 70)])
def test_activations_that_are_not_quantised(
    interpreter: ProcessPoolExecutor, name: str, tokens: int, x_dtype: torch.dtype
) -> None:
    given = arguments(*LAYERS[name], tokens, x_dtype, out=x_dtype)
    check(given, interpreter.submit(interpreted, given).result())


@pytest.mark.parametrize("out", ROUNDING, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_output_dtypes(interpreter: ProcessPoolExecutor, out: torch.dtype, bias: bool) -> None:
    given = arguments(*LAYERS["gate_up"], 7, out=out, bias=bias)
    check(given, interpreter.submit(interpreted, given).result())


def test_without_scales(interpreter: ProcessPoolExecutor) -> None:
    x, _, layer, out = arguments(*LAYERS["columns"], 3)
    given = (x, None, layer._replace(weight_scale=None), out)
    check(given, interpreter.submit(interpreted, given).result())


def test_no_tokens(interpreter: ProcessPoolExecutor) -> None:
    y = interpreter.submit(interpreted, arguments(*LAYERS["gate_up"], 0)).result()
    assert y.shape == (0, 128)


@pytest.mark.parametrize("x_dtype", [FP8_DTYPE, torch.bfloat16, torch.float16], ids=str)
def test_every_weight_exactly(interpreter: ProcessPoolExecutor, x_dtype: torch.dtype) -> None:
    """All finite e4m3 numbers, as both values of a group at all six pairs of positions, and in D."""
    codes = torch.tensor(FINITE + FINITE[:2], dtype=torch.uint8)
    values = torch.stack((codes, codes.flip(0)), dim=-1).view(8, 64)  # a value in every row and shift
    values = values.repeat(6, 1).view(FP8_DTYPE)
    nibbles = torch.tensor(LEGAL_NIBBLES, dtype=torch.uint8)
    meta = (nibbles | nibbles.roll(1) << 4).repeat_interleave(8)[:, None].expand(48, 16).contiguous()
    dense = codes.repeat(12).view(48, 64).view(FP8_DTYPE)
    x = torch.eye(192).to(x_dtype)
    layer = LinearArguments(values, meta, dense, None, None, [128], [64], False)
    given = (x, None, layer, torch.float32)
    y = interpreter.submit(interpreted, given).result()
    expected = torch.cat((decompress(values, meta), dense), dim=1).float()
    assert expected.unique().numel() == len(FINITE) - 1  # 0 and -0 are equal
    assert torch.equal(y.T, expected)


def test_a_token_does_not_see_the_others(interpreter: ProcessPoolExecutor) -> None:
    """Nor do features beyond the end of a row, which are the next token's."""
    given = arguments(*LAYERS["tiles and a rest"], 3, torch.bfloat16)
    given[0][1:] = float("nan")
    y = interpreter.submit(interpreted, given).result()
    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1:]).any()


@pytest.mark.parametrize("split", ["output", "input"])
def test_opcheck(interpreter: ProcessPoolExecutor, split: str) -> None:
    """``test_schema`` needs an allclose that FP8 lacks on CPUs: it runs in ``tests/ops/test_op.py``."""
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    given = arguments(split, [8], [16], 24, 5)
    interpreter.submit(opchecked, given, checks).result()


@pytest.mark.parametrize(
    ("out", "weight", "message"),
    [(torch.float64, FP8_DTYPE, "output dtype"), (torch.float32, torch.bfloat16, "weights")],
)
def test_other_dtypes_are_refused(
    interpreter: ProcessPoolExecutor, out: torch.dtype, weight: torch.dtype, message: str
) -> None:
    x, _, layer, _ = arguments("output", [8], [8], 8, 1, torch.bfloat16, out)
    given = (x, None, layer._replace(dense_weight=layer.dense_weight.to(weight)), out)
    with pytest.raises(ValueError, match=message):
        interpreter.submit(interpreted, given).result()


# --- the back end ---------------------------------------------------------------------------------------

SPEC = LinearSpec("output", 48, 32, (8, 8), (16, 16))


@pytest.mark.parametrize(("capability", "quantised"), [((8, 9), True), ((8, 0), False)])
def test_back_end_equals_the_definition(
    interpreter: ProcessPoolExecutor, capability: tuple[int, int], quantised: bool
) -> None:
    layer = make_layer(layouts_of(SPEC))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    eager, compiled = interpreter.submit(applied, SPEC, layer.tensors(), x, capability).result()
    xq, x_scale = quantize_per_token(x * 2) if quantised else (x * 2, None)
    check((xq, x_scale, layer.arguments(), torch.bfloat16), eager)
    assert torch.equal(eager, compiled)


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, cuda = TritonBackend(), torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backend.why_not(SPEC, cuda) is None
    assert "not on cpu" in str(backend.why_not(SPEC, torch.device("cpu")))
    for codec, title in (("bf16", "bf16"), ("int8", "INT8")):
        other = LinearSpec("output", 48, 32, (16,), (32,), Codecs.of(codec))
        assert backend.why_not(other, cuda) == f"the kernel takes FP8 weights, not {title}"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "7.5 is below 8.0" in str(backend.why_not(SPEC, cuda))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        assert "cannot be imported" in str(backend.why_not(SPEC, cuda))


def test_importing_the_back_end_does_not_import_triton() -> None:
    code = "import sys, vllm_spense.ops.linear.triton; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- inline assembly, evaluated by its definition (PTX ISA: prmt, fma, min) ----------------------------

Registers = dict[str, np.ndarray]


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    source = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
        byte = source >> np.uint64(8) * (nibble & np.uint64(7)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint64(8), sign, byte)
        result |= (byte << np.uint64(8 * i)).astype(np.uint32)
    return result


def halves(function: Any, dtype: torch.dtype, *operands: np.ndarray) -> np.ndarray:
    """A float operation on both halves of words, computed in double and rounded once; no denormal operand."""
    wide = [torch.from_numpy(np.ascontiguousarray(o).view(np.int16)).view(dtype).double() for o in operands]
    for operand in wide:
        assert ((operand == 0) | (operand.abs() >= torch.finfo(dtype).tiny)).all()
    return function(*wide).to(dtype).view(torch.int16).numpy().view(np.uint32)


OPERATIONS = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, n: a >> n,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "add.u32": np.add,
    "prmt.b32": prmt,
    "fma.rn.bf16x2": lambda *o: halves(lambda a, b, c: a * b + c, torch.bfloat16, *o),
    "fma.rn.f16x2": lambda *o: halves(lambda a, b, c: a * b + c, torch.float16, *o),
    "min.bf16x2": lambda *o: halves(torch.minimum, torch.bfloat16, *o),
    "min.f16x2": lambda *o: halves(torch.minimum, torch.float16, *o),
}


def evaluate(ptx: str, outputs: int, *inputs: np.ndarray) -> list[np.ndarray]:
    """Run straight-line PTX on vectors of 32-bit registers; inputs are numbered after the outputs."""
    header, *lines = ptx.strip("{}\n").split("\n")
    declared = set(header.removeprefix(".reg .b32 ").rstrip(";").split(", "))
    registers: Registers = {f"${outputs + i}": value.astype(np.uint32) for i, value in enumerate(inputs)}
    allowed = declared | {f"${i}" for i in range(outputs)}

    def operand(text: str) -> np.ndarray:
        if text[0].isdigit():
            return np.full_like(registers[f"${outputs}"], int(text, 0))
        return registers[text]

    for line in lines:
        name, rest = line.rstrip(";").split(" ", 1)
        target, *sources = rest.split(", ")
        assert target in allowed, line
        registers[target] = OPERATIONS[name](*map(operand, sources))
    return [registers[f"${i}"] for i in range(outputs)]


def test_ptx_spreads_bytes() -> None:
    """Every metadata byte in every lane, with random values."""
    from vllm_spense.ops.linear import triton_kernel

    values, meta = compressed_words()
    given = [*values.view(np.uint32).T, meta.view(np.uint32)[:, 0]]
    out = evaluate(triton_kernel._SPREAD_BYTES.value, 8, *given)
    words = np.stack([np.stack(out[:4], -1), np.stack(out[4:], -1)], -1)  # element, even or odd group
    assert torch.equal(
        torch.from_numpy(words.reshape(len(meta), 8).view(np.uint8)), dense_bytes(values, meta)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ptx_spreads_halves(dtype: torch.dtype) -> None:
    from vllm_spense.ops.linear import triton_kernel

    ptx = triton_kernel._SPREAD_BF16 if dtype == torch.bfloat16 else triton_kernel._SPREAD_FP16
    values, meta = compressed_words()
    out = evaluate(ptx.value, 16, *values.view(np.uint32).T, meta.view(np.uint32)[:, 0])
    words = np.stack(out, -1).reshape(len(meta), 4, 4).transpose(0, 2, 1)  # word, element → element, word
    found = torch.from_numpy(np.ascontiguousarray(words).view(np.int16)).view(dtype).view(len(meta), 32)
    assert torch.equal(found.float(), dense_bytes(values, meta).view(FP8_DTYPE).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ptx_widens_bytes(dtype: torch.dtype) -> None:
    from vllm_spense.ops.linear import triton_kernel

    ptx = triton_kernel._WIDEN_BF16 if dtype == torch.bfloat16 else triton_kernel._WIDEN_FP16
    codes = np.array(list(itertools.product(FINITE[::7] + FINITE[:9], FINITE)), dtype=np.uint8)
    codes = np.ascontiguousarray(np.concatenate((codes, codes[:, ::-1]), axis=1))
    out = evaluate(ptx.value, 2, codes.view(np.uint32)[:, 0])
    found = torch.from_numpy(np.stack(out, -1).view(np.int16)).view(dtype)
    expected = torch.from_numpy(codes).view(FP8_DTYPE).to(dtype)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))  # also the sign of zero


def compressed_words() -> tuple[np.ndarray, np.ndarray]:
    """Value bytes [n, 16] and legal metadata bytes [n, 4], each of the 36 in each place."""
    rng = np.random.default_rng(0)
    legal = np.array([a | b << 4 for a in LEGAL_NIBBLES for b in LEGAL_NIBBLES], dtype=np.uint8)
    meta = np.stack([np.roll(np.tile(legal, 36), i * np.arange(1, 2)) for i in range(4)], -1)
    meta = np.stack([rng.permutation(column) for column in meta.T], -1)
    values = np.array(FINITE, dtype=np.uint8)[rng.integers(len(FINITE), size=(len(meta), 16))]
    return values, np.ascontiguousarray(meta)


def dense_bytes(values: np.ndarray, meta: np.ndarray) -> torch.Tensor:
    packed = torch.from_numpy(values).view(FP8_DTYPE)
    return decompress(packed, torch.from_numpy(meta)).view(torch.uint8)


# --- compiled without a GPU -----------------------------------------------------------------------------


class Target:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(scope="module")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


MODEL = {
    "gate_up": ("output", [1280, 1280], [1280, 1280], 5120),
    "down": ("input", [2560], [2560], 5120),
    "ragged": ("output", [37], [33], 40),
    "dense": ("output", [0], [1280], 5120),
    "sparse columns": ("input", [2560], [0], 1280),
}
FP8_MMA = {89: r"mma\.sync\S*\.e4m3\.e4m3", 90: r"wgmma\.mma_async\S*\.e4m3\.e4m3"}
COMPILED = [
    (80, "gate_up", 1, torch.bfloat16),
    (80, "down", 1000, torch.bfloat16),
    (80, "ragged", 40, torch.float16),
    (80, "dense", 1, torch.bfloat16),
    (89, "down", 1, FP8_DTYPE),
    (89, "sparse columns", 1, FP8_DTYPE),
    (89, "gate_up", 40, FP8_DTYPE),
    (89, "gate_up", 1000, FP8_DTYPE),
    (90, "gate_up", 1, FP8_DTYPE),
    (90, "down", 1000, FP8_DTYPE),
]


@pytest.mark.parametrize(("capability", "name", "tokens", "x_dtype"), COMPILED, ids=str)
@pytest.mark.usefixtures("triton_cache")
def test_compiles(capability: int, name: str, tokens: int, x_dtype: torch.dtype) -> None:
    from triton.runtime.driver import driver

    from vllm_spense.ops.linear import triton_kernel

    split, sparse, dense, other = MODEL[name]
    x, x_scale, layer, out = arguments(split, sparse, dense, other, tokens, x_dtype, torch.bfloat16)
    y = torch.empty(tokens, layer.out_features, dtype=out)
    launch = triton_kernel.plan(y, x, x_scale, layer, capability)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Target(capability))
        kernel = triton_kernel._kernel.warmup(grid=launch.grid, **launch.arguments)
    ptx = kernel.asm["ptx"]
    mma = FP8_MMA.get(capability, r"mma\.sync\S*" + (r"\.bf16" if x_dtype == torch.bfloat16 else r"\.f16"))
    assert re.search(mma, ptx)
    assert "prmt.b32" in ptx
    assert "cp.async" in ptx  # loads run ahead
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert len(kernel.asm["cubin"]) > 0


# --- on a GPU -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("x_dtype", [FP8_DTYPE, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_gpu(name: str, x_dtype: torch.dtype) -> None:
    if x_dtype == FP8_DTYPE and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 tensor cores")
    accumulation = FP8_TENSOR_CORES if x_dtype == FP8_DTYPE else TENSOR_CORES
    for tokens, out in zip([1, 17, 40, 70, 200], itertools.cycle(ROUNDING), strict=False):
        given = arguments(*LAYERS[name], tokens, x_dtype, out)
        x, x_scale, layer, _ = given
        tensors = (a.cuda() if isinstance(a, torch.Tensor) else a for a in (x, x_scale, *layer))
        on_gpu, scale_on_gpu, *layer_on_gpu = tensors
        y = triton_linear(on_gpu, scale_on_gpu, LinearArguments(*layer_on_gpu), out)
        check(given, y.cpu(), ROUNDING, accumulation)
