"""The table of GPUs: found by name, rates in the order of the data sheets."""

from __future__ import annotations

import pytest

from vllm_spense.devices import GPUS, H200, HOPPER, MEMORY_RATE, SM_DENSE_RATE, find_gpu, fp8_peak


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 1979e12),
        ("NVIDIA H100 80GB HBM3", 1979e12),
        ("NVIDIA GH200 480GB", 1979e12),
        ("NVIDIA B200", 4500e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_by_the_name_that_torch_reports(device: str, peak: float | None) -> None:
    assert fp8_peak(device) == peak


def test_a_gpu_is_found_by_its_name() -> None:
    assert find_gpu("h200") is H200
    with pytest.raises(ValueError, match="--gpu takes H100, H200, B200"):
        find_gpu("A100")


def test_the_kernels_figures_are_the_tables() -> None:
    """The estimate of one H200 multiprocessor against the sheet's rate of all of them."""
    assert H200.memory_rate == pytest.approx(MEMORY_RATE)
    assert SM_DENSE_RATE * H200.processors == pytest.approx(H200.fp8_rate, rel=0.01)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_what_programs_reach_is_below_the_data_sheet(gpu) -> None:
    assert gpu.fused is (gpu.capability == HOPPER)
    assert gpu.memory_rate < gpu.memory_sheet_rate
    if gpu.rates is not None:
        assert gpu.rates.flop < gpu.bf16_sheet_rate
        assert gpu.rates.bandwidth < gpu.memory_sheet_rate
