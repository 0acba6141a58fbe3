"""Other formats beside Spense: times by hand, which GPU has which, and what the advice says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.planning.test_step import B200, DOWN, GATE_UP, H200
from vllm_spense.ops.linear.configs import LAUNCH
from vllm_spense.planning import plan, read_model
from vllm_spense.planning.alternatives import (
    FORMATS,
    FOUR_BIT_SHARE,
    FP8,
    Alternative,
    Format,
    advice,
    linear_ratio,
)
from vllm_spense.planning.shapes import Experts


def format_named(name: str) -> Format:
    return next(f for f in FORMATS if f.name == name)


def test_few_tokens_by_hand() -> None:
    """One token through gate_up in W4A8: 4 bits, a byte of scale for 128 weights, 76 % of the rate."""
    rate = H200.memory_rate
    weights, vectors = 51200 * 5120, 5120 + 2 * 51200
    dense = (weights + vectors) / rate + LAUNCH
    four = (weights * (0.5 + 1 / 128) / FOUR_BIT_SHARE + vectors) / rate + LAUNCH
    assert linear_ratio(format_named("INT4 W4A8"), GATE_UP, 1, H200) == pytest.approx(four / dense)
    assert 1.37 < dense / four < 1.65, "what its authors measured against FP8"


def test_many_tokens_go_by_the_tensor_cores() -> None:
    expected = {"INT4 W4A16": 2, "INT4 W4A8": 1, "INT8 W8A8": 1, "NVFP4 W4A16": 2}
    for name, ratio in expected.items():
        assert linear_ratio(format_named(name), DOWN, 32768, H200) == pytest.approx(ratio, rel=0.01)
    assert linear_ratio(format_named("NVFP4 W4A4"), DOWN, 32768, B200) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("gpu", "names"),
    [
        (
            "H200",
            [
                "Spense",
                "Spense NF4",
                "FP8 W8A8",
                "INT8 W8A8",
                "INT4 W4A16",
                "INT4 W4A8",
                "NF4 W4A16",
                "NVFP4 W4A16",
            ],
        ),
        ("B200", ["Spense", "Spense NF4", "FP8 W8A8", "INT4 W4A16", "NF4 W4A16", "NVFP4 W4A4"]),
    ],
)
def test_each_gpu_has_its_formats(gpu: str, names: list[str]) -> None:
    assert [row.name for row in plan("Qwen3-32B", gpu).alternatives] == names


def test_rows_agree_with_the_prediction() -> None:
    found = plan("Llama-3.1-8B", dense_ratio=0.25, tensor_parallel=2)
    spense, _, fp8, int8, w4a16, *_ = found.alternatives
    assert (spense.decode_seconds, spense.prefill_speedup) == (
        found.decode.spense.total,
        found.prefill.speedup,
    )
    assert spense.weight_bytes == found.memory.spense_bytes
    for row in (fp8, int8):
        assert row.decode_seconds == pytest.approx(found.decode.dense.total)
        assert (row.decode_speedup, row.prefill_speedup) == pytest.approx((1, 1))
        assert row.weight_bytes == found.memory.dense_bytes
    linears = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096) / 2
    assert found.memory.dense_bytes - w4a16.weight_bytes == pytest.approx(linears * (0.5 - 1 / 64), abs=1)


def test_spense_in_nf4_by_hand() -> None:
    """2:4 in NF4: a quarter of a byte, an eighth of metadata, 1/128 of scales; attention stays FP8."""
    found = plan("Llama-3.1-8B", dense_ratio=0.5)
    nf4 = found.alternatives[1]
    mlp = 32 * 3 * 14336 * 4096
    per_weight = ((0.25 + 1 / 8 + 1 / 128) + (0.5 + 1 / 64)) / 2
    assert found.memory.dense_bytes - nf4.weight_bytes == pytest.approx(mlp * (1 - per_weight), rel=0.002)
    assert nf4.decode_speedup > found.decode.speedup
    assert nf4.prefill_speedup < 1
    assert not nf4.advised
    assert "NF4" not in found.advice, "nothing is advised that never ran"


def test_what_is_not_linear_costs_every_format_the_same() -> None:
    """With a million tokens of KV cache behind each sequence hardly anything is left to gain."""
    rows = plan("Qwen3-32B", batch=32, context=1 << 20).alternatives
    assert all(1 <= row.decode_speedup < 1.01 for row in rows)
    assert len({row.decode_seconds for row in rows}) > 2


def row(name: str, decode: float, prefill: float, eight_bit: bool = False) -> Alternative:
    return Alternative(name, 1 / decode, 1 / prefill, decode, prefill, 1, eight_bit, "", "")


@pytest.mark.parametrize(
    ("spense", "four", "words"),
    [
        (
            (1.10, 1.02),
            (1.40, 1.00),
            "at decode W4 is the better choice (1.40x against 1.10x for Spense); at",
        ),
        ((1.10, 1.02), (1.40, 1.00), "at prefill stay with dense FP8: no format gains 1.05x (Spense 1.02x);"),
        ((1.10, 1.02), (1.40, 1.00), "lose too much, Spense is the better choice at decode (1.10x)."),
        ((1.01, 1.30), (1.40, 0.50), "at prefill Spense is the better choice (1.30x against 1.00x for FP8)."),
        ((1.20, 1.10), (1.22, 0.50), "at decode Spense and W4 are as good (1.20x and 1.22x)"),
        ((0.99, 1.14), (1.10, 1.50), "at prefill W4 is the better choice (1.50x against 1.14x for Spense)."),
    ],
)
def test_the_advice(spense: tuple[float, float], four: tuple[float, float], words: str) -> None:
    text = advice([row("Spense", *spense, True), row("FP8", 1, 1, True), row("W4", *four)])
    assert words in text
    assert text.startswith("Predicted: at decode ")
    assert text.endswith(").")


def test_without_a_faster_4_bit_format_nothing_is_said_of_its_loss() -> None:
    text = advice([row("Spense", 1.3, 1.0, True), row("FP8", 1, 1, True), row("W4", 1.1, 1.0)])
    assert "at decode Spense is the better choice (1.30x against 1.10x for W4)" in text
    assert "lose too much" not in text


def test_the_advice_depends_on_gpu_batch_and_context() -> None:
    few, long, blackwell = (
        plan("Qwen3-32B", gpu, batch=batch, context=context).advice
        for gpu, batch, context in (("H200", 8, 512), ("H200", 8, 1 << 20), ("B200", 8, 512))
    )
    assert "at decode INT4 W4A8 is the better choice" in few
    assert "Spense is the better choice at decode" in few
    assert "at decode stay with dense FP8" in long
    assert "at prefill NVFP4 W4A4 is the better choice" in blackwell
    assert "Spense is the better choice" not in blackwell


def test_every_figure_has_a_source() -> None:
    for f in FORMATS:
        assert "https://" in f.quality or "no published figure" in f.quality, f.name
        assert f.speed_source
    assert FP8.memory_share == 1


def test_models_with_experts_say_that_the_others_gain_more() -> None:
    model = replace(read_model("Llama-3.1-8B"), experts=Experts(32, 4, 1, 1024))
    assert any("routed experts count as bf16 in every format" in note for note in plan(model).notes)
