"""All commands that take a model accept the same ones, and say the same of those that they refuse."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.refused_models import FILES, Refused, config, make
from tests.tiny import make_llama, make_spense
from tests.tiny_families import FAMILIES, make_family
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.cli.app import main

MODELS = {
    "unknown": Refused(config(model_type="llama9"), "has no model_type 'llama9'"),
    "foreign code": Refused(
        config(model_type="mine", auto_map={"AutoConfig": "a.B"}), r"code of its own directory \(auto_map\)"
    ),
    "encoder": Refused(config(model_type="bert"), "BertLMHeadModel has no list of decoder layers"),
    "encoder-decoder": Refused(
        config(model_type="t5", is_encoder_decoder=True), "'t5' is an encoder-decoder model"
    ),
    "rope": Refused(config(rope_parameters={"rope_type": "spiral"}), "rope_type is 'spiral'"),
    "activation": Refused(config(hidden_act="swoosh"), "hidden_act is 'swoosh'"),
    "other sizes": Refused(config(intermediate_size=416), r"shape \[208, 144\].*needs \[416, 144\]"),
    "many layers": Refused(config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "quantised outside of config.json": FILES["quantised without a word"],
}
"""What is found out with transformers' help, or from the headers."""
EVERY = {kind: case for kind, case in FILES.items() if kind != "quantised without a word"} | MODELS
NOT_PREDICTED = {
    "gemma4_text": "layers differ in heads and share KV caches",
    "gemma4_moe": "the experts of model_type 'gemma4_text' are not known",
    "qwen3_5_text": "layers of linear attention or convolutions keep no KV cache",
    "falcon_h1": "attention keeps no ordinary KV cache",
}
"""Pruned and served, but `spense plan` has no model of their speed and says so."""
TOKENIZER = {"pointer for the tokenizer", "empty tokenizer"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, its Spense checkpoint, a text."""
    root = tmp_path_factory.mktemp("agreement")
    add_tokenizer(make_llama(root / "good", bias=False))
    add_tokenizer(make_spense(root / "good", root / "spense"))
    write_text(root / "text.txt")
    return root


def said(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str | None:
    """What the command says of its failure, on one line; None if it does not fail."""
    monkeypatch.setattr(sys, "argv", ["spense", *map(str, arguments)])
    capsys.readouterr()
    try:
        main()
    except SystemExit as end:
        text = capsys.readouterr().err.strip()
        if not end.code:
            return None
        assert "Traceback" not in text
        *_, line = text.splitlines()
        assert line.startswith("error: ")
        return line
    return None


def commands(model: Path, folder: Path, out: Path) -> dict[str, list[object]]:
    text = folder / "text.txt"
    pruning = ["prune", model, "-o", out, "--preset", "magnitude", "--no-check"]
    recovery = [
        "--dense",
        model,
        "--calibration",
        text,
        "-o",
        out.with_name("r"),
        "--steps",
        1,
        "--seq-len",
        16,
    ]
    return {
        "prune": pruning,
        "dry run": [*pruning, "--dry-run", "--device-model", "h200"],
        "plan": ["plan", model],
        "eval": ["eval", model, "--text", text, "--seq-len", 16, "--max-tokens", 32],
        "recover": ["recover", folder / "spense", "--dense", model, *recovery],
    }


@pytest.mark.parametrize("kind", EVERY)
def test_all_commands_refuse_in_the_same_words(
    kind: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make(EVERY[kind], folder / "good", tmp_path / "model")
    lines = {
        name: said(arguments, monkeypatch, capsys)
        for name, arguments in commands(model, folder, tmp_path / "out").items()
    }
    first = lines["prune"]
    assert first is not None
    assert str(model) in first
    assert lines["dry run"] == first
    assert lines["plan"] == first
    measuring = {lines["eval"], lines["recover"]}
    if evaluated := EVERY[kind].evaluated:
        assert lines["recover"] == first
        assert re.search(evaluated, str(lines["eval"]))
    elif kind in FILES:
        assert measuring == {first}
    else:  # transformers itself loads the model there, and knows encoders, too
        assert all(line is not None and str(model) in line for line in measuring)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}, "nothing was written"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_commands_accept_the_families(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_family(family, tmp_path / "model")
    write_text(tmp_path / "text.txt")
    found = commands(model, tmp_path, tmp_path / "out")
    for name in ("dry run", "plan", "prune"):
        line, refusal = said(found[name], monkeypatch, capsys), NOT_PREDICTED.get(family)
        if name == "plan" and refusal is not None:
            assert refusal in str(line)
        else:
            assert line is None, name
    shutil.copytree(model, tmp_path / "config only", ignore=shutil.ignore_patterns("*.safetensors"))
    found = commands(tmp_path / "config only", tmp_path, tmp_path / "out 2")
    for name in ("dry run", *(["plan"] if family not in NOT_PREDICTED else [])):  # what needs no weights
        assert said(found[name], monkeypatch, capsys) is None, name
