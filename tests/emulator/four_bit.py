"""Layers in 4 bits through the emulator: the product and the matrix, several times with other timings.

As in ``cases.py`` buffers have their exact size and y may be written once.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.layers import four_bit_tensors
from vllm_spense.format.codecs import codec
from vllm_spense.format.codecs.four_bit import FourBit
from vllm_spense.format.linear import Codecs
from vllm_spense.ops.linear.four_bit import FourBitLayer, prepared
from vllm_spense.ops.linear.reference import decoded
from vllm_spense.ops.linear.spec import LinearSpec

from .build import KERNELS, assemble
from .cases import DTYPES, WRITABLE, WRITE_ONCE, Buffers
from .launcher import MAX_SHARDS
from .recorded import run_recorded


class FourBitMatrix(ctypes.Structure):
    """spense::FourBitMatrix of linear/four_bit.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("codes", "meta", "absmax", "table")),
        *((name, ctypes.c_int) for name in ("absmax_pitch", "block_shift")),
    ]


class FourBitArgs(ctypes.Structure):
    """spense::FourBitArgs."""

    _fields_ = [
        *(
            (name, ctypes.c_int)
            for name in ("tokens", "out_features", "in_features", "output_split", "shards")
        ),
        ("sparse", ctypes.c_int * MAX_SHARDS),
        ("dense", ctypes.c_int * MAX_SHARDS),
        ("sparse_weight", FourBitMatrix),
        ("dense_weight", FourBitMatrix),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
        ("dtype", ctypes.c_int),
    ]


class FourBitEmulator:
    """The libraries of ``kernels/linear/four_bit.cu``, compiled for sm_80."""

    def __init__(self, folder: Path) -> None:
        self.host = ctypes.CDLL(str(folder / "launcher.so"))
        self.machine = ctypes.CDLL(str(folder / "kernels.so"))
        self.machine.emulate.restype = ctypes.c_char_p
        if self.host.four_bit_arguments_bytes() != ctypes.sizeof(FourBitArgs):
            raise ValueError("FourBitArgs of linear/four_bit.h has other fields than the one here")

    @classmethod
    def build(cls, kernels: Path = KERNELS) -> FourBitEmulator:
        source = (kernels / "linear" / "four_bit.cu").read_text()
        return cls(assemble(f'#include "four_bit_recorder.h"\n{source}', "80", kernels))

    def run(self, args: FourBitArgs, kernels: list[str], buffers: Buffers, shuffle: bool, seed: int) -> str:
        """Call the launcher, for the matrix where there are no tokens, and run what it launches, which are
        these ``kernels``; what went wrong, or an empty string."""

        def record() -> int:
            return self.host.record(ctypes.byref(args), not args.tokens, shuffle)

        return run_recorded(self.host, self.machine, record, kernels, buffers, seed)


@dataclass(frozen=True)
class Case:
    """``tokens`` 0: the matrix. ``other``: columns of an output split, rows of an input split."""

    tokens: int
    sparse: tuple[int, ...]
    dense: tuple[int, ...]
    other: int
    split: str = "output"
    block: int = 64
    dtype: str = "bf16"
    bias: bool = False
    shuffle: bool = True

    def __str__(self) -> str:
        parts = "+".join(map(str, self.sparse)) + "|" + "+".join(map(str, self.dense))
        look = "shuffle" if self.shuffle else "shared"
        shape = f"{self.tokens}-{self.split}-{parts}-{self.other}-{self.block}"
        return f"{shape}-{self.dtype}-{look}" + "-bias" * self.bias

    @property
    def spec(self) -> LinearSpec:
        extent = sum(self.sparse) + sum(self.dense)
        rows, columns = (extent, self.other) if self.split == "output" else (self.other, extent)
        nf4, fp4 = codec("nf4"), codec("fp4")
        assert isinstance(nf4, FourBit)
        assert isinstance(fp4, FourBit)
        several = len(self.sparse) > 1  # which the definition takes with one codec alone
        codecs = Codecs(nf4.variant(self.block), (nf4 if several else fp4).variant(self.block))
        return LinearSpec(self.split, rows, columns, self.sparse, self.dense, codecs)

    @property
    def kernels(self) -> list[str]:
        """The instances' names, mangled."""
        kind = {"bf16": "13__nv_bfloat16", "fp16": "6__half", "fp32": "f"}[self.dtype]
        sparse, dense, look = any(self.sparse), any(self.dense), int(self.shuffle)
        if self.tokens:
            found = [("linear_kernel", f"{kind}Li{1 if self.tokens <= 8 else 2}ELb{look}ELb{int(sparse)}E")]
        else:
            regions = [int(two) for two, there in ((True, sparse), (False, dense)) if there]
            found = [("dequantize_kernel", f"{kind}Lb{look}ELb{two}E") for two in regions]
        return [
            f"_ZN6spense8four_bit{len(name)}{name}I{arguments}EEvNS_11FourBitArgsE"
            for name, arguments in found
        ]


