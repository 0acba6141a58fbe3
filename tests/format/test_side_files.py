"""What is copied beside config and weights: everything that a server reads, nothing that it must not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vllm_spense.format import CheckpointError
from vllm_spense.format.side_files import side_files

WANTED = {
    "LICENSE",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.txt",
}
UNWANTED = {
    ".cache/huggingface/download/config.json.metadata",
    ".git/config",
    ".gitattributes",
    "README.md",
    "__pycache__/modeling_evil.cpython-311.pyc",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/optimizer.pt",
    "checkpoint-500/trainer_state.json",
    "config.json",
    "consolidated.00.pth",
    "gguf/model-Q4.gguf",
    "model.gguf",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling_evil.py",
    "onnx/config.json",
    "onnx/quantised/model.onnx",
    "original/consolidated.00.pth",
    "original/params.json",
    "pytorch_model.BIN",
    "pytorch_model.bin.index.json",
    "spense_manifest.json",
    "tools/evil.py",
}


def fill(source: Path, names: set[str]) -> Path:
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    return source


def test_neither_weights_nor_code(tmp_path: Path) -> None:
    found = side_files(fill(tmp_path, WANTED | UNWANTED))
    assert set(found) == WANTED
    assert all(path.read_text() == name for name, path in found.items())


def modules(source: Path, *paths: object) -> Path:
    (source / "modules.json").write_text(json.dumps([{"idx": i, "path": p} for i, p in enumerate(paths)]))
    return source


PARTS = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}


def test_parts_behind_the_transformer_come_with_their_weights(tmp_path: Path) -> None:
    others = {"2_Dense/pytorch_model.bin", "2_Dense/layer.py", "3_Other/model.safetensors"}
    source = modules(fill(tmp_path, PARTS | others | {"tokenizer.json"}), "", "1_Pooling", "2_Dense")
    assert set(side_files(source)) == PARTS | {"modules.json", "tokenizer.json"}


def test_pickled_weights_of_a_part_are_refused(tmp_path: Path) -> None:
    source = modules(fill(tmp_path, {"2_Dense/config.json", "2_Dense/pytorch_model.bin"}), "", "2_Dense")
    with pytest.raises(CheckpointError, match=r"2_Dense/pytorch_model\.bin.*pickled.*Fix: save the model"):
        side_files(source)


@pytest.mark.parametrize("text", ["{", '["a"]', "3", '[{"idx": 0}]', '[{"path": 3}]'])
def test_a_list_of_parts_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"modules\.json: no list of modules.*Fix: "):
        side_files(tmp_path)


def test_parts_stay_in_the_model(tmp_path: Path) -> None:
    fill(tmp_path, {"other/2_Dense/model.safetensors", "model/tokenizer.json"})
    source = modules(tmp_path / "model", "../other/2_Dense", "/etc")
    assert set(side_files(source)) == {"tokenizer.json", "modules.json"}


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("tokenizer.json", "additional_chat_templates/rag.jinja")):
        (blobs / str(number)).write_text(name)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    (snapshot / "again").symlink_to(snapshot)  # would have no end
    found = side_files(snapshot)
    assert {name: path.read_text() for name, path in found.items()} == {name: name for name in found}
    assert set(found) == {"tokenizer.json", "additional_chat_templates/rag.jinja"}


def test_a_file_that_is_not_there_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the file cannot be read.*Fix: "):
        side_files(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "model.gguf")  # not needed
    assert side_files(tmp_path) == {}


def test_pipes_are_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert side_files(tmp_path) == {}
