"""The Triton kernel for 4-bit layers without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from tests.layers import ROUNDING, assert_within_rounding, four_bit_tensors
from tests.ops.test_triton import (  # noqa: F401
    OPERATIONS,
    SHARED_MEMORY,
    Target,
    evaluate,
    interpreter,
    triton_cache,
)
from vllm_spense.format import Codecs
from vllm_spense.format.codecs import FP8, codec
from vllm_spense.format.codecs.four_bit import FourBit
from vllm_spense.ops import LinearArguments
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.four_bit import FourBitLayer, prepared
from vllm_spense.ops.linear.four_bit_triton import FourBitTritonBackend, triton_linear
from vllm_spense.ops.linear.four_bit_triton_ptx import look_up_bytes, look_up_groups
from vllm_spense.ops.linear.reference import decoded
from vllm_spense.ops.linear.spec import LinearSpec

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

CUT_OFF = 2.0**-7
"""The interpreter cuts bf16 off where a GPU rounds."""
LAYERS = {
    "ragged": ("output", [37], [33], 40),
    "dense": ("output", [0], [70], 48),
    "fused and dense": ("output", [0, 0, 0], [24, 3, 70], 320),
    "odd": ("input", [8], [283], 9),
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


def codec_of(name: str) -> FourBit:
    found = codec(name)
    assert isinstance(found, FourBit)
    return found


NF4, FP4 = codec_of("nf4"), codec_of("fp4")
OTHER_TABLE = NF4.variant(table=tuple(i / 7 - 1.0 for i in (3, 9, 1, 7, *range(12, 24))))
CODECS = {
    "nf4": Codecs(NF4, NF4),
    "fp4": Codecs(FP4, FP4),
    "32": Codecs(NF4.variant(32), NF4.variant(32)),
    "fp4 16": Codecs(FP4.variant(16), FP4.variant(16)),
    "256": Codecs(NF4.variant(256), NF4.variant(256)),
    "table": Codecs(OTHER_TABLE, OTHER_TABLE),
    "two": Codecs(FP4.variant(32), NF4),
    "mixed": Codecs(NF4, FP8),
}
MIXED = ["ragged", "sparse", "gate_up", "columns", "no dense columns", "tiles and a rest"]
"""Layers whose shards have both regions in common."""


def spec_of(name: str, codecs: str) -> LinearSpec:
    split, sparse, dense, other = LAYERS[name]
    extent = sum(sparse) + sum(dense)
    rows, features = (extent, other) if split == "output" else (other, extent)
    return LinearSpec(split, rows, features, tuple(sparse), tuple(dense), CODECS[codecs])


def inputs(spec: LinearSpec, tokens: int, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, spec.in_features, generator=generator).to(dtype)
    return four_bit_tensors(spec, tokens), x, torch.randn(spec.out_features, generator=generator).to(dtype)


def check(spec: LinearSpec, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor, y: torch.Tensor) -> None:
    """The product with the definition's matrix in x's dtype, whose cut off bits count as sums' errors."""
    weight = decoded(spec, tensors).to(x.dtype)
    none = torch.empty(0)
    layer = LinearArguments(none, none, none, None, bias, [], [], True)
    given = {"rounding": ROUNDING | {torch.bfloat16: CUT_OFF}}
    if x.dtype == torch.bfloat16:
        given["accumulation"] = CUT_OFF
    assert_within_rounding(y, x, None, layer, x.dtype, weight=weight, **given)


# --- in Triton's interpreter ----------------------------------------------------------------------------


def interpreted(
    spec: LinearSpec, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor, capability: int | None = None
) -> torch.Tensor:
    """Runs in the interpreting process; with the tiles of a GPU of some ``capability``, or its own."""
    from vllm_spense.ops.linear import four_bit_triton_kernel as kernel

    layer = FourBitLayer.of(spec, prepared(spec, tensors), bias)
    if capability is None:
        return triton_linear(x, layer)
    y = torch.empty(x.shape[0], spec.out_features, dtype=x.dtype)
    launch = kernel.plan(y, x, layer, spec.in_features, capability)
    kernel._kernel[launch.grid](**launch.arguments | {"PTX": False})
    return y


