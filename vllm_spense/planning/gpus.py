"""The GPUs that a gain can be predicted for, as their data sheets describe them.

Data sheets promise more than programs get. Memory is taken at the share that the kernels' estimate uses
(``ops/linear/configs.py``), tensor cores at two thirds, as there. Neither is a measurement of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_spense.ops.linear.configs import MEMORY_RATE

_H200_SHEET_RATE = 4.8e12
ATTAINABLE = MEMORY_RATE / _H200_SHEET_RATE
"""Share of the data sheet's memory rate that is counted on."""
TENSOR_SHARE = 2 / 3
"""Share of the data sheet's tensor-core rate that is counted on."""


@dataclass(frozen=True)
class Gpu:
    """One GPU by its data sheet: bytes, bytes/s, dense operations/s, and where the figures stand.

    ``device`` is the name that torch reports, by which tuning tables are found. ``link_sheet_rate``: NVLink,
    one direction.
    """

    name: str
    device: str
    capability: tuple[int, int]
    processors: int
    memory_bytes: float
    memory_sheet_rate: float
    fp8_sheet_rate: float
    bf16_sheet_rate: float
    link_sheet_rate: float
    source: str

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
        return self.capability == (9, 0)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            *("H100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 80e9, 3.35e12, 1979e12, 989e12, 450e9),
            source="NVIDIA H100 data sheet, SXM5: 80 GB HBM3, 3.35 TB/s, 1979 TFLOP/s FP8 without sparsity",
        ),
        Gpu(
            *("H200", "NVIDIA H200", (9, 0), 132, 141e9, _H200_SHEET_RATE, 1979e12, 989e12, 450e9),
            source="NVIDIA H200 data sheet, SXM5: 141 GB HBM3e, 4.8 TB/s, 1979 TFLOP/s FP8 without sparsity",
        ),
        Gpu(
            *("B200", "NVIDIA B200", (10, 0), 148, 180e9, 8e12, 4500e12, 2250e12, 900e9),
            source="NVIDIA HGX B200 data sheet, one of eight: 180 GB HBM3e, 8 TB/s, 4.5 PFLOP/s FP8 "
            "without sparsity",
        ),
    )
}


def find_gpu(name: str) -> Gpu:
    """By name, in any case; ``ValueError`` lists those there are."""
    if name.upper() not in GPUS:
        raise ValueError(f"no data of a GPU {name!r}; --gpu takes {', '.join(GPUS)}")
    return GPUS[name.upper()]
