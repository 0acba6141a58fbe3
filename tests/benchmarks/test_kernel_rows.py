"""What the kernel benchmark measures, and in which order."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from benchmarks.kernels import shapes as kernel_shapes
from benchmarks.kernels.shapes import MODELS, Device, Row, layer_spec
from benchmarks.kernels.spense_linear import parts_of
from tools.gpu.tune_layers import missing
from vllm_spense.ops.linear.configs import KernelConfig, candidates, estimate, label
from vllm_spense.ops.linear.table import shape_of

ROWS = kernel_shapes.rows()


H200 = Device()


def keys(rows: list[Row]) -> list[tuple[str, str, float]]:
    return list(dict.fromkeys((row.model, row.layer, row.ratio) for row in rows))


def test_every_shape_ratio_and_token_count_is_planned_once() -> None:
    assert len(ROWS) == len({row.key for row in ROWS}) == 4 * 4 * 3 * 12
    assert set(Counter(keys(ROWS))) == {
        (model.name, layer, ratio)
        for model in MODELS
        for layer in ("gate_up", "down", "qkv", "o")
        for ratio in (0.5, 0.25, 0.0)
    }


def test_the_mlp_of_qwen_comes_first_decode_before_prefill() -> None:
    mlp = {("Qwen3-32B", layer, ratio) for layer in ("gate_up", "down") for ratio in (0.5, 0.25)}
    decode = [row for row in ROWS if row.tokens <= 64 and (row.model, row.layer, row.ratio) in mlp]
    prefill = [row for row in ROWS if 64 < row.tokens <= 8192 and (row.model, row.layer, row.ratio) in mlp]
    first = len(decode)
    assert {row.key for row in ROWS[:first]} == {row.key for row in decode}
    assert {row.key for row in ROWS[first : first + len(prefill)]} == {row.key for row in prefill}
    assert ROWS[0].key == "Qwen3-32B/gate_up/0.5/1"
    assert all(row.tokens == 32768 for row in ROWS[-48:])


def test_rows_of_one_layer_stay_together() -> None:
    """New weights cost more than their timing."""
    changes = sum(a.spec != b.spec for a, b in itertools.pairwise(ROWS))
    assert changes < 2.5 * len({row.spec for row in ROWS})


def test_shapes_are_the_models_own() -> None:
    qwen, seed = MODELS[:2]
    assert layer_spec(qwen, "gate_up", 0.5).sparse_shape == (25600, 5120)
    assert layer_spec(qwen, "down", 0.25).sparse_shape == (5120, 19200)
    assert layer_spec(qwen, "qkv", 0).sparse_sizes == (8192, 1024, 1024)
    assert (layer_spec(seed, "o", 0.5).out_features, layer_spec(seed, "o", 0.5).in_features) == (5120, 10240)


@pytest.mark.parametrize("cutlass", [False, True])
def test_every_row_has_a_legal_configuration_with_a_finite_estimate(cutlass: bool) -> None:
    for row in ROWS:
        chosen = kernel_shapes.configs(row, cutlass=cutlass)
        assert chosen, row.key
        times = [estimate(row.spec, row.tokens, config, 132) for config in chosen]
        assert all(0 < seconds < 1 for seconds in times), row.key
        bound, _ = kernel_shapes.spense_work(row.spec, row.tokens).bound(4.3e12, 1979e12)
        assert 0 < bound <= max(times) * 1e6
        if row.tokens <= 128:
            assert set(chosen) == set(candidates(row.spec, row.tokens, (9, 0), cutlass))
        assert len({label(config) for config in chosen}) == len(chosen), "labels name configurations"


def test_limits_are_those_of_bytes_and_operations() -> None:
    spec = layer_spec(MODELS[0], "gate_up", 0.5)
    sparse, dense = (work(spec, 1) for work in (kernel_shapes.spense_work, kernel_shapes.dense_work))
    assert dense.bytes / sparse.bytes == pytest.approx(1 / (1 - 0.375 * 0.5), rel=2e-3)
    assert dense.operations / sparse.operations == pytest.approx(4 / 3)


def test_tuned_configurations_join_the_plan() -> None:
    row = next(r for r in ROWS if r.tokens == 2048)
    unusual = KernelConfig("sm90", 64, 128, 1)
    tuned = {(shape_of(row.spec), row.tokens): unusual}
    assert f"ours:{label(unusual)}" not in parts_of(row, H200, {})
    parts = parts_of(row, H200, tuned)
    assert parts[f"ours:{label(unusual)}"] == unusual
    assert {"scaled_mm", "vllm_cutlass", "paper", "slide_sparse"} <= set(parts)


def test_a_layer_without_all_buckets_is_tuned_again() -> None:
    specs = list(kernel_shapes.layer_specs())
    assert len(specs) == len(set(specs)) == 48
    assert missing(specs, None) == specs
