"""Seconds of a step: by hand where that is possible, and facts that no table may break."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vllm_spense.devices import GPUS, MEMORY_RATE, find_gpu
from vllm_spense.ops import LinearSpec
from vllm_spense.ops.linear import table
from vllm_spense.ops.linear.configs import LAUNCH, candidates, estimate
from vllm_spense.ops.linear.table import TuningEntry, TuningTable, shape_of
from vllm_spense.planning.shapes import Experts, read_model
from vllm_spense.planning.step import (
    ALL_REDUCE_SECONDS,
    STEP_SECONDS,
    Phase,
    compressed,
    decode,
    layer_time,
    prefill,
)

H100, H200, B200 = (GPUS[name] for name in ("H100", "H200", "B200"))
GATE_UP = LinearSpec("output", 51200, 5120, (12800, 12800), (12800, 12800))
DOWN = LinearSpec("input", 5120, 25600, (12800,), (12800,))


def write_table(directory: Path, spec: LinearSpec, device: str = "NVIDIA H200", **times) -> None:
    """``tokens_32=(us, dense_us)`` …"""
    shape = dict(
        zip(
            ("split", "out_features", "in_features", "sparse_sizes", "dense_sizes", "codec"),
            shape_of(spec),
            strict=True,
        )
    )
    config = {"kernel": "sm90", "tile_rows": 64, "tile_tokens": 32, "cluster": 2, "multicast": False}
    entries = tuple(
        TuningEntry(**shape, **config, tokens=int(name.removeprefix("tokens_")), us=us, dense_us=dense)
        for name, (us, dense) in times.items()
    )
    made = TuningTable(device=device, torch="2", date="d", command="c", entries=entries)
    path = table.table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made.model_dump_json())
    table.measured.cache_clear()


def test_kv_reads_by_hand() -> None:
    """Qwen3-32B: 2 x 64 layers x 8 heads x 128 values x 2 bytes = 262,144 bytes per token."""
    phase = decode(read_model("Qwen3-32B"), H200, 1, 32, 4096, "bf16")
    assert phase.dense.attention == pytest.approx(262144 * 32 * 4096 / 4.3e12)
    assert phase.spense.attention == phase.dense.attention
    fp8 = decode(read_model("Qwen3-32B"), H200, 1, 32, 4096, "fp8")
    assert fp8.dense.attention == pytest.approx(phase.dense.attention / 2)
    assert fp8.speedup > phase.speedup


def test_the_head_by_hand() -> None:
    model = read_model("Llama-3.1-8B")
    head = 128256 * 4096 * 2 / MEMORY_RATE
    for shape in (model, replace(model, tied=True)):  # tied embeddings are read, too
        assert decode(shape, H200, 1, 1, 1, "bf16").dense.head == pytest.approx(head)
    assert decode(model, H200, 2, 1, 1, "bf16").dense.head == pytest.approx(head / 2)


def test_windows_bound_what_attention_reads() -> None:
    model = read_model("Llama-3.1-8B")
    half = replace(model, windows=(1024,) * 16 + (None,) * 16)
    whole, bounded = (decode(m, H200, 1, 8, 4096, "bf16").dense.attention for m in (model, half))
    assert bounded == pytest.approx(whole * (16 * 1024 + 16 * 4096) / (32 * 4096))
    assert decode(half, H200, 1, 8, 512, "bf16").dense == decode(model, H200, 1, 8, 512, "bf16").dense
    products = [prefill(m, H200, 1, 4096).dense.attention for m in (model, half)]
    pairs = 1024 * 4096 - 1024**2 / 2
    assert products[1] / products[0] == pytest.approx((pairs + 4096**2 / 2) / 4096**2)


def test_prefill_attention_by_hand() -> None:
    """Two products of 2 x 128 operations for each of T^2 / 2 pairs, 64 heads, 64 layers."""
    phase = prefill(read_model("Qwen3-32B"), H200, 1, 8192)
    operations = 64 * 64 * (8192**2 / 2) * 2 * 2 * 128
    assert phase.dense.attention == pytest.approx(operations / (989e12 * 2 / 3))


def test_linear_layers_are_the_kernels_estimate() -> None:
    phase = decode(read_model("Qwen3-32B", 0.5), H200, 1, 32, 1, "bf16")
    dense = [
        LinearSpec("output", 51200, 5120, (0, 0), (25600, 25600)),
        LinearSpec("input", 5120, 25600, (0,), (25600,)),
    ]

    def best(spec: LinearSpec) -> float:
        return min(estimate(spec, 32, c, 132) for c in candidates(spec, 32, (9, 0), False))

    assert phase.spense.mlp == pytest.approx(64 * (best(GATE_UP) + best(DOWN)))
    assert phase.dense.mlp == pytest.approx(64 * sum(map(best, dense)))
    assert (phase.measured, phase.hybrid) == (0, 2)


def both(model, gpu=H200, batch=32, context=4096) -> tuple[Phase, Phase]:
    return decode(model, gpu, 1, batch, context, "bf16"), prefill(model, gpu, 1, 8192)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_all_dense_is_exactly_as_fast(gpu) -> None:
    for phase in both(read_model("Qwen3-32B", 1.0), gpu):
        assert phase.speedup == 1
        assert phase.hybrid == 0


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_fewer_dense_weights_are_faster(gpu) -> None:
    found = [both(read_model("Qwen3-32B", ratio), gpu) for ratio in (0.5, 0.25, 0.0)]
    for phases in zip(*found, strict=True):
        assert phases[0].speedup < phases[1].speedup < phases[2].speedup


def test_longer_contexts_gain_less() -> None:
    gains = [both(read_model("Qwen3-32B"), context=c)[0].speedup for c in (1, 1024, 8192, 65536, 2**20)]
    assert gains == sorted(gains, reverse=True)
    assert len(set(gains)) == 5
    assert 1 < gains[-1] < 1.01


def test_gains_stay_below_what_bytes_and_operations_allow() -> None:
    for gpu in GPUS.values():
        step, chunk = both(read_model("Qwen3-32B", 0.5), gpu, batch=1, context=1)
        assert step.speedup < 1 / (1 - 0.375 / 2)
        assert chunk.speedup < 1 / (1 - 0.5 / 2)


def test_slower_memory_is_slower() -> None:
    """An H100 is the H200's processors with 3.35 TB/s of memory; nothing else changes."""
    model = read_model("Qwen3-32B")
    h100, h200 = both(model, H100), both(model, H200)
    assert h100[0].dense.attention / h200[0].dense.attention == pytest.approx(4.8 / 3.35)
    assert h100[0].dense.mlp > 1.3 * h200[0].dense.mlp
    assert h100[1].dense.attention == h200[1].dense.attention


