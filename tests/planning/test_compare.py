"""Predictions beside measurements, with a hand-made run: no such run exists yet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_spense.format import CheckpointError
from vllm_spense.planning import compare, plan
from vllm_spense.planning.compare import mean_error

RUN = {"gpu": "H200", "kv_dtype": "fp8", "date": "2026-01-01", "command": "made by hand"}


def made(path: Path, dense_factor: float, spense_factor: float) -> Path:
    """A run that measured the predicted rates times these factors."""
    found = plan("Qwen3-32B", batch=8, context=1024, kv_dtype="fp8", prefill_tokens=1024)
    rows = [
        {
            "phase": name,
            "batch": 8 if name == "decode" else 1,
            "context": 1024,
            "dense_tokens_per_s": phase.dense_tokens_per_s * dense_factor,
            "spense_tokens_per_s": phase.spense_tokens_per_s * spense_factor,
        }
        for name, phase in (("decode", found.decode), ("prefill", found.prefill))
    ]
    path.write_text(json.dumps(RUN | {"rows": rows}))
    return path


def test_errors_by_hand(tmp_path: Path) -> None:
    """Dense measured at half, Spense at 0.4 of the prediction: the gain was predicted 25 % too high."""
    for c in compare("Qwen3-32B", made(tmp_path / "run.json", 0.5, 0.4)):
        assert c.dense_error == pytest.approx(1.0)
        assert c.spense_error == pytest.approx(1.5)
        assert c.error == pytest.approx(0.25)
        assert c.measured_speedup == pytest.approx(c.predicted_speedup / 1.25)


def test_a_perfect_prediction(tmp_path: Path) -> None:
    compared = compare("Qwen3-32B", made(tmp_path / "run.json", 1, 1))
    assert [c.row.phase for c in compared] == ["decode", "prefill"]
    assert mean_error(compared) == pytest.approx(0)


def test_the_mean_error_takes_both_directions(tmp_path: Path) -> None:
    high = compare("Qwen3-32B", made(tmp_path / "high.json", 1, 0.8))
    low = compare("Qwen3-32B", made(tmp_path / "low.json", 1, 1.25))
    assert mean_error([high[0], low[0]]) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": []}, "rows"),
        ({"rows": ...}, "rows: Field required"),
        ({"speed": 1}, "speed: Extra inputs"),
        ({"kv_dtype": "int4"}, "kv_dtype"),
        ({"rows": [{"phase": "decode", "context": 0}]}, "rows.0.context"),
    ],
)
def test_a_file_that_is_no_run(tmp_path: Path, change: dict, words: str) -> None:
    raw = json.loads(made(tmp_path / "run.json", 1, 1).read_text()) | change
    (tmp_path / "run.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    with pytest.raises(CheckpointError) as error:
        compare("Qwen3-32B", tmp_path / "run.json")
    assert words in str(error.value)
    assert "run.json" in str(error.value)


def benchmark(path: Path, device: str = "NVIDIA H200", pair: str = "Qwen3-32B/0.5") -> Path:
    """Two points as benchmarks/serving/decode.py saves them, measured 10 % slower than predicted."""
    decode = plan("Qwen3-32B", batch=8, context=128 + 64).decode
    prefill = plan("Qwen3-32B", prefill_tokens=4096).prefill
    points = {
        key: {
            "dense_tokens_per_second": phase.dense_tokens_per_s,
            "spense_tokens_per_second": phase.spense_tokens_per_s / 1.1,
            "speed_up": phase.speedup / 1.1,
        }
        for key, phase in (("8x128+128", decode), ("1x4096+1", prefill))
    }
    made = {"device": device, "date": "2026-01-01", "command": "made by hand"}
    path.write_text(json.dumps({"pairs": {pair: {"points": points, "made": made, "sources": "x"}}}))
    return path


def test_what_the_serving_benchmark_writes(tmp_path: Path) -> None:
    compared = compare("Qwen3-32B", benchmark(tmp_path / "serving.json"))
    rows = [(c.row.phase, c.row.batch, c.row.context) for c in compared]
    assert rows == [("decode", 8, 192), ("prefill", 1, 4096)]
    for c in compared:
        assert c.error == pytest.approx(0.1)
        assert c.dense_error == pytest.approx(0)


@pytest.mark.parametrize("change", [{"device": "CPU"}, {"pair": "Qwen3-32B/0.25"}])
def test_a_benchmark_of_something_else(tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(
        CheckpointError, match=r"no measured run of Qwen3-32B/0\.5 on one of H100, H200, B200"
    ):
        compare("Qwen3-32B", benchmark(tmp_path / "serving.json", **change))


def test_text_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json: no measured run \(Invalid JSON"):
        compare("Qwen3-32B", tmp_path / "run.json")
