"""Activation-sparse MLPs through the emulator: pack, rows of up, rows of down, several times with other
timings.

As in ``cases.py`` buffers have their exact size and outputs may be written once; what a kernel leaves to the
next one is garbage before.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.mlps import Mlp, assert_within_rounding, mlp, words_of
from vllm_spense.ops.mlp.activation import KINDS, Activation
from vllm_spense.ops.mlp.twell import TwellShape, pack

from .build import KERNELS, assemble
from .cases import WRITABLE, WRITE_ONCE, Buffers
from .launcher import Twell
from .recorded import run_recorded

INPUT = len(KINDS)


class SparseMlpArgs(ctypes.Structure):
    """spense::SparseMlpArgs of mlp/sparse_mlp.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("tokens", "in_features", "neurons", "out_features")),
        ("twell", Twell),
        ("kind", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("gate", "words", "x", "up", "up_bias", "down_t", "bias")),
        *((name, ctypes.c_void_p) for name in ("ids", "inputs", "y")),
    ]


def kernel(name: str, tile: int | None = None) -> str:
    """The instance's name, mangled."""
    template = "" if tile is None else f"ILi{tile // 32}EEEv"
    return f"_ZN6spense3mlp{len(name)}{name}{template}{'E' if tile is None else ''}NS_13SparseMlpArgsE"


class SparseMlpEmulator:
    """The libraries of ``kernels/mlp/sparse_mlp.cu``."""

    def __init__(self, folder: Path) -> None:
        self.host = ctypes.CDLL(str(folder / "launcher.so"))
        self.machine = ctypes.CDLL(str(folder / "kernels.so"))
        self.machine.emulate.restype = ctypes.c_char_p
        if self.host.sparse_mlp_arguments_bytes() != ctypes.sizeof(SparseMlpArgs):
            raise ValueError("SparseMlpArgs of mlp/sparse_mlp.h has other fields than the one here")

    @classmethod
    def build(cls, kernels: Path = KERNELS) -> SparseMlpEmulator:
        source = (kernels / "mlp" / "sparse_mlp.cu").read_text()
        return cls(assemble(f'#include "sparse_mlp_recorder.h"\n{source}', "90a", kernels))

    def run(self, args: SparseMlpArgs, kernels: list[str], buffers: Buffers, packs: bool, seed: int) -> str:
        """Call the launcher and run what it launches, which are these ``kernels``; what went wrong, or an
        empty string."""

        def record() -> int:
            return self.host.record(ctypes.byref(args), packs)

        return run_recorded(self.host, self.machine, record, kernels, buffers, seed)