def written_out(spec: LinearSpec, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    from vllm_spense.ops.linear.four_bit_triton_kernel import dequantise

    return dequantise(FourBitLayer.of(spec, prepared(spec, tensors)), spec.in_features, dtype)


@pytest.mark.parametrize(
    ("name", "codecs"),
    [
        *((name, "nf4") for name in LAYERS),
        *((name, "mixed") for name in MIXED),
        *(
            (name, codecs)
            for name in ("qkv", "tiles and a rest")
            for codecs in CODECS
            if name != "qkv" or codecs not in ("mixed", "two")
        ),
    ],
)
def test_the_matrix_is_the_definitions(interpreter: ProcessPoolExecutor, name: str, codecs: str) -> None:  # noqa: F811
    spec = spec_of(name, codecs)
    tensors = four_bit_tensors(spec)
    for dtype in (torch.float32, torch.float16):
        found = interpreter.submit(written_out, spec, tensors, dtype).result()
        assert torch.equal(found, decoded(spec, tensors).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "codecs", "tokens"),
    [
        *((name, "nf4", tokens) for name, tokens in zip(LAYERS, [1, 3, 17, 1, 5] * 3, strict=False)),
        *((name, "mixed", 3) for name in MIXED),
        *(("tiles and a rest", codecs, 2) for codecs in CODECS),
        ("gate_up", "nf4", 140),
    ],
)
def test_the_product(
    interpreter: ProcessPoolExecutor,  # noqa: F811
    name: str,
    codecs: str,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    spec = spec_of(name, codecs)
    given = inputs(spec, tokens, dtype)
    check(spec, *given, interpreter.submit(interpreted, spec, *given).result())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [20, 40])
@pytest.mark.parametrize("name", ["ragged", "tiles and a rest"])
def test_tiles_of_more_tokens(
    interpreter: ProcessPoolExecutor,  # noqa: F811
    name: str,
    tokens: int,
    capability: int,
) -> None:
    spec = spec_of(name, "nf4")
    given = inputs(spec, tokens, torch.float16)
    check(spec, *given, interpreter.submit(interpreted, spec, *given, capability).result())


def test_a_token_does_not_see_the_others(interpreter: ProcessPoolExecutor) -> None:  # noqa: F811
    """Nor do features beyond the end of a row, which are the next token's."""
    spec = spec_of("tiles and a rest", "nf4")
    tensors, x, bias = inputs(spec, 3, torch.float16)
    x[1:] = float("nan")
    y = interpreter.submit(interpreted, spec, tensors, x, bias).result()
    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1:]).any()


def test_no_tokens_and_other_dtypes(interpreter: ProcessPoolExecutor) -> None:  # noqa: F811
    spec = spec_of("gate_up", "nf4")
    tensors, x, bias = inputs(spec, 1, torch.float16)
    assert interpreter.submit(interpreted, spec, tensors, x[:0], bias).result().shape == (0, 128)
    with pytest.raises(ValueError, match="activations"):
        interpreter.submit(interpreted, spec, tensors, x.double(), bias).result()


# --- the back end ---------------------------------------------------------------------------------------


