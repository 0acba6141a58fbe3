"""spense::four_bit_linear_cpu, every instruction set that this CPU has, against the definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from tests.layers import ACCUMULATION, assert_within_rounding
from vllm_spense.format import FP8_DTYPE, Codecs, Layout
from vllm_spense.format.codecs import FP8, Codec, FourBit, codec
from vllm_spense.format.sparse24 import LEGAL_NIBBLES
from vllm_spense.ops import LinearArguments, LinearSpec, select_backend
from vllm_spense.ops.linear import four_bit_cpu
from vllm_spense.ops.linear.cpu import ISAS
from vllm_spense.ops.linear.four_bit_cpu import FourBitCpuBackend, arguments
from vllm_spense.ops.linear.reference import OUT_DTYPES, decoded

CPU = torch.device("cpu")
REASON = four_bit_cpu.why_not_here()
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))
every_kernel = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(i, id=name, marks=needs_kernels)
        for i, name in enumerate(ISAS, 1)
        if REASON or name in four_bit_cpu.isas()
    ],
)
WEIGHT_ROUNDING = 2.0**-8
"""Relative error of a weight in bf16."""
TOKENS = (0, 1, 2, 3, 7, 8, 17, 33, 40)
"""Each size of a block of tokens, on either side of where weights are widened first."""


def four(name: str, block: int = 64, table: tuple[float, ...] | None = None) -> FourBit:
    kind = codec(name)
    assert isinstance(kind, FourBit)
    return kind.variant(block, table)


NF4, FP4 = four("nf4"), four("fp4")
ODD_TABLE = four("nf4", 32, tuple((i - 5) * (1 + i % 3) / 32 for i in range(16)))


class Case(NamedTuple):
    layouts: Sequence[Layout]
    sparse: Codec = NF4
    dense: Codec = NF4

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec.of(self.layouts, Codecs(self.sparse, self.dense))


def name(case: Case) -> str:
    layouts = "+".join(f"{x.split}{x.out_features}x{x.in_features}s{x.sparse}" for x in case.layouts)
    codecs = (case.sparse, case.dense)
    return "-".join([layouts, *(f"{c.name}{c.block if isinstance(c, FourBit) else ''}" for c in codecs)])


def uniform(kind: Codec, *layouts: Layout) -> Case:
    return Case(layouts, kind, kind)


CASES = [
    uniform(NF4, Layout("output", 48, 256, 0)),
    uniform(FP4, Layout("output", 40, 50, 0)),
    uniform(ODD_TABLE, Layout("output", 17, 89, 0)),
    uniform(four("fp4", 16), Layout("output", 24, 144, 8)),
    uniform(four("nf4", 128), Layout("input", 24, 400, 160)),
    uniform(NF4, Layout("output", 16, 40, 16)),
    uniform(NF4, Layout("output", 96, 1104, 64), Layout("output", 96, 1104, 64)),
    uniform(
        ODD_TABLE, Layout("output", 24, 144, 0), Layout("output", 24, 144, 24), Layout("output", 8, 144, 3)
    ),
    uniform(NF4, Layout("input", 64, 2080, 1032)),
    uniform(ODD_TABLE, Layout("input", 40, 61, 24)),
    uniform(four("nf4", 16), Layout("input", 17, 64, 64)),
    Case([Layout("output", 96, 1104, 64), Layout("output", 40, 1104, 24)], NF4, FP8),
    Case([Layout("input", 40, 1160, 520)], NF4, FP8),
    Case([Layout("input", 40, 200, 128)], four("fp4", 32), FP8),
    Case([Layout("input", 40, 200, 104)], FP8, NF4),
    Case([Layout("output", 72, 200, 40)], FP8, FP4),
    Case([Layout("output", 40, 200, 0)], NF4, FP8),
    Case([Layout("output", 40, 200, 40)], NF4, FP8),
]
every_case = pytest.mark.parametrize("case", CASES, ids=name)


class Layer:
    """A layer with random contents, its weights of about 1, as files have it and as the kernels take it."""

    def __init__(self, case: Case, absmax: torch.dtype = torch.float32) -> None:
        self.spec = case.spec
        generator = torch.Generator().manual_seed(0)
        self.tensors = {}
        for what, stored in self.spec.stored.tensors().items():
            uniform = torch.rand(stored.shape, generator=generator)
            if what == "sparse_meta":
                nibbles = torch.tensor(LEGAL_NIBBLES, dtype=torch.uint8)
                low, high = (nibbles[torch.randint(6, stored.shape, generator=generator)] for _ in range(2))
                tensor = low | high << 4
            elif what.endswith("_absmax"):
                tensor = (uniform * 255).to(torch.uint8) if absmax == torch.uint8 else uniform + 0.5
            elif what.endswith("scale"):
                tensor = uniform + 0.5
            elif stored.dtypes[0] == FP8_DTYPE:
                tensor = torch.randn(stored.shape, generator=generator).to(FP8_DTYPE)
            else:
                tensor = torch.randint(0, 256, stored.shape, generator=generator).to(torch.uint8)
            self.tensors[what] = tensor
        self.weight = decoded(
            self.spec, {what: tensor for what, tensor in self.tensors.items() if tensor.numel()}
        )
        copies = {what: tensor.clone() for what, tensor in self.tensors.items()}
        self.prepared = FourBitCpuBackend().prepare(self.spec, copies)

    def run(self, x: torch.Tensor, bias: torch.Tensor | None = None, isa: int = 0) -> torch.Tensor:
        return torch.ops.spense.four_bit_linear_cpu(x, *arguments(self.spec, self.prepared, bias), isa)

    def check(self, y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, isa: int) -> None:
        nothing = torch.empty(0)
        layer = LinearArguments(nothing, nothing, nothing, None, bias, [], [], True)
        rounded = x.dtype == torch.bfloat16 and isa > ISAS.index("avx512_bf16")
        accumulation = ACCUMULATION + (WEIGHT_ROUNDING if rounded else 0)
        assert_within_rounding(y, x, None, layer, x.dtype, weight=self.weight, accumulation=accumulation)


def tokens(m: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every_kernel
@every_case
def test_against_float64(case: Case, isa: int) -> None:
    layer = Layer(case)
    n, k = layer.spec.out_features, layer.spec.in_features
    for dtype in OUT_DTYPES:
        for m in TOKENS:
            x = tokens(m, k, dtype)
            bias = tokens(1, n, dtype, seed=2)[0] if m % 2 else None
            layer.check(layer.run(x, bias, isa), x, bias, isa)


@every_kernel
@every_case
@pytest.mark.parametrize("m", [7, 40])
def test_every_weight_is_in_its_place(case: Case, m: int, isa: int) -> None:
    """In fp32 the definition's bits, as one product is rounded as it is there."""
    layer = Layer(case)
    for x in torch.eye(layer.spec.in_features).split(m):
        x = torch.cat([x, torch.zeros(m - len(x), x.shape[1])])
        y = layer.run(x, None, isa)
        assert torch.equal(y, x @ layer.weight.T)
        half = layer.run(x.bfloat16(), None, isa)
        layer.check(half, x.bfloat16(), None, isa)


