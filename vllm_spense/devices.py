"""The GPUs that are counted with: capability, multiprocessors, rates, and where the figures stand.

Data sheets promise more than programs get. Memory is taken at the share that the kernels' estimate uses,
tensor cores at two thirds, as there. None of it is a measurement of ours. Nothing else is imported here, so
that every package may read the table.
"""

from __future__ import annotations

from dataclasses import dataclass

Capability = tuple[int, int]
HOPPER: Capability = (9, 0)
BLACKWELL: Capability = (10, 0)

MEMORY_RATE = 4.3e12
"""Bytes/s of an H200's memory that its kernels are counted with."""
_H200_SHEET_RATE = 4.8e12
ATTAINABLE = MEMORY_RATE / _H200_SHEET_RATE
"""Share of the data sheet's memory rate that is counted on."""
TENSOR_SHARE = 2 / 3
"""Share of the data sheet's tensor-core rate that is counted on."""

SM_LOAD_RATE = 50e9
"""Bytes/s that one Hopper multiprocessor takes in, from L2 or memory."""
SM_DENSE_RATE = 10e12
"""FP8 operations/s of one Hopper multiprocessor, two thirds of the data sheet's; 2:4 twice that."""
SHARED_RATE = 128
"""Bytes per cycle of one multiprocessor's shared memory, reads and writes together."""


@dataclass(frozen=True)
class Rates:
    """What torch's own programs reach on one device, as pruning counts it.

    ``flop``: FLOP/s of large GEMMs in the compute dtype, ``flop_fp32``: in fp32 (no TF32), ``bandwidth``:
    bytes/s elementwise.
    """

    flop: float
    flop_fp32: float
    bandwidth: float


@dataclass(frozen=True)
class Gpu:
    """One GPU by its data sheet: bytes, bytes/s, dense operations/s, and where the figures stand.

    ``device`` is the name that torch reports, by which tuning tables are found. ``link_sheet_rate``: NVLink,
    one direction. ``rates``: bf16 and fp32 at about 0.6 and 0.7 of the data sheet, memory at 0.6; None where
    no pruning run is estimated.
    """

    name: str
    device: str
    capability: Capability
    processors: int
    memory_bytes: float
    memory_sheet_rate: float
    fp8_sheet_rate: float
    bf16_sheet_rate: float
    link_sheet_rate: float
    source: str
    rates: Rates | None = None

    @property
    def memory_rate(self) -> float:
        return self.memory_sheet_rate * ATTAINABLE

    @property
    def fp8_rate(self) -> float:
        return self.fp8_sheet_rate * TENSOR_SHARE

    @property
    def bf16_rate(self) -> float:
        return self.bf16_sheet_rate * TENSOR_SHARE

    @property
    def link_rate(self) -> float:
        return self.link_sheet_rate * ATTAINABLE

    @property
    def fused(self) -> bool:
        """Whether the fused Hopper kernel runs here; else one CUTLASS GEMM per region does."""
        return self.capability == HOPPER


H100 = Gpu(
    *("H100", "NVIDIA H100 80GB HBM3", HOPPER, 132, 80e9, 3.35e12, 1979e12, 989e12, 450e9),
    source="NVIDIA H100 data sheet, SXM5: 80 GB HBM3, 3.35 TB/s, 1979 TFLOP/s FP8 without sparsity",
)
H200 = Gpu(
    *("H200", "NVIDIA H200", HOPPER, 132, 141e9, _H200_SHEET_RATE, 1979e12, 989e12, 450e9),
    source="NVIDIA H200 data sheet, SXM5: 141 GB HBM3e, 4.8 TB/s, 1979 TFLOP/s FP8 without sparsity",
    rates=Rates(6.0e14, 4.5e13, 3.0e12),
)
B200 = Gpu(
    *("B200", "NVIDIA B200", BLACKWELL, 148, 180e9, 8e12, 4500e12, 2250e12, 900e9),
    source="NVIDIA HGX B200 data sheet, one of eight: 180 GB HBM3e, 8 TB/s, 4.5 PFLOP/s FP8 without sparsity",
    rates=Rates(1.3e15, 6.0e13, 5.0e12),
)
GPUS = {gpu.name: gpu for gpu in (H100, H200, B200)}


def find_gpu(name: str) -> Gpu:
    """The GPU called ``name``, in any case; ``ValueError`` lists those there are."""
    if name.upper() not in GPUS:
        raise ValueError(f"no data of a GPU {name!r}; --gpu takes {', '.join(GPUS)}")
    return GPUS[name.upper()]


def fp8_peak(device: str) -> float | None:
    """Dense FP8 operations/s of the GPU whose name stands in ``device``; None for one that is not listed."""
    return next((gpu.fp8_sheet_rate for name, gpu in GPUS.items() if name in device), None)
