"""Qwen3-32B, Seed-OSS-36B and Llama-3.1-8B in real vLLM without weights, against what `spense plan` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm_runs import ENVIRONMENT
from vllm_spense.planning import plan

ROOT = Path(__file__).resolve().parents[2]
LINEARS = 4  # per layer, as vLLM fuses them: qkv, o, gate and up, down
LAYERS = {"Qwen3-32B": 64, "Seed-OSS-36B": 64, "Llama-3.1-8B": 32}

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def built() -> dict[tuple[str, str], dict]:
    done = subprocess.run(
        [sys.executable, "-m", "tools.serving_meta", "--models", *LAYERS],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(row["model"], row["variant"]): row for row in rows}


@pytest.mark.parametrize("ratio", ["0.5", "0.25"])
@pytest.mark.parametrize("model", LAYERS)
def test_every_linear_layer_is_ours_and_as_large_as_planned(model: str, ratio: str, built: dict) -> None:
    spense, dense = built[model, ratio], built[model, "dense"]
    assert spense["methods"] == {"SpenseLinearMethod": LINEARS * LAYERS[model]}
    assert dense["methods"] == {"CompressedTensorsLinearMethod": LINEARS * LAYERS[model]}
    memory = plan(model, "H200", dense_ratio=float(ratio)).memory
    # the plan leaves norms and biases out
    assert spense["parameter_bytes"] == pytest.approx(memory.spense_bytes, rel=2e-4)
    assert dense["parameter_bytes"] == pytest.approx(memory.dense_bytes, rel=2e-4)
