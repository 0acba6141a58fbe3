"""The benchmark that holds Fisher costs of layers against what pruning them does, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pruning import layer_costs
from tests.tiny_families import make_family
from tests.tiny_text import add_tokenizer, write_text


def test_every_layer_has_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_tokenizer(make_family("llama", tmp_path / "model"))
    small = {"num_samples": 6, "seq_len": 32}
    config = layer_costs.PruneConfig
    monkeypatch.setattr(layer_costs, "PruneConfig", lambda **options: config(**options | small))
    figures = layer_costs.measure(model, write_text(tmp_path / "text.txt"))
    for values in figures.values():
        assert len(values) == 3
        assert all(value > 0 for value in values)
        assert len(set(values)) == 3


def test_layers_off_the_line_are_named() -> None:
    costs = [1.0, 2.0, 4.0, 8.0]
    line = layer_costs.table({"smollm2": {"fisher": costs, "divergence": [0.1, 0.2, 1.2, 0.4]}}).splitlines()[
        2
    ]
    name, correlation, under, over = (cell.strip() for cell in line.strip("|").split("|"))
    assert name == "SmolLM2-135M"
    assert under.startswith("2 (3.0×)")
    assert over.startswith("3 (0.5×)")
    assert 0 < float(correlation) < 1