def applied(
    spec: LinearSpec, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In the interpreting process: eager, and as one graph."""
    backend = FourBitTritonBackend()
    ready = backend.prepare(spec, tensors)
    assert "weight_packed" in ready

    def forward(x: torch.Tensor) -> torch.Tensor:
        return backend.apply(spec, ready, x, bias)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    layer = FourBitLayer.of(spec, ready, bias)
    flat = (x, *layer.flat())
    checks: tuple[str, ...] = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if layer.dense_weight.dtype == torch.uint8:  # of FP8 torch cannot tell on CPUs whether it has changed
        checks += ("test_schema",)
    torch.library.opcheck(torch.ops.spense.triton_linear_4bit.default, flat, test_utils=checks)
    return forward(x), compiled(x)


@pytest.mark.parametrize(("name", "codecs"), [("gate_up", "nf4"), ("columns", "mixed"), ("dense", "fp4")])
def test_back_end(interpreter: ProcessPoolExecutor, name: str, codecs: str) -> None:  # noqa: F811
    spec = spec_of(name, codecs)
    given = inputs(spec, 5, torch.float16)
    eager, compiled = interpreter.submit(applied, spec, *given).result()
    check(spec, *given, eager)
    assert torch.equal(eager, compiled)


def test_scales_stored_in_bytes(interpreter: ProcessPoolExecutor) -> None:  # noqa: F811
    spec = spec_of("gate_up", "nf4")
    tensors, x, bias = inputs(spec, 2, torch.float32)
    for name in ("sparse_absmax", "dense_absmax"):
        tensors[name] = torch.randint(256, tensors[name].shape, dtype=torch.uint8)
    check(spec, tensors, x, bias, interpreter.submit(interpreted, spec, tensors, x, bias).result())


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, cuda = FourBitTritonBackend(), torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for codecs in CODECS:
        assert backend.why_not(spec_of("gate_up", codecs), cuda) is None
    assert "not on cpu" in str(backend.why_not(spec_of("gate_up", "nf4"), torch.device("cpu")))
    assert "in 4 bits, not FP8" in str(backend.why_not(spec_of("no sparse columns", "mixed"), cuda))
    odd = LinearSpec("output", 8, 96, (0,), (8,), Codecs(NF4.variant(48), NF4.variant(48)))
    assert "blocks of 48 values" in str(backend.why_not(odd, cuda))


def test_importing_the_back_end_does_not_import_triton() -> None:
    code = "import sys, vllm_spense.ops.linear.four_bit_triton; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- inline assembly ------------------------------------------------------------------------------------


def shuffle(entry: np.ndarray, lane: np.ndarray, clamp: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``shfl.sync.idx`` by the PTX ISA, of whole warps in a row."""
    me = np.arange(len(entry), dtype=np.uint32)
    segment, last = clamp >> np.uint32(8) & np.uint32(31), clamp & np.uint32(31)
    source = me & segment | lane & np.uint32(31) & ~segment
    assert (mask == 0xFFFFFFFF).all()
    assert (source <= (me & segment | last & ~segment)).all()
    return entry[me & ~np.uint32(31) | source]


def test_ptx_looks_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, "shfl.sync.idx.b32", shuffle)
    words = np.random.default_rng(0).integers(1 << 32, size=1024, dtype=np.uint32)
    table = np.random.default_rng(1).integers(1 << 32, size=16, dtype=np.uint32)
    entry = np.resize(table, 1024)
    codes = [table[words >> np.uint32(4 * i) & np.uint32(15)] for i in range(8)]
    found = evaluate(look_up_bytes(), 8, words, *[entry] * 4)
    assert all(np.array_equal(*pair) for pair in zip(found, codes[1::2] + codes[::2], strict=True))
    found = evaluate(look_up_groups(), 4, words, entry)
    assert all(np.array_equal(*pair) for pair in zip(found, codes[:4], strict=True))


# --- compiled without a GPU -----------------------------------------------------------------------------

MODEL = {
    "dense": ("output", [0, 0], [1280, 1280], 5120),
    "gate_up": ("output", [1280, 1280], [1280, 1280], 5120),
    "down": ("input", [2560], [2560], 1280),
}
COMPILED = [
    (80, "dense", "nf4", 1, torch.bfloat16),
    (80, "gate_up", "nf4", 40, torch.float16),
    (80, "down", "mixed", 1, torch.bfloat16),
    (90, "dense", "nf4", 1, torch.bfloat16),
    (90, "gate_up", "32", 20, torch.bfloat16),
    (90, "dense", "nf4", 0, torch.bfloat16),
]


@pytest.mark.parametrize(("capability", "name", "codecs", "tokens", "dtype"), COMPILED, ids=str)
@pytest.mark.usefixtures("triton_cache")
def test_compiles(capability: int, name: str, codecs: str, tokens: int, dtype: torch.dtype) -> None:
    """Without tokens: the kernel that writes the matrix."""
    kernel = compiled(capability, name, codecs, tokens, dtype)
    ptx, mma = kernel.asm["ptx"], r"wgmma\.mma_async" if capability == 90 else r"mma\.sync"
    assert bool(re.search(mma, ptx)) == bool(tokens)
    assert "shfl.sync.idx.b32" in ptx
    assert "cp.async" in ptx or not tokens  # loads run ahead
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert len(kernel.asm["cubin"]) > 0


def compiled(capability: int, name: str, codecs: str, tokens: int, dtype: torch.dtype):
    from triton.runtime.driver import driver

    from vllm_spense.ops.linear import four_bit_triton_kernel as kernel

    split, sparse, dense, other = MODEL[name]
    extent = sum(sparse) + sum(dense)
    rows, features = (extent, other) if split == "output" else (other, extent)
    spec = LinearSpec(split, rows, features, tuple(sparse), tuple(dense), CODECS[codecs])
    layer = FourBitLayer.of(spec, prepared(spec, four_bit_tensors(spec)))
    x = torch.empty(tokens, features, dtype=dtype) if tokens else None
    y = torch.empty((tokens, rows) if tokens else (rows, features), dtype=dtype)
    launch = kernel.plan(y, x, layer, features, capability)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Target(capability))
        return kernel._kernel.warmup(grid=launch.grid, **launch.arguments)
