"""Tables and plot of the kernel benchmark, from invented times."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import results as results_file
from benchmarks.kernels import shapes as kernel_shapes
from benchmarks.kernels.entries import describe_row
from benchmarks.kernels.report import report

ROWS = kernel_shapes.rows()


FACTS = {"device": "Synthetic GPU, not a measurement", "kernels": "abc", "commit": "none", "versions": {}}


def synthetic(path: Path) -> list[dict[str, Any]]:
    """Invented times: dense at 1 µs per 4 MB or 1 TFLOP/ms, ours a little faster or slower by row."""
    facts = FACTS | {"date": "2000-01-01 00:00", "command": "python invented.py"}
    rows = []
    for i, row in enumerate(ROWS[:120]):
        dense = kernel_shapes.dense_work(row.spec, row.tokens).bytes / 4e6 + row.tokens
        results: dict[str, dict[str, Any]] = {
            "ours:sm90-64x8-c1": {"us": dense * (0.8 if i % 7 else 1.5), "us_overlapped": dense * 0.7},
            "ours:sm90-64x8-c2": {"error": "RuntimeError: invented | with a bar"},
            "scaled_mm": {"us": dense},
            "vllm_cutlass": {"error": "ModuleNotFoundError: No module named 'vllm'"},
            "paper": {"us": dense * 1.1, "note": "two calls; algorithm 7, split K 1"},
            "slide_sparse": {"skipped": "not tried: it hung or crashed in another row"},
        }
        rows.append(describe_row(row, results, 4.3e12, facts))
    results_file.write(path, {"rows": rows})
    return rows


def test_report_holds_every_row_the_losing_ones_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    rows = synthetic(tmp_path / "kernels.json")
    summary = tmp_path / "docs" / "kernels.md"
    summary.parent.mkdir()
    summary.write_text("before\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nafter\n")
    report(tmp_path / "kernels.json", tmp_path)
    name = "kernels_synthetic_gpu_not_a_measurement"
    plot = tmp_path / "docs" / "img" / f"{name}.png"
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert plot.stat().st_size > 10_000
    text = (tmp_path / "docs" / f"{name}.md").read_text()
    table = [line for line in text.splitlines() if re.match(r"\| [0-9.]+ \| \d+ \|", line)]
    assert len(table) == len(rows)
    assert any("**0.67**" in line for line in table), "rows slower than dense are shown"
    assert len({line.count("|") for line in table}) == 1, "no cell breaks the table"
    assert "No module named 'vllm'" in text
    assert "invented / with a bar" in text
    filled = summary.read_text()
    assert filled.startswith("before\n<!-- speed:begin -->\n")
    assert filled.endswith("<!-- speed:end -->\nafter\n")
    assert "old" not in filled
    assert "Qwen3-32B gate_up | 0.5 |" in filled
    assert "120 rows" in capsys.readouterr().out


def test_report_leaves_a_page_without_markers_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    synthetic(tmp_path / "kernels.json")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "kernels.md").write_text("nothing to fill in\n")
    report(tmp_path / "kernels.json", tmp_path)
    assert (tmp_path / "docs" / "kernels.md").read_text() == "nothing to fill in\n"


def test_rows_are_json(tmp_path: Path) -> None:
    rows = synthetic(tmp_path / "kernels.json")
    assert json.loads(json.dumps(rows)) == rows
    assert all(math.isfinite(row["us"]) for row in rows)