def test_separate_gemms_by_hand() -> None:
    """B200, one token: four GEMMs of gate_up instead of one; fp32 partial sums of down."""
    rate = B200.memory_rate
    gate_up, down = layer_time(GATE_UP, 1, B200), layer_time(DOWN, 1, B200)
    rows = 12800 * 5120
    expected = 2 * ((0.625 * rows + 5120 + 25600) + (rows + 5120 + 25600)) / rate + 4 * LAUNCH
    assert gate_up.spense == pytest.approx(expected)
    assert gate_up.dense == pytest.approx((51200 * 5120 + 5120 + 2 * 51200) / rate + LAUNCH)
    each = 5120 * 12800
    expected = (0.625 * each + each + 2 * (12800 + 10240) + 8 * 5120) / rate + 2 * LAUNCH
    assert down.spense == pytest.approx(expected)


def test_tensor_parallel_ranks_do_less_and_talk() -> None:
    model = read_model("Qwen3-32B")
    one, two = (decode(model, H200, size, 32, 4096, "bf16") for size in (1, 2))
    assert two.dense.attention == pytest.approx(one.dense.attention / 2)
    assert 0.5 <= two.dense.mlp / one.dense.mlp < 0.6
    assert two.dense.rest > one.dense.rest + 2 * 64 * ALL_REDUCE_SECONDS - 1e-3
    assert two.speedup < one.speedup


