"""The arithmetic of benchmarks/pruning/pruning_time.py, and that it still finds the pruner's stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pruning import pruning_time
from benchmarks.pruning.pruning_time import (
    SHAPES,
    Bench,
    Shape,
    Stopwatch,
    extrapolate,
    growth,
    summary,
    table,
)
from vllm_spense.pruning.solvers import joint

SHAPE = Shape(
    {"vocab_size": 10, "hidden_size": 64},
    layers=10,
    samples=64,
    seq_len=8,
    few=3,
    goal=60,
    paper={"spensegpt+": 90},
)


def test_moments_count_for_the_innermost_stage() -> None:
    times = iter([0, 1, 3, 7, 15, 31, 63, 127])
    watch = Stopwatch(clock=lambda: next(times))
    with watch.stage("forward"), watch.stage("Hessian"):
        pass
    with pytest.raises(ValueError, match="still"), watch.stage("OBS"):
        raise ValueError("still counted")
    # clock: made 0, forward 1, Hessian 3, left 7 and 15, OBS 31, left 63, stopped 127
    assert watch.stop() == {"other": 1 + 16 + 64, "forward": 2 + 8, "Hessian": 4, "OBS": 32}


def test_forwards_of_the_gradient_pass_belong_to_it() -> None:
    times = iter(range(100))
    watch = Stopwatch(clock=lambda: next(times))
    with watch.stage("gradient"), watch.stage("forward"), watch.stage("read"):
        pass
    assert watch.stop() == {"other": 2, "gradient": 4, "read": 1}


def test_a_model_is_what_comes_once_and_what_each_layer_adds() -> None:
    def run(layers: int, noise: float) -> dict[str, float]:  # 8 windows
        forward, obs = 0.5 + 2.0 * layers, 1.0 + 3.0 * layers
        return {"forward": forward + noise, "OBS down": obs + noise, "other": 7.0}

    runs = {str(n): [run(n, noise) for noise in (0.0, 50.0, 0.0)] for n in (1, 3)}
    stages = extrapolate(runs, SHAPE, 8)
    assert next(iter(stages)) == "OBS down", "the longest first"
    assert stages["forward"] == {"layer": 2.0, "once": 0.5, "times": 8.0, "model": 8 * 20.5}
    assert stages["OBS down"] == {"layer": 3.0, "once": 1.0, "times": 1.0, "model": 31.0}
    assert stages["other"]["model"] == 7.0


def test_the_joint_fit_grows_up_to_its_most_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ((1 << 20, 1 << 20, 8.0), (256, 1 << 20, 4.0), (1 << 20, 4, 4.0), (64, 1 << 20, 1.0))
    for most, per_feature, times in cases:  # of 64 · 8 tokens and 64 features, and 8 · 8 tokens measured
        monkeypatch.setattr(joint, "JOINT_TOKENS", most)
        monkeypatch.setattr(joint, "TOKENS_PER_FEATURE", per_feature)
        assert growth("joint fit", SHAPE, 8) == times
    assert growth("gradient", SHAPE, 8) == 2.0, "16 windows of these"
    assert growth("gradient", SHAPE, 32) == 1.0
    assert growth("Hessian of down", SHAPE, 8) == 8.0
    assert growth("OBS down", SHAPE, 8) == 1.0


def test_incomplete_presets_are_left_out_and_the_table_compares() -> None:
    complete = {"1": [{"OBS": 2.0}], "3": [{"OBS": 6.0}]}
    runs = {"guided": complete, "spensegpt+": complete, "spensegpt": {"1": [{"OBS": 2.0}]}}
    result = summary(runs, SHAPE, 8) | {"check": {"guided": {"measured": 25.0, "ratio": 1.25}}}
    assert result["seconds"] == {"guided": 20.0, "spensegpt+": 20.0}
    lines = table(result).splitlines()
    assert lines[0] == "| seconds | guided | spensegpt+ |"
    assert lines[2:] == [
        "| OBS | 20.0 | 20.0 |",
        "| **whole model** | 20.0 | 20.0 |",
        "| paper, one B200 | – | 90.0 |",
        "| goal | 60.0 | 60.0 |",
        "| a real run | 25.0 | – |",
        "| … over extrapolated | 1.2 | – |",
    ]


def test_every_stage_of_a_real_run_is_seen(tmp_path: Path) -> None:
    bench = Bench(SHAPES["tiny"], 4, tmp_path)
    before = pruning_time.layer.KEEP_BYTES
    seconds = bench.run("guided", 1)
    expected = {name.format(side) for name, *_ in pruning_time.STAGES for side in ("down", "gate, up")}
    assert set(seconds) == expected | {"other"}
    assert all(value > 0 for value in seconds.values())
    assert before == pruning_time.layer.KEEP_BYTES
    assert "gradient" not in bench.run("spensegpt", 2)


def test_the_papers_times_are_those_of_its_models() -> None:
    qwen = SHAPES["qwen3-32b"]
    assert (qwen.layers, qwen.samples * qwen.seq_len) == (64, 128 * 16384)
    assert qwen.paper["spensegpt+"] == pytest.approx(6732)