def fill(case: Case, layer: FourBitLayer, buffers: Buffers) -> FourBitArgs:
    """The launcher's arguments for a layer, whose tensors become buffers."""
    spec = case.spec
    args = FourBitArgs(tokens=case.tokens, out_features=spec.out_features, in_features=spec.in_features)
    args.output_split, args.shards = spec.split == "output", len(spec.sparse_sizes)
    for i, (sparse, dense) in enumerate(zip(spec.sparse_sizes, spec.dense_sizes, strict=True)):
        args.sparse[i], args.dense[i] = sparse, dense
    tables = buffers.add("tables", layer.tables)
    assert tables is not None
    for which, region, shape in ((0, "sparse", spec.sparse_shape), (1, "dense", spec.dense_shape)):
        matrix = getattr(args, f"{region}_weight")
        matrix.table, matrix.block_shift = tables + 64 * which, layer.blocks[which].bit_length() - 1
        if all(shape):
            matrix.rows, matrix.columns = shape
            absmax = layer.sparse_absmax if region == "sparse" else layer.dense_absmax
            codes = layer.sparse_values if region == "sparse" else layer.dense_weight
            matrix.absmax_pitch, matrix.absmax = absmax.shape[1], buffers.add(f"{region}_absmax", absmax)
            matrix.codes = buffers.add(f"{region}_codes", codes)
            matrix.meta = buffers.add("meta", layer.sparse_meta) if region == "sparse" else None
    args.bias = buffers.add("bias", layer.bias)
    return args


def failure_of(emulator: FourBitEmulator, case: Case, seeds: tuple[int, ...] = (1, 2)) -> str:
    """What is wrong with the kernel in this case, or an empty string."""
    spec, (code, dtype, limit) = case.spec, DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(case.tokens)
    tensors = four_bit_tensors(spec, case.tokens)
    weight = decoded(spec, tensors).to(dtype)
    x = torch.randn(case.tokens, spec.in_features, generator=generator).to(dtype)
    bias = torch.randn(spec.out_features, generator=generator).to(dtype) if case.bias else None
    expected = weight.double()
    if case.tokens:
        expected = x.double() @ expected.T + (0 if bias is None else bias.double())
    layer = FourBitLayer.of(spec, prepared(spec, tensors), bias)
    for seed in seeds:
        buffers = Buffers()
        args = fill(case, layer, buffers)
        args.dtype, args.x = code, buffers.add("x", x) if case.tokens else None
        args.y = buffers.add(
            "y", torch.full(expected.shape, float("nan"), dtype=dtype), WRITABLE | WRITE_ONCE
        )
        error = emulator.run(args, case.kernels, buffers, case.shuffle, seed)
        if error:
            return f"seed {seed}: {error}"
        y = buffers.get("y", dtype).view(expected.shape)
        if not case.tokens:
            if not torch.equal(y, weight):
                return f"seed {seed}: {int((y != weight).sum())} of {y.numel()} weights are wrong"
            continue
        away = (y.double() - expected).abs() / (expected.abs() + expected.abs().max() * 0.05)
        wrong = (away.nan_to_num(float("inf")) > limit).nonzero()
        if len(wrong):
            return f"seed {seed}: {len(wrong)} of {y.numel()} results are wrong, first {wrong[:4].tolist()}"
    return ""
