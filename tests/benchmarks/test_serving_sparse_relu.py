"""The model with a planted density, and the report of its served speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.common.machine import facts
from benchmarks.kernels.shapes import Model as Shape
from benchmarks.serving import sparse_relu, sparse_relu_model

SMALL = Shape("small", 256, 704, 4, 4, 64)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_the_density_is_the_planted_one(tmp_path: Path, density: float) -> None:
    """In every layer of the model as transformers runs it, with ReLU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sparse_relu_model.write(tmp_path / "model", SMALL, layers=3, vocab=512, density=density)
    fields = sparse_relu_model.config(SMALL, 3, 512)
    kept = {n: v for n, v in fields.items() if n not in ("model_type", "hidden_act")}
    config = LlamaConfig(**kept, hidden_act="relu")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", config=config, dtype=torch.float32)
    found: list[float] = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda _module, _inputs, output: found.append(float((F.relu(output) > 0).float().mean()))
        )
    model(torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0)))
    assert found == pytest.approx([density] * 3, rel=0.15)


def test_the_report_compares_with_stock_vllm(tmp_path: Path) -> None:
    document = tmp_path / "twell.md"
    document.write_text("<!-- serving-sparse-relu:begin -->\n<!-- serving-sparse-relu:end -->\n")
    point = "decode, 1 sequence"

    def entry(seconds: float) -> dict:
        return {"rounds": [{"start_seconds": 1.0, "seconds": {point: [seconds, seconds]}}], "missing": {}}

    models = {"SparseLM-2B-38-layers/stock": entry(3.2), "SparseLM-2B-38-layers/0.02": entry(1.6)}
    sparse_relu.report({"some CPU": {"machine": facts(), "models": models}}, document)
    (line,) = [line for line in document.read_text().splitlines() if point in line]
    assert "10.0 (1.00×)" in line
    assert "20.0 (2.00×)" in line
    assert line.count("–") == 2, "variants that were not measured"
    assert "prefill" not in document.read_text()
