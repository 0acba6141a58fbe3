"""The `spense` command as a user runs it: output, exit codes, one clear line per failure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vllm_spense
from tests.tiny import make_llama, make_spense
from vllm_spense.cli.app import app


def spense(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_spense.cli.app", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    make_llama(root / "dense")
    make_spense(root / "dense", root / "spense")
    return root


def test_inspect(models: Path) -> None:
    done = spense("inspect", models / "spense", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["tensor_parallel_sizes"] == [1, 2]
    assert len(report["modules"]) == 14
    assert report["mlp_sparsity"] == pytest.approx(0.5 * 112 / 208)
    assert report["bytes"] < report["dense_bytes"]
    assert report["dense_ratio"] == pytest.approx(96 / 208)
    ratios = {m["name"]: m["dense_ratio"] for m in report["modules"]}
    assert ratios["model.layers.1.mlp.up_proj"] == pytest.approx(96 / 208)
    assert ratios["model.layers.1.self_attn.q_proj"] == 1
    table = spense("inspect", models / "spense").stdout
    saved = 1 - report["bytes"] / report["dense_bytes"]
    for fact in (
        "14 linear layers: 6 hybrid with a 2:4 region (26.9% zeros there), 8 all-dense FP8",
        "mean dense ratio of the hybrid MLP layers: 0.462",
        f"weights: {report['bytes'] / 2**20:.2f} MiB, as dense FP8 {report['dense_bytes'] / 2**20:.2f} MiB",
        f"({saved:.1%} saved)",
        "tensor parallel sizes: 1, 2",
    ):
        assert fact in table


def test_verify_right_and_damaged(models: Path, tmp_path: Path) -> None:
    done = spense("verify", models / "spense")
    assert done.returncode == 0, done.stderr
    assert "OK 14 modules" in done.stdout
    bad = tmp_path / "bad"
    shutil.copytree(models / "spense", bad)
    weights = bytearray((bad / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (bad / "model.safetensors").write_bytes(weights)
    done = spense("verify", bad)
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr
    assert "SHA-256" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_finds_a_model_that_does_not_fit(models: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(models / "spense", bad)
    config = json.loads((bad / "config.json").read_text())
    config["hidden_size"] = 288
    (bad / "config.json").write_text(json.dumps(config))
    done = spense("verify", bad, "--update-manifest")
    assert done.returncode == 1
    assert "Fix:" in done.stderr


def test_verify_finds_a_missing_norm(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bad = tmp_path / "bad"
    shutil.copytree(models / "spense", bad)
    state = load_file(bad / "model.safetensors")
    del state["model.layers.1.input_layernorm.weight"]
    save_file(state, bad / "model.safetensors")
    done = spense("verify", bad, "--update-manifest")
    assert done.returncode == 1
    assert "model.layers.1.input_layernorm" in done.stderr


def test_update_manifest_accepts_an_edit(models: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(models / "spense", edited)
    (edited / "config.json").write_text((edited / "config.json").read_text() + "\n")
    assert spense("verify", edited).returncode == 1
    assert spense("verify", edited, "--update-manifest").returncode == 0
    assert spense("verify", edited).returncode == 0


@pytest.mark.parametrize("format", ["bfloat16", "float32", "fp8", "spense-dense"])
def test_export(models: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / "out"
    done = spense("export", models / "spense", "-o", out, "--format", format)
    assert done.returncode == 0, done.stderr
    method = json.loads((out / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
    assert method == {"fp8": "compressed-tensors", "spense-dense": "spense"}.get(format)
    again = spense("export", models / "spense", "-o", out, "--format", format)
    assert again.returncode == 1
    assert "--overwrite" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("inspect", "/no/such/dir"), 1, "no such directory"),
        (("inspect", "DENSE"), 1, "spense prune"),
        (("export", "DENSE", "-o", "OUT"), 1, "spense prune"),
        (("eval", "DENSE", "--text", "/no/such/text"), 1, "/no/such/text"),
        (("prune", "/no/such/model", "-o", "OUT", "--calibration", __file__), 1, "/no/such/model"),
        (("prune", "DENSE", "-o", "OUT"), 1, "error: method 'obs'"),
        (("prune", "DENSE", "-o", "OUT", "--calibration", "/no/such/text"), 1, "/no/such/text"),
        (("prune", "DENSE", "-o", "OUT", "--dense-ratio", "1.5"), 2, "dense-ratio"),
        (("prune", "DENSE", "-o", "OUT", "--method", "magic"), 2, "magic"),
        (("prune", "DENSE"), 2, "out"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_bad_input_is_one_clear_error(
    models: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    places = {"DENSE": models / "dense", "OUT": tmp_path / "out"}
    done = spense(*(places.get(a, a) for a in arguments))
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ("--regroup 4", {"regroup": 4}),
        ("--order energy", {"order": "energy"}),
    ],
)
def test_options_that_are_not_given_are_the_presets(
    arguments: str, expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr("vllm_spense.pruning.PruneConfig", lambda **options: given.append(options))
    monkeypatch.setattr("vllm_spense.cli.app.show_plan", lambda *_: None)
    command = ["prune", "MODEL", "-o", "OUT", "--dry-run", *arguments.split()]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    names = ("regroup", "order")
    assert {name: given[0][name] for name in names if name in given[0]} == expected


def test_python_face() -> None:
    for name in vllm_spense.__all__:
        assert callable(getattr(vllm_spense, name))
    with pytest.raises(AttributeError):
        vllm_spense.nonsense  # noqa: B018


def test_tune_plans_without_a_gpu_and_refuses_to_measure(models: Path) -> None:
    done = spense("tune", models / "spense", "--dry-run", "--tokens", "16", "--tokens", "4096")
    assert done.returncode == 0, done.stderr
    assert "output" in done.stdout
    assert "4096" in done.stdout
    done = spense("tune", models / "spense", "--tp", "3", "--dry-run")
    assert done.returncode == 1
    assert "tensor parallel sizes [1, 2], not 3" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_fails_in_one_line(models: Path) -> None:
    done = spense("tune", models / "spense")
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr
    assert "Traceback" not in done.stderr