def test_experts_read_what_tokens_choose() -> None:
    model = replace(read_model("Llama-3.1-8B"), experts=Experts(32, 64, 8, 1024))
    weights = 3 * 4096 * 1024
    one = decode(model, H200, 1, 1, 1, "bf16")
    assert one.dense.experts == pytest.approx(32 * (2 * 8 * weights / MEMORY_RATE + 2 * LAUNCH))
    assert one.spense.experts == one.dense.experts
    many = decode(model, H200, 1, 256, 1, "bf16")
    assert many.dense.experts == pytest.approx(32 * (2 * 64 * weights / MEMORY_RATE + 2 * LAUNCH), rel=1e-3)


def test_every_step_has_its_fixed_part() -> None:
    rest = decode(read_model("Llama-3.1-8B"), H200, 1, 1, 1, "bf16").dense.rest
    assert STEP_SECONDS + 32 * 7 * 2e-6 < rest < STEP_SECONDS + 32 * 7 * 2e-6 + 20e-6


def test_measured_times_go_before_estimates(tables: Path) -> None:
    write_table(tables, GATE_UP, tokens_32=(50.0, 80.0), tokens_64=(60.0, None))
    assert layer_time(GATE_UP, 32, H200) == (pytest.approx(50e-6), pytest.approx(80e-6), True)
    assert not layer_time(GATE_UP, 64, H200).measured  # dense was not timed beside it
    assert not layer_time(GATE_UP, 16, H200).measured
    assert not layer_time(GATE_UP, 32, H100).measured
    assert not layer_time(DOWN, 32, H200).measured
    phase = decode(read_model("Qwen3-32B", 0.5), H200, 1, 32, 4096, "bf16")
    assert (phase.measured, phase.hybrid) == (1, 2)
    down = layer_time(DOWN, 32, H200)
    assert phase.spense.mlp == pytest.approx(64 * (50e-6 + down.spense))
    assert phase.dense.mlp == pytest.approx(64 * (80e-6 + down.dense))


def test_a_bucket_is_scaled_to_the_tokens(tables: Path) -> None:
    """5000 of 8192 tokens take about five eighths of the bucket's time."""
    write_table(tables, GATE_UP, tokens_8192=(4000.0, 5000.0))
    part = layer_time(GATE_UP, 5000, H200)
    assert part.measured
    assert 5000 / 8192 * 0.95 < part.spense / 4000e-6 < 5000 / 8192 * 1.1


def test_layers_that_dense_runs_faster_are_dense(tables: Path) -> None:
    assert compressed(GATE_UP, H200)
    write_table(tables, GATE_UP, tokens_32=(100.0, 80.0), tokens_64=(90.0, 100.0))
    assert not compressed(GATE_UP, H200)
    for tokens in (32, 64, 128):
        found = layer_time(GATE_UP, tokens, H200)
        assert found.spense == found.dense
    assert layer_time(GATE_UP, 32, H200).dense == pytest.approx(80e-6)


def test_columns_that_do_not_fit_the_kernels_run_dense() -> None:
    ragged = replace(GATE_UP, in_features=5128)
    assert not compressed(ragged, H200)
    assert layer_time(ragged, 32, H200).spense == layer_time(ragged, 32, H200).dense


def test_gpus_by_name_in_any_case() -> None:
    assert find_gpu("h200") is H200
    assert H200.memory_rate == pytest.approx(MEMORY_RATE)
    with pytest.raises(ValueError, match="'A100'; --gpu takes H100, H200, B200"):
        find_gpu("A100")
