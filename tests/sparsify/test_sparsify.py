"""``sparsify`` on tiny random models: what it writes, what that costs, and every way it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from tests.tiny import LAYERS, make_llama, make_spense
from tests.tiny_families import make_family
from tests.tiny_text import add_tokenizer, write_text
from tests.tiny_wrappers import make_wrapper
from vllm_spense.evaluation import load_model
from vllm_spense.evaluation.density import measure_density
from vllm_spense.format import CheckpointError
from vllm_spense.format.manifest import check_manifest
from vllm_spense.format.twell_config import parse_twell_config
from vllm_spense.models.parts import UnsupportedModelError
from vllm_spense.sparsify import SparsifyConfig, SparsifyReport, sparsify
from vllm_spense.verification import verify

DOWNS = [f"model.layers.{i}.mlp.down_proj" for i in range(LAYERS)]
WINDOWS = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense`` and ``text.txt``. The second layer's MLP matters a hundred times less than the first's."""
    root = tmp_path_factory.mktemp("sparsify")
    add_tokenizer(make_llama(root / "dense", bias=False))
    state = load_file(root / "dense" / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"] *= 0.01
    save_file(state, root / "dense" / "model.safetensors", metadata={"format": "pt"})
    write_text(root / "text.txt")
    return root


def options(root: Path, **changes: Any) -> SparsifyConfig:
    base = {"calibration": str(root / "text.txt"), "num_samples": 4, "loss_samples": 2, "seq_len": 64}
    return SparsifyConfig(**(base | changes))


@pytest.fixture(scope="module")
def done(root: Path) -> SparsifyReport:
    return sparsify(root / "dense", root / "out", options(root))


def test_weights_keep_every_bit(root: Path, done: SparsifyReport) -> None:
    before, after = (load_file(root / name / "model.safetensors") for name in ("dense", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (root / "out" / "tokenizer.json").is_file()
    check_manifest(root / "out")


def test_verify(root: Path, done: SparsifyReport, tmp_path: Path) -> None:
    report = verify(root / "out")
    assert (report.modules, report.hashes_checked, report.architecture_checked) == (LAYERS, True, True)
    copy = shutil.copytree(root / "out", tmp_path / "copy")
    config = copy / "config.json"
    config.write_text(config.read_text().replace(DOWNS[0], "model.norm"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        verify(copy)  # by its hash
    with pytest.raises(CheckpointError, match=r"model\.norm.*not as a linear"):
        verify(copy, update_manifest=True)
    config.write_text(config.read_text().replace("model.norm", DOWNS[0]).replace('"twell"', '"twell" '))
    verify(copy, update_manifest=True)
    verify(copy)


def test_what_config_says(root: Path, done: SparsifyReport) -> None:
    config = json.loads((root / "out" / "config.json").read_text())
    found = parse_twell_config(config["quantization_config"])
    assert found.inputs == done.thresholds
    assert list(found.inputs) == DOWNS
    assert found.density == pytest.approx({n: x.density for n, x in done.density.layers.items()}, abs=1e-4)
    assert found.provenance["options"]["sparsity"] == 0.5
    assert found.provenance["calibration"]["source"] == "text.txt"
    assert found.provenance["base_model"] == "dense"
    assert "calibration" not in found.provenance["options"]
    card = (root / "out" / "README.md").read_text()
    assert "text.txt" in card
    assert str(root) not in card + json.dumps(config)


def test_the_share_is_met_on_other_text(root: Path, done: SparsifyReport) -> None:
    found = measure_density(load_model(root / "out"), WINDOWS)
    assert found.mean == pytest.approx(0.5, abs=0.03)
    assert done.density.mean == pytest.approx(0.5, abs=0.03)


def test_layers_that_matter_less_skip_more(done: SparsifyReport) -> None:
    first, second = (layer.density for layer in done.density.layers.values())
    assert second < 0.2 < 0.7 < first
    assert done.loss < 0.5 * done.uniform_loss


def test_one_share_for_all(root: Path, tmp_path: Path) -> None:
    report = sparsify(root / "dense", tmp_path / "out", options(root, allocation="uniform", sparsity=0.7))
    assert report.loss == report.uniform_loss
    for layer in report.density.layers.values():
        assert layer.density == pytest.approx(0.3, abs=0.05)


def test_the_loss_is_the_divergence(root: Path, done: SparsifyReport) -> None:
    """On windows of its own, so of the same size only."""
    with torch.no_grad():
        whole, skipped = (
            load_model(root / n)(input_ids=WINDOWS).logits.log_softmax(-1) for n in ("dense", "out")
        )
    divergence = float((whole.exp() * (whole - skipped)).sum(-1).mean())
    assert done.loss == pytest.approx(divergence, rel=0.3)


def test_equal_runs_give_equal_thresholds(root: Path, done: SparsifyReport, tmp_path: Path) -> None:
    again = sparsify(root / "dense", tmp_path / "again", options(root))
    other = sparsify(root / "dense", tmp_path / "other", options(root, seed=5))
    assert again.thresholds == done.thresholds != other.thresholds


@pytest.mark.parametrize("kind", ["gemma3_text", "opt", "phi3"])
def test_families(kind: str, root: Path, tmp_path: Path) -> None:
    dense = add_tokenizer(make_family(kind, tmp_path / "dense"))
    report = sparsify(dense, tmp_path / "out", options(root, seq_len=32))
    found = measure_density(load_model(tmp_path / "out"), WINDOWS[:, :32].contiguous())
    assert found.mean == pytest.approx(0.5, abs=0.1)
    assert list(report.thresholds) == list(found.layers)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "error", "message"),
    [
        ("missing", {}, ValueError, "no such model directory"),
        ("spense", {}, CheckpointError, "Spense checkpoint.*dense model"),
        ("twell", {}, CheckpointError, "already quantised .twell"),
        ("wrapper", {}, UnsupportedModelError, "another name in the files"),
        ("dense", {"calibration": "missing.txt"}, ValueError, "no such text file"),
        ("dense", {"seq_len": 200, "calibration": "SHORT"}, ValueError, "fewer than one window"),
        ("dense", {"seq_len": 512}, CheckpointError, "longer than the model's 256 positions"),
    ],
)
def test_refusals_leave_nothing(
    model: str, changes: dict[str, Any], error: type, message: str, root: Path, tmp_path: Path
) -> None:
    place = tmp_path / "in"
    place.mkdir()
    if model == "dense":
        shutil.copytree(root / "dense", place / model)
    elif model == "twell":
        sparsify(root / "dense", place / model, options(root))
    elif model == "spense":
        make_spense(root / "dense", place / model)
    elif model == "wrapper":
        add_tokenizer(make_wrapper("gemma3", place / model))
    if changes.get("calibration") == "SHORT":
        changes = changes | {"calibration": str(write_text(place / "short.txt", words=50))}
    with pytest.raises(error, match=message):
        sparsify(place / model, tmp_path / "out", options(root, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_out_in_use(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        sparsify(root / "dense", tmp_path / "out", options(root))


@pytest.mark.parametrize(
    "wrong", [{"sparsity": 0}, {"sparsity": 1}, {"allocation": "greedy"}, {"seq_len": 1}, {"ratio": 1}]
)
def test_options(wrong: dict[str, Any], root: Path) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        options(root, **wrong)


# -- progress and command ------------------------------------------------------------------------


def test_progress(root: Path, tmp_path: Path) -> None:
    events: list[tuple[str, int, int]] = []
    sparsify(root / "dense", tmp_path / "out", options(root), lambda *event: events.append(event))
    counts = {"inputs": 4, "losses": LAYERS, "density": 2}
    assert events == [(stage, i + 1, count) for stage, count in counts.items() for i in range(count)]


def test_command(root: Path, tmp_path: Path) -> None:
    given = ["--calibration", root / "text.txt", "--seq-len", "64", "--num-samples", "4", "--sparsity", "0.6"]
    command = [
        sys.executable,
        "-m",
        "vllm_spense.cli.app",
        "sparsify",
        root / "dense",
        "-o",
        tmp_path / "out",
    ]
    done = subprocess.run([*map(str, command), *map(str, given)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert re.search(r"KL divergence from the model itself: \d+\.\d{4} nats", told)
    assert "vllm serve" in told
    assert parse_twell_config(
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    )
