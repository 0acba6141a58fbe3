"""Which commands read 4-bit directories of bitsandbytes, and what they print."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.format.corruption_tools import quantization
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.cli.app import main

Spense = Callable[..., tuple[int, str, str]]


@pytest.fixture
def spense(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Spense:
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spense", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        found = capsys.readouterr()
        return int(end.value.code or 0), found.out, found.err

    return run


@pytest.fixture(autouse=True)
def no_bitsandbytes(tiny_bitsandbytes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads such a checkpoint needs it not."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.fixture
def packed(tiny_bitsandbytes: Path, tmp_path: Path) -> Path:
    write_text(tmp_path / "text.txt")
    return add_tokenizer(shutil.copytree(tiny_bitsandbytes, tmp_path / "packed"))


def test_verify(spense: Spense, packed: Path) -> None:
    assert spense("verify", packed)[:2] == (
        0,
        "OK 14 modules, 105 tensors (no manifest: hashes not checked)\n",
    )
    code, _, said = spense("verify", packed, "--update-manifest")
    assert code == 1
    assert "only Spense checkpoints have a manifest" in said
    assert not (packed / "spense_manifest.json").exists()


def test_inspect(spense: Spense, packed: Path) -> None:
    """Bytes are those of the files: 4 bits, an absmax of 8 per 64 weights, tables, the state."""
    _, out, _ = spense("inspect", packed, "--json")
    found = json.loads(out)
    assert found["weight_dtype"] == "nf4"
    assert found["sparsity"] == 0
    gate = next(m for m in found["modules"] if m["name"] == "model.layers.0.mlp.gate_proj")
    assert (gate["split"], gate["sparse"], gate["dense"], gate["bias"]) == ("output", 0, 208, True)
    weights = 208 * 144
    beside = 4 * 16 + 4 * 256 + 4 * 2
    assert weights // 2 + weights // 64 + beside < gate["bytes"] < weights // 2 + weights // 64 + beside + 250
    code, out, _ = spense("inspect", packed)
    assert code == 0
    assert "14 linear layers: 0 hybrid with a 2:4 region (0.0% zeros there), 14 all-dense NF4" in out
    assert "(0.0% saved)" in out


def test_eval_and_export(spense: Spense, packed: Path, tmp_path: Path) -> None:
    options = ("--text", tmp_path / "text.txt", "--seq-len", 16, "--max-tokens", 64, "--json")
    code, out, _ = spense("eval", packed, *options)
    assert code == 0
    assert spense("export", packed, "-o", tmp_path / "out", "--format", "float32")[0] == 0
    _, again, _ = spense("eval", tmp_path / "out", *options)
    assert json.loads(again)["perplexity"] == pytest.approx(json.loads(out)["perplexity"], rel=1e-4)


def test_what_needs_a_dense_model_refuses(spense: Spense, packed: Path, tmp_path: Path) -> None:
    prune = ("prune", packed, "-o", tmp_path / "out", "--preset", "magnitude")
    for arguments in (prune, (*prune, "--dry-run", "--device-model", "h200"), ("plan", packed)):
        code, _, said = spense(*arguments)
        assert code == 1
        assert "the model is already quantised (bitsandbytes). Fix: prune the original" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["verify", "inspect", "eval", "export"])
def test_8_bits_are_refused_by_name(spense: Spense, packed: Path, tmp_path: Path, command: str) -> None:
    quantization(load_in_4bit=False, load_in_8bit=True)(packed)
    rest = {"eval": ("--text", tmp_path / "text.txt", "--seq-len", 16), "export": ("-o", tmp_path / "out")}
    code, _, said = spense(command, packed, *rest.get(command, ()))
    assert code == 1
    assert "8-bit bitsandbytes (LLM.int8) is not supported. Fix: use a 4-bit one" in said
