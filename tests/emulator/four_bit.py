"""Dense 4-bit layers through the emulator: the product and the matrix, several times with other timings.

As in ``cases.py`` buffers have their exact size and y may be written once.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .build import KERNELS, assemble
from .cases import DTYPES, PREEMPT, WRITABLE, WRITE_ONCE, Buffers
from .launcher import Launch, Recorded


class FourBitArgs(ctypes.Structure):
    """spense::FourBitArgs of linear/four_bit.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int)
            for name in ("tokens", "out_features", "in_features", "block_shift", "absmax_pitch")
        ),
        *((name, ctypes.c_void_p) for name in ("codes", "absmax", "table", "x", "bias", "y")),
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
    def build(cls) -> FourBitEmulator:
        source = (KERNELS / "linear" / "four_bit.cu").read_text()
        return cls(assemble(f'#include "four_bit_recorder.h"\n{source}', "80"))

    def run(
        self, args: FourBitArgs, kernel: str, buffers: Buffers, matrix: bool, shuffle: bool, seed: int
    ) -> str:
        """Call the launcher and run what it launches; what went wrong, or an empty string."""
        recorded = Recorded.in_dll(self.host, "recorded")
        recorded.launches = 0
        status = self.host.record(ctypes.byref(args), matrix, shuffle)
        if status or recorded.launches != 1:
            return f"the launcher gave status {status} and made {recorded.launches} launches"
        table = np.array(buffers.rows, np.uint64)
        launch = Launch(
            grid=recorded.grid,
            cluster=1,
            block=recorded.block,
            shared_bytes=recorded.shared_bytes,
            shared_base=1024,
            preempt=PREEMPT[seed % len(PREEMPT)],
            seed=seed,
            parameters=ctypes.addressof(recorded.parameters),
            buffers=table.ctypes.data,
            buffer_count=len(buffers.rows),
        )
        return self.machine.emulate(kernel.encode(), ctypes.byref(launch)).decode()


@dataclass(frozen=True)
class Case:
    """``tokens`` 0: the matrix."""

    tokens: int
    rows: int
    columns: int
    block: int = 64
    dtype: str = "bf16"
    bias: bool = False
    shuffle: bool = True

    def __str__(self) -> str:
        look = "shuffle" if self.shuffle else "shared"
        shape = f"{self.tokens}x{self.rows}x{self.columns}-{self.block}"
        return f"{shape}-{self.dtype}-{look}" + "-bias" * self.bias

    @property
    def kernel(self) -> str:
        """Its instance's name, mangled."""
        kind = {"bf16": "13__nv_bfloat16", "fp16": "6__half", "fp32": "f"}[self.dtype]
        if self.tokens:
            name, arguments = (
                "linear_kernel",
                f"{kind}Li{1 if self.tokens <= 8 else 2}ELb{int(self.shuffle)}E",
            )
        else:
            name, arguments = "dequantize_kernel", f"{kind}Lb{int(self.shuffle)}E"
        return f"_ZN6spense8four_bit{len(name)}{name}I{arguments}EEvNS_11FourBitArgsE"


def failure_of(emulator: FourBitEmulator, case: Case, seeds: tuple[int, ...] = (1, 2)) -> str:
    """What is wrong with the kernel in this case, or an empty string."""
    generator = torch.Generator().manual_seed(case.rows + case.columns)
    code, dtype, limit = DTYPES[case.dtype]
    blocks = -(-case.columns // case.block)
    codes = torch.randint(256, (case.rows, case.columns // 2), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(case.rows, blocks, generator=generator) + 0.5
    table = torch.randn(16, generator=generator)
    x = torch.randn(case.tokens, case.columns, generator=generator).to(dtype)
    bias = torch.randn(case.rows, generator=generator).to(dtype) if case.bias else None
    spread = absmax.repeat_interleave(case.block, 1)[:, : case.columns]
    weight = (table[torch.stack((codes >> 4, codes & 15), 2).flatten(1).long()] * spread).to(dtype)
    expected = weight.double()
    if case.tokens:
        expected = x.double() @ expected.T + (0 if bias is None else bias.double())
    for seed in seeds:
        buffers = Buffers()
        args = FourBitArgs(tokens=case.tokens, out_features=case.rows, in_features=case.columns, dtype=code)
        args.block_shift, args.absmax_pitch = case.block.bit_length() - 1, blocks
        for name, tensor in (("codes", codes), ("absmax", absmax), ("table", table), ("bias", bias)):
            setattr(args, name, buffers.add(name, tensor))
        args.x = buffers.add("x", x) if case.tokens else None
        empty = torch.full(expected.shape, float("nan"), dtype=dtype)
        args.y = buffers.add("y", empty, WRITABLE | WRITE_ONCE)
        error = emulator.run(args, case.kernel, buffers, not case.tokens, case.shuffle, seed)
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
