"""`spense plan`: tables, JSON, picture, comparison, and one clear line per mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_spense.cli.app import app, main
from vllm_spense.cli.plan import speedups
from vllm_spense.ops import tuning
from vllm_spense.planning import plan

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPENSE_TUNING_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    tuning.measured.cache_clear()
    yield
    tuning.measured.cache_clear()


def output(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_tables_notes_and_verdict() -> None:
    text, found = output("Qwen3-32B"), plan("Qwen3-32B")
    for fact in (
        "Qwen3-32B on 1 × H200, dense ratio 0.500 (predicted)",
        f"{found.decode.dense_tokens_per_s:,.0f} tokens/s",
        f"{found.prefill.spense_tokens_per_s:,.0f} tokens/s",
        f"{found.memory.spense_bytes / 1e9:.2f} GB",
        f"{found.memory.saved:.1%} saved",
        f"+{found.memory.spense_kv_tokens - found.memory.dense_kv_tokens:,} tokens",
        "kernel times are estimates: nothing has been measured",
    ):
        assert fact in text
    assert text.splitlines()[-2:] == [found.verdict, found.advice]
    assert "W4A8" in text
    assert "* 128" in text  # 128 x 4096 tokens do not fit
    assert "* 32 " not in text


def test_options_reach_the_prediction() -> None:
    arguments = ("--gpu", "h100", "--batch", 4, "--context", 1000, "--prefill", 2048, "--dense-ratio", 0.25)
    raw = json.loads(output("Llama-3.1-70B", *arguments, "--kv-dtype", "fp8", "--tp", 2, "--json"))
    expected = plan(
        *("Llama-3.1-70B", "H100"),
        batch=4,
        context=1000,
        prefill_tokens=2048,
        dense_ratio=0.25,
        kv_dtype="fp8",
        tensor_parallel=2,
    )
    assert raw == json.loads(json.dumps(expected.as_dict()))
    assert raw["dense_ratio"] == 0.25
    assert list(raw["batches"]) == ["1", "4", "8", "32", "128", "256"]


def test_directories(tiny_llama: Path, tiny_spense: Path) -> None:
    dense = json.loads(output(tiny_llama, "--dense-ratio", 0, "--json"))
    assert dense["dense_ratio"] == 0
    pruned = json.loads(output(tiny_spense, "--tp", 2, "--json"))
    assert pruned["dense_ratio"] == pytest.approx(96 / 208)
    assert pruned["memory"]["spense_bytes"] < pruned["memory"]["dense_bytes"]


def test_a_measured_run_beside_it(tmp_path: Path) -> None:
    found = plan("Qwen3-32B", batch=8, context=512)
    row = {"phase": "decode", "batch": 8, "context": 512, "dense_tokens_per_s": 100.0}
    row["spense_tokens_per_s"] = 100 * found.decode.speedup / 1.1
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"gpu": "H200", "date": "d", "command": "by hand", "rows": [row]}))
    text = output("Qwen3-32B", "--measured", run)
    assert "+10.0%" in text
    assert text.splitlines()[-1] == "mean error of the speed-up: 10.0% over 1 rows"
    raw = json.loads(output("Qwen3-32B", "--measured", run, "--json"))
    assert raw["comparison"]["mean_error"] == pytest.approx(0.1)
    assert raw["comparison"]["rows"][0]["batch"] == 8


def test_the_picture(tmp_path: Path) -> None:
    out, other = tmp_path / "new" / "a.png", tmp_path / "b.png"
    assert "Wrote" in output("Qwen3-32B", "--plot", out)
    json.loads(output("Qwen3-32B", "--plot", other, "--dense-ratio", 0.25, "--json").splitlines()[-1])
    assert out.read_bytes()[:8] == other.read_bytes()[:8] == PNG
    assert out.read_bytes() != other.read_bytes()


def test_lines_end_where_the_cache_is_full() -> None:
    found = plan("Qwen3-32B")
    lines = speedups(found)
    assert list(lines[512]) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert list(lines[32768]) == [1, 2, 4, 8]
    assert lines[2048][8] == plan("Qwen3-32B", batch=8, context=2048).decode.speedup


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("Qwen9",), 1, "no such directory, and no preset"),
        (("EMPTY",), 1, "the directory is empty. Fix:"),
        (("Qwen3-32B", "--gpu", "A100"), 1, "--gpu takes H100, H200, B200"),
        (("Qwen3-32B", "--tp", "3"), 1, "--tp 3 does not divide"),
        (("Qwen3-32B", "--measured", "/no/such/run"), 1, "/no/such/run"),
        (("SPENSE", "--dense-ratio", "0.5"), 1, "leave --dense-ratio out"),
        (("Qwen3-32B", "--batch", "0"), 2, "--batch"),
        (("Qwen3-32B", "--dense-ratio", "2"), 2, "--dense-ratio"),
        (("Qwen3-32B", "--kv-dtype", "int4"), 2, "int4"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], code: int, words: str, tmp_path: Path, tiny_spense: Path, monkeypatch, capsys
) -> None:
    places = {"EMPTY": str(tmp_path), "SPENSE": str(tiny_spense)}
    monkeypatch.setattr(sys, "argv", ["spense", "plan", *(places.get(a, a) for a in arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    captured = capsys.readouterr()
    assert exit.value.code == code
    assert words in captured.err
    assert captured.out == ""
    if code == 1:
        assert captured.err.count("\n") == 1


def test_without_matplotlib_one_line_says_what_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", ["spense", "plan", "Qwen3-32B", "--plot", str(tmp_path / "p.png")])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    assert "the plot needs matplotlib. Fix: pip install matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
