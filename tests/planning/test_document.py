"""docs/performance.md and README.md show what the calculator says today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.serving.prediction import DOCUMENT, IMAGES, filled
from benchmarks.serving.prediction_plots import (
    GPU,
    RATIOS,
    gate_up,
    moved_bytes,
    seconds,
    step_ms,
    write_growth,
    write_roofline,
)
from vllm_spense.planning import plan

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_are_not_stale() -> None:
    text = DOCUMENT.read_text()
    assert filled(text) == text, "run: python -m benchmarks.serving.prediction"
    for image in re.findall(r"\]\(img/(plan_\w+\.png)\)", text):
        assert (IMAGES / image).is_file(), image


@pytest.mark.parametrize("ratio", RATIOS)
def test_cost_grows_by_the_same_for_every_layer(ratio: float) -> None:
    """Beside sampling and the head, which every depth has once; the model's own depth is the calculator's."""
    one, two, four = (step_ms(ratio, layers=n) for n in (16, 32, 64))
    assert four - two == pytest.approx(2 * (two - one))
    assert 0 < one < two
    assert four - two > 0.4 * four, "most of a step are the layers"
    found = plan("Qwen3-32B", batch=32, context=512, dense_ratio=0.5 if ratio == 1 else ratio).decode
    assert four == pytest.approx(1e3 * (found.dense if ratio == 1 else found.spense).total)


@pytest.mark.parametrize("tokens", [1, 64, 1024, 16384])
@pytest.mark.parametrize("ratio", RATIOS)
def test_no_point_is_above_its_roof(ratio: float, tokens: int) -> None:
    spec = gate_up(ratio)
    operations = 2 * tokens * spec.in_features * spec.out_features
    needed = operations * (1 + ratio) / 2 / GPU.fp8_sheet_rate
    floor = max(needed, moved_bytes(spec, tokens) / GPU.memory_sheet_rate)
    assert floor < seconds(spec, tokens, ratio) < 2.5 * floor + 1e-5


def test_plots_with_and_without_measurements(tmp_path: Path) -> None:
    row = {"key": "Qwen3-32B/gate_up/0.5/64", "tokens": 64, "us": 50.0}
    write_growth(tmp_path / "growth.png")
    for name, rows in {"predicted": [], "measured": [row]}.items():
        write_roofline(tmp_path / f"{name}.png", rows)
    sizes = [(tmp_path / f"{name}.png").stat().st_size for name in ("growth", "predicted", "measured")]
    assert min(sizes) > 10_000
    assert (tmp_path / "predicted.png").read_bytes() != (tmp_path / "measured.png").read_bytes()


def test_the_readme_quotes_the_prediction() -> None:
    one, many = plan("Qwen3-32B", batch=1, context=512), plan("Qwen3-32B")
    text = " ".join((ROOT / "README.md").read_text().split())
    speeds = f"{one.decode.speedup:.2f}× decode at batch 1 and {many.decode.speedup:.2f}× at 32 × 4096 tokens"
    assert speeds in text
    assert f"{many.prefill.speedup:.2f}× prefill (**predicted**)" in text
    four_bit = max(row.decode_speedup for row in many.alternatives)
    assert f"at decode on Hopper INT4 ({four_bit:.2f}× at 32 × 4096 tokens)" in text


def test_the_bytes_that_the_document_argues_with() -> None:
    """Per step of 32 x 4096 tokens: all weights and the KV cache, 1.08x at best."""
    mlp, other, head = 3 * 64 * 5120 * 25600, 64 * 5120 * (10240 + 8192), 2 * 151936 * 5120
    cache = 262144 * 32 * 4096
    dense = mlp + other + head + cache
    assert [round(x / 1e9) for x in (mlp + other + head, cache, dense)] == [33, 34, 67]
    assert round((dense - mlp * 3 / 16) / 1e9) == 62
    assert round(dense / (dense - mlp * 3 / 16), 2) == 1.08
    text = " ".join(DOCUMENT.read_text().split())
    assert "67 GB per step become 62 GB, which is 1.08× at best" in text
    assert "34 GB per step beside 33 GB of weights" in text