@every_kernel
@every_case
def test_a_tokens_bits_do_not_depend_on_its_company(case: Case, isa: int) -> None:
    """Among few tokens, and among many; one border lies between them."""
    layer = Layer(case)
    for dtype in (torch.bfloat16, torch.float32):
        x = tokens(600, layer.spec.in_features, dtype)
        many = layer.run(x, None, isa)
        layer.check(many, x, None, isa)
        for m in (40, 97, 200):
            for first in (0, 5, 400):
                assert torch.equal(layer.run(x[first : first + m], None, isa), many[first : first + m])
        few = layer.run(x[:8], None, isa)
        for m in (1, 2, 3, 5, 7):
            for first in (0, 8 - m):
                assert torch.equal(layer.run(x[first : first + m], None, isa), few[first : first + m])


@every_kernel
@every_case
@pytest.mark.parametrize("m", [3, 40])
def test_what_is_not_finite_is_seen_in_its_token_only(case: Case, m: int, isa: int) -> None:
    """Not in all of its outputs: a 2:4 region does not read what meets its zeros."""
    layer = Layer(case)
    x = tokens(m, layer.spec.in_features)
    whole = layer.run(x, None, isa)
    x[1, 3] = float("nan")
    y = layer.run(x, None, isa)
    assert y[1].isnan().any()
    y[1] = whole[1]
    assert torch.equal(y, whole)


@needs_kernels
@pytest.mark.parametrize("case", [CASES[3], CASES[8], CASES[12]], ids=name)
def test_absmax_in_bytes(case: Case) -> None:
    """Files have steps, serving fp32: prepared tensors are the same in shape and value."""
    given, wide = Layer(case, torch.uint8), Layer(case, torch.uint8)
    x = tokens(5, case.spec.in_features, torch.float32)
    given.check(given.run(x), x, None, 1)
    for what, tensor in wide.tensors.items():
        if what.endswith("_absmax"):
            wide.tensors[what] = tensor.float() + 1
    prepared = FourBitCpuBackend().prepare(case.spec, wide.tensors)
    assert given.prepared.keys() == prepared.keys()
    assert all(torch.equal(prepared[what], tensor) for what, tensor in given.prepared.items())


def changed(layer: Layer, **change: Any) -> list[Any]:
    packed, table, bias, n, sparse, dense, split, sparse_block, dense_block = arguments(
        layer.spec, layer.prepared
    )
    usual = {
        "x": torch.zeros(2, 64),
        "packed": packed,
        "table": table,
        "bias": bias,
        "n": n,
        "sparse": sparse,
    }
    usual |= {
        "dense": dense,
        "split": split,
        "sparse_block": sparse_block,
        "dense_block": dense_block,
        "isa": 0,
    }
    assert usual.keys() >= change.keys()
    return list((usual | change).values())