@dataclass(frozen=True)
class Case:
    """Sizes; ``full``: tiles of the last token whose gates are all open; ``nan``: one of its gates is NaN."""

    tokens: int
    features: int
    neurons: int
    outputs: int
    density: float = 0.1
    activation: Activation = Activation("relu")  # noqa: RUF009
    tile: int = 256
    share: int = 8
    bias: bool = False
    full: tuple[int, ...] = ()
    nan: bool = False

    def __str__(self) -> str:
        sizes = f"{self.tokens}-{self.features}-{self.neurons}-{self.outputs}-{self.density}"
        flags = "-bias" * self.bias + "-nan" * self.nan + "".join(f"-full{tile}" for tile in self.full)
        return f"{sizes}-{self.activation.kind}-{self.tile}-{self.share}{flags}"

    def problem(self) -> Mlp:
        sizes = self.tokens, self.features, self.neurons, self.outputs
        given = mlp(*sizes, self.density, bias=self.bias, seed=sum(sizes))
        for tile in self.full:
            given.gate[-1, tile * self.tile : (tile + 1) * self.tile].abs_().add_(0.5)
        if self.nan:
            given.gate[-1, self.neurons // 2] = float("nan")
        return given


def scratch(buffers: Buffers, shape: torch.Size, args: SparseMlpArgs) -> None:
    args.ids = buffers.add("ids", torch.full(shape, 0x5EADBEEF, dtype=torch.int32), WRITABLE | WRITE_ONCE)
    args.inputs = buffers.add("inputs", torch.full(shape, float("nan")), WRITABLE | WRITE_ONCE)


def failure_of(emulator: SparseMlpEmulator, case: Case, seeds: tuple[int, ...] = (1, 2)) -> str:
    """What is wrong with the kernels in this case, or an empty string."""
    given, shape = case.problem(), TwellShape(case.neurons, case.tile, case.share)
    expected = words_of(given.gate, case.activation, shape)
    first: torch.Tensor | None = None
    for seed in seeds:
        buffers = Buffers()
        args = SparseMlpArgs(case.tokens, case.features, case.neurons, case.outputs)
        args.twell = Twell(case.tile, case.share, case.activation.threshold)
        args.kind = KINDS.index(case.activation.kind)
        for name in ("gate", "x", "up", "up_bias", "down_t", "bias"):
            setattr(args, name, buffers.add(name, getattr(given, name)))
        flags = WRITABLE | WRITE_ONCE
        args.words = buffers.add("words", torch.full(expected.shape, -1, dtype=torch.int32), flags)
        scratch(buffers, given.gate.shape, args)
        args.y = buffers.add("y", torch.full((case.tokens, case.outputs), float("nan")).bfloat16(), flags)
        if error := emulator.run(args, [kernel("pack_kernel", case.tile)], buffers, True, seed):
            return f"pack, seed {seed}: {error}"
        words = buffers.get("words", torch.int32).view(expected.shape)
        if not torch.equal(words, expected):
            return f"seed {seed}: {int((words != expected).sum())} of {words.numel()} words are wrong"
        kernels = [kernel("neurons_kernel", case.tile), kernel("add_kernel")]
        if error := emulator.run(args, kernels, buffers, False, seed):
            return f"seed {seed}: {error}"
        y = buffers.get("y", torch.bfloat16).view(case.tokens, case.outputs)
        try:
            assert_within_rounding(y, given, case.activation)
        except AssertionError as error:
            return f"seed {seed}: results are wrong: {error}"
        if first is not None and not torch.equal(first.view(torch.int16), y.view(torch.int16)):
            return f"seed {seed}: results depend on timing"
        first = y
    return ""


def inputs_failure_of(
    emulator: SparseMlpEmulator, x: torch.Tensor, weight_t: torch.Tensor, threshold: float, share: int
) -> str:
    """The same of a plain layer, whose inputs above the threshold are packed."""
    shape = TwellShape(x.shape[1], 256, share)
    kept = torch.where(x.abs() <= threshold, 0.0, x)
    expected, y = pack(kept, shape), kept.double() @ weight_t.double()
    buffers = Buffers()
    args = SparseMlpArgs(x.shape[0], 0, *weight_t.shape)
    args.twell, args.kind = Twell(256, share, threshold), INPUT
    args.gate, args.down_t = buffers.add("x", x), buffers.add("weight_t", weight_t)
    flags = WRITABLE | WRITE_ONCE
    args.words = buffers.add("words", torch.full(expected.shape, -1, dtype=torch.int32), flags)
    scratch(buffers, x.shape, args)
    args.y = buffers.add("y", torch.full(y.shape, float("nan")).bfloat16(), flags)
    error = emulator.run(args, [kernel("pack_kernel", 256)], buffers, True, 1)
    kernels = [kernel("neurons_kernel", 256), kernel("add_kernel")]
    error = error or emulator.run(args, kernels, buffers, False, 1)
    if not error and not torch.equal(buffers.get("words", torch.int32).view(expected.shape), expected):
        error = "words are wrong"
    away = (buffers.get("y", torch.bfloat16).view(y.shape).double() - y).abs()
    size = kept.double().abs() @ weight_t.double().abs()
    return error or ("" if (away <= 2.0**-8 * y.abs() + 2.0**-18 * size).all() else "results are wrong")
