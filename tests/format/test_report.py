"""`spense inspect`: the numbers are those of the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.tiny import HIDDEN, INTER, LAYERS, LINEARS, SPARSE
from vllm_spense.format import Checkpoint, CheckpointError
from vllm_spense.format.report import inspect
from vllm_spense.models.export import export

BIAS_BYTES = 2


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16"])
def test_numbers(tiny_spense: Path, tiny_spense_bf16: Path, dtype: str) -> None:
    directory = tiny_spense if dtype == "float8_e4m3fn" else tiny_spense_bf16
    report = inspect(directory)
    checkpoint = Checkpoint(directory)
    assert report.directory == directory
    assert report.weight_dtype == dtype
    assert report.tensor_parallel_sizes == [1, 2]
    assert [m.name for m in report.modules] == list(checkpoint.require_spense().modules)
    assert len(report.modules) == LAYERS * len(LINEARS)
    for module in report.modules:
        tensors = checkpoint.module_tensors(module.name)
        stored = sum(t.numel() * t.element_size() for n, t in tensors.items() if n != "bias")
        assert module.stored_bytes == stored, module.name
        scale = tensors["weight_scale"].numel() * 4 if "weight_scale" in tensors else 0
        width = 1 if dtype == "float8_e4m3fn" else 2
        assert module.dense_bytes == module.spec.out_features * module.spec.in_features * width + scale
    assert report.stored_bytes == sum(m.stored_bytes for m in report.modules)
    assert report.dense_bytes == sum(m.dense_bytes for m in report.modules)
    assert report.total_bytes == (directory / "model.safetensors").stat().st_size


def test_sparsity(tiny_spense: Path) -> None:
    """112 of 208 intermediate features are 2:4: half of their weights are zero."""
    report = inspect(tiny_spense)
    hybrid = {m.name.rpartition(".")[2] for m in report.hybrid}
    assert hybrid == {"gate_proj", "up_proj", "down_proj"}
    assert report.mlp_sparsity == pytest.approx(SPARSE / INTER / 2)
    for module in report.modules:
        expected = SPARSE / INTER / 2 if module in report.hybrid else 0.0
        assert module.sparsity == pytest.approx(expected)
        if module in report.hybrid:
            weight = Checkpoint(tiny_spense).module_weight(module.name)
            assert weight.numel() == HIDDEN * INTER
            zeros = int((weight.float() == 0).sum())
            assert zeros >= module.sparsity * weight.numel()


@pytest.mark.parametrize(
    ("losses", "loss"), [({"model.layers.0.mlp.up_proj": 0.25}, 0.25), ({}, None), ([1], None)]
)
def test_losses_come_from_the_provenance(
    tiny_spense: Path, tmp_path: Path, losses: object, loss: float | None
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(tiny_spense, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["provenance"] = {"method": "obs", "losses": losses}
    (directory / "config.json").write_text(json.dumps(config))
    report = inspect(directory)
    assert report.provenance["method"] == "obs"
    assert {m.name: m.loss for m in report.modules}["model.layers.0.mlp.up_proj"] == loss


def test_no_hybrid_layers(tiny_spense: Path, tmp_path: Path) -> None:
    report = inspect(export(tiny_spense, tmp_path / "dense", format="spense-dense"))
    assert report.hybrid == []
    assert report.mlp_sparsity == 0.0
    assert report.stored_bytes == report.dense_bytes


def test_dense_directory_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"this is no Spense checkpoint.*Fix: make one with `spense prune"
    ):
        inspect(tiny_llama)
