"""The SHA-256 manifest finds what safetensors cannot."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.manifest import (
    MANIFEST_NAME,
    check_manifest,
    is_loaded_file,
    is_weight_file,
    read_manifest,
    sha256,
    update_manifest,
    write_manifest,
)

CONTENTS = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer.json": b"",
    "sub/template.jinja": b"hello",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path)
    return tmp_path


def edit(directory: Path, change) -> None:
    raw = json.loads((directory / MANIFEST_NAME).read_text())
    change(raw)
    (directory / MANIFEST_NAME).write_text(json.dumps(raw))


def test_entries(directory: Path) -> None:
    entries = read_manifest(directory)
    assert entries == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in CONTENTS.items()
    }
    assert check_manifest(directory) == sum(map(len, CONTENTS.values()))


def test_sha256_of_more_than_one_chunk(tmp_path: Path) -> None:
    content = b"spense" * 1_000_000
    (tmp_path / "big").write_bytes(content)
    assert sha256(tmp_path / "big") == hashlib.sha256(content).hexdigest()


def test_rewriting_is_stable(directory: Path) -> None:
    before = (directory / MANIFEST_NAME).read_bytes()
    write_manifest(directory)
    assert (directory / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize("name", [n for n, c in CONTENTS.items() if c])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit(directory: Path, name: str, bit: int) -> None:
    content = bytearray(CONTENTS[name])
    content[len(content) // 2] ^= 1 << bit
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: the SHA-256 differs from the manifest.*Fix: "):
        check_manifest(directory)


def test_size_is_checked_before_any_hash(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(CONTENTS["model.safetensors"][:-1])
    hashed: list[str] = []
    with pytest.raises(CheckpointError, match="the file has 10239 bytes, the manifest says 10240"):
        check_manifest(directory, progress=hashed.append)
    assert hashed == []


def test_missing_file(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the file is missing"):
        check_manifest(directory)


def test_only_selected_files_are_read(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("edited on purpose")
    hashed: list[str] = []
    assert check_manifest(directory, only=is_weight_file, progress=hashed.append) == 10240
    assert hashed == ["model.safetensors"]


def test_new_files_that_are_no_weights_are_allowed(directory: Path) -> None:
    """Hubs and people add files; only what a server loads must be listed."""
    (directory / ".gitattributes").write_text("")
    (directory / "NOTES.md").write_text("")
    check_manifest(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_loaded_must_be_listed(directory: Path, name: str) -> None:
    edit(directory, lambda raw: raw["files"].pop(name))
    with pytest.raises(CheckpointError, match=f"{name}: the manifest does not list this file"):
        check_manifest(directory)


@pytest.mark.parametrize("name", ["2_Dense/model.safetensors", "2_Dense/config.json"])
def test_so_must_a_file_of_a_part_of_the_model(directory: Path, name: str) -> None:
    (directory / "2_Dense").mkdir()
    for file in ("model.safetensors", "config.json"):
        (directory / "2_Dense" / file).write_bytes(b"weights")
    write_manifest(directory)
    hashed: list[str] = []
    check_manifest(directory, only=is_loaded_file, progress=hashed.append)
    assert name in hashed
    edit(directory, lambda raw: raw["files"].pop(name))
    with pytest.raises(CheckpointError, match=f"{name}: the manifest does not list this file"):
        check_manifest(directory)


def test_weights_in_a_folder_of_somebodys_own_are_none_of_the_models(directory: Path) -> None:
    (directory / "my_adapter").mkdir()
    (directory / "my_adapter" / "adapter_model.safetensors").write_bytes(b"")
    check_manifest(directory)


def test_the_plugin_asks_for_weights_only(directory: Path) -> None:
    edit(directory, lambda raw: raw["files"].pop("config.json"))
    check_manifest(directory, only=is_weight_file)
    edit(directory, lambda raw: raw["files"].pop("model.safetensors"))
    with pytest.raises(CheckpointError, match="the manifest does not list this file"):
        check_manifest(directory, only=is_weight_file)


def test_an_update_adopts_nothing_of_somebodys_own(directory: Path) -> None:
    """What is listed may be deleted by ``--overwrite``; a new weight file is loaded, so it must be listed."""
    (directory / "notes.txt").write_text("mine")
    (directory / ".git").mkdir()
    (directory / ".git" / "HEAD").write_text("ref")
    (directory / "tokenizer.json").write_text("edited on purpose")
    (directory / "more.safetensors").write_bytes(b"")
    update_manifest(directory)
    assert set(read_manifest(directory)) == {*CONTENTS, "more.safetensors"}
    check_manifest(directory)
    (directory / MANIFEST_NAME).unlink()
    update_manifest(directory)
    assert set(read_manifest(directory)) == {*CONTENTS, "more.safetensors", "notes.txt"}


def entry(**values):
    return lambda raw: raw["files"]["config.json"].update(values)


def extra(name: str):
    return lambda raw: raw["files"].update({name: {"size": 2, "sha256": "0" * 64}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(version=2), "version 2, expected 1"),
        (lambda raw: raw.pop("version"), "cannot be read .*version"),
        (lambda raw: raw.pop("files"), "cannot be read .*files"),
        (lambda raw: raw.update(files=[]), "cannot be read"),
        (lambda raw: raw.update(files={"config.json": "abc"}), "cannot be read"),
        (entry(size="2"), "bad entry for 'config.json'"),
        (entry(size=None), "bad entry for 'config.json'"),
        (entry(sha256="abc"), "bad entry for 'config.json'"),
        (entry(sha256=7), "cannot be read"),
        (lambda raw: raw["files"]["config.json"].pop("size"), "cannot be read"),
        (extra("../secret"), r"'\.\./secret' leaves the directory"),
        (extra("sub/../../secret"), "leaves the directory"),
        (extra("/etc/hostname"), "'/etc/hostname' leaves the directory"),
        (extra("x" * 5000), "the file is missing"),
        (extra("nul\0byte"), "the file is missing"),
        (extra("sub"), "the file is missing"),
    ],
)
def test_damaged_manifests(directory: Path, change, message: str) -> None:
    edit(directory, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_manifest(directory)
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"version": 1, "files": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "list", "null", "not utf-8", "nested", "digits"],
)
def test_unreadable_manifests(directory: Path, content: bytes) -> None:
    (directory / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{MANIFEST_NAME}: the manifest cannot be read"):
        check_manifest(directory)


def test_absent_manifest(directory: Path) -> None:
    (directory / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"{MANIFEST_NAME}: the manifest is missing.*Fix: "):
        check_manifest(directory)