@needs_kernels
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(2, 64).double()}, "x must be bf16, fp16 or fp32"),
        ({"x": torch.zeros(64, 2).T}, "x must be a contiguous CPU tensor"),
        ({"x": torch.zeros(2, 160)}, "weight_packed must be .* packed"),
        ({"packed": torch.zeros(100, dtype=torch.uint8)}, "weight_packed must be .* packed"),
        ({"table": torch.zeros(16)}, r"table must be .* fp32 \[2, 16\]"),
        ({"table": torch.zeros(2, 16).double()}, r"table must be .* fp32 \[2, 16\]"),
        ({"bias": torch.zeros(32).bfloat16()}, "bias must be .* in the dtype of x"),
        ({"bias": torch.zeros(31)}, "bias must be .* in the dtype of x"),
        ({"n": 48}, "region sizes sum to 32, not to 48"),
        ({"n": -1}, "there cannot be -1 outputs"),
        ({"n": 2**40}, "there cannot be 1099511627776 outputs"),
        ({"sparse": [16, 0]}, "one size of each region per fused shard"),
        ({"sparse": [-16], "dense": [48]}, "a region of -16 and 48 is not within 0 to 32"),
        ({"sparse_block": 24}, "blocks must have 16, 32 or 64 values, or 0 in FP8, not 24"),
        ({"dense_block": 0}, "weight_packed must be .* packed"),
        ({"sparse_block": 0, "dense_block": 0}, "one region must be in 4 bits"),
        ({"isa": 9}, "instruction set 9 is none that this CPU has kernels in"),
        ({"isa": 2}, "instruction set 2 is none that this CPU has kernels in"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_refused(change: dict[str, Any], said: str) -> None:
    layer = Layer(uniform(NF4, Layout("output", 32, 64, 16)))
    with pytest.raises(RuntimeError, match=said):
        torch.ops.spense.four_bit_linear_cpu(*changed(layer, **change))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"packed": torch.zeros(2, 576, dtype=torch.uint8)}, r"must be uint8 \[1, 576\]"),
        ({"packed": torch.zeros(1, 575, dtype=torch.uint8)}, r"must be uint8 \[1, 576\]"),
        ({"codes": torch.zeros(16, 32)}, "codes must be"),
        ({"meta": torch.zeros(16, 8, dtype=torch.uint8)}, "metadata must be"),
        ({"scales": torch.zeros(16, 2)}, "scales must be"),
        ({"block": 8}, "blocks must have 16, 32 or 64 values"),
        ({"zero": 16}, "and a code of zero"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else "",
)
def test_wrong_regions_are_not_packed(change: dict[str, Any], said: str) -> None:
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    usual: dict[str, Any] = {
        "packed": torch.zeros(1, 576, dtype=torch.uint8),
        "codes": codes,
        "meta": codes[:0],
    }
    usual |= {"scales": torch.zeros(16, 1), "block": 64, "zero": 7}
    torch.ops.spense.pack_four_bit_cpu(*usual.values())
    with pytest.raises(RuntimeError, match=said):
        torch.ops.spense.pack_four_bit_cpu(*(usual | change).values())


@needs_kernels
def test_as_a_torch_operator() -> None:
    layer = Layer(uniform(NF4, Layout("output", 32, 64, 16)))
    bias = tokens(1, 32)[0]
    arguments_here = (tokens(5, 64), *arguments(layer.spec, layer.prepared, bias))
    torch.library.opcheck(torch.ops.spense.four_bit_linear_cpu.default, arguments_here)


@needs_kernels
def test_the_back_end() -> None:
    layer = Layer(uniform(NF4, Layout("input", 32, 64, 16)))
    backend = select_backend(layer.spec, CPU)
    assert backend.name == "cpu-4bit"
    x = tokens(64, 5).T  # not contiguous
    bias = tokens(1, 32)[0]
    layer.check(backend.apply(layer.spec, layer.prepared, x, bias), x, bias, len(ISAS))
    assert "weight_packed" in layer.prepared
    with pytest.raises(ValueError, match=r"'cpu-fp32' cannot run this layer: it does not know NF4"):
        select_backend(layer.spec, CPU, "cpu-fp32")
    for codecs, said in (
        (Codecs.of("fp8"), "take weights in 4 bits, not FP8"),
        (Codecs(four("nf4", 8), NF4), "blocks of multiples of 16 values, not of 8"),
        (Codecs(four("nf4", 24), NF4), "blocks of multiples of 16 values, not of 24"),
        (Codecs(NF4, codec("int8")), "beside 4 bits the kernels take FP8, not INT8"),
    ):
        assert said in str(backend.why_not(replace(layer.spec, codecs=codecs), CPU))
    assert "not on meta" in str(backend.why_not(layer.spec, torch.device("meta")))
