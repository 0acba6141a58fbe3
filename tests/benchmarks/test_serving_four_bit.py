"""The table of 4-bit serving, from results that are made up; nothing is measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks.serving.cpu_results import FOUR_BIT, POINTS, VARIANTS, variants
from benchmarks.serving.four_bit import SHOWN, THEIRS, report
from benchmarks.serving.models import MODELS, spense
from vllm_spense.format.codecs import NF4


def entry(seconds: float, points: list[str]) -> dict:
    return {"rounds": [{"start_seconds": 1.0, "seconds": {p: [seconds] for p in points}}], "missing": {}}


def test_what_is_not_measured_is_a_dash(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text("<!-- serving-four-bit:begin -->\n<!-- serving-four-bit:end -->\n")
    entries = {f"tiny/{v}": entry(2.0 if v == "bf16" else 1.0, list(POINTS)) for v in SHOWN if v != THEIRS}
    entries[f"tiny/{THEIRS}"] = entry(4.0, ["decode, 1 sequence"])
    report({"some CPU": {"models": entries}}, document)
    lines = [line for line in document.read_text().splitlines() if line.startswith("| tiny")]
    assert len(lines) == len(POINTS)
    twice = " | ".join(["32.0 (2.00×)"] * 3)
    assert lines[0] == f"| tiny | decode, 1 sequence | 16.0 (1.00×) | {twice} | 8.0 (0.50×) |"
    assert lines[1].endswith("| – |")


def test_its_variants_are_in_no_other_table() -> None:
    assert set(FOUR_BIT) <= set(VARIANTS)
    assert not set(FOUR_BIT) & set(variants())
    assert spense("1.0-nf4") == (NF4, 1.0)
    config = MODELS["tiny"].config("1.0-nf4")["quantization_config"]
    assert {module["sparse"] for module in config["modules"].values()} == {0}
    assert config["codec"] == "nf4"
