"""docs/performance.md and README.md show what the calculator says today."""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_spense.planning import plan

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.serving_prediction import DOCUMENT, PLOT, filled  # noqa: E402


def test_the_tables_are_not_stale() -> None:
    text = DOCUMENT.read_text()
    assert filled(text) == text, "run: python benchmarks/serving_prediction.py"
    assert PLOT.is_file()


def test_the_readme_quotes_the_prediction() -> None:
    one, many = plan("Qwen3-32B", batch=1, context=512), plan("Qwen3-32B")
    text = " ".join((ROOT / "README.md").read_text().split())
    speeds = f"{one.decode.speedup:.2f}× decode at batch 1 and {many.decode.speedup:.2f}× at 32 × 4096 tokens"
    assert speeds in text
    assert f"{many.prefill.speedup:.2f}× prefill (**predicted**)" in text


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
