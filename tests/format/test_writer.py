"""A checkpoint directory is either complete or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_spense.format import Checkpoint, CheckpointWriter
from vllm_spense.format.manifest import check_manifest, read_manifest
from vllm_spense.format.target import Target


def names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


def write(out: Path, count: int = 2, **options) -> dict[str, torch.Tensor]:
    tensors = {f"layer.{i}.weight": torch.full((4, 8), float(i)) for i in range(count)}
    with CheckpointWriter(out, **options) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.write_config({"model_type": "llama"})
    return tensors


def test_a_single_file(tmp_path: Path) -> None:
    tensors = write(tmp_path / "out")
    assert names(tmp_path) == {"out"}, "the temporary directory is gone"
    assert names(tmp_path / "out") == {"model.safetensors", "config.json", "spense_manifest.json"}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[n], t) for n, t in tensors.items())
    check_manifest(tmp_path / "out")


def test_shards_and_index(tmp_path: Path) -> None:
    """128 bytes a tensor: two fit in a shard of 300 bytes."""
    tensors = write(tmp_path / "out", count=5, max_shard_bytes=300)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names(tmp_path / "out") > {*shards, "model.safetensors.index.json"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 128
    assert list(index["weight_map"].values()) == [shards[0]] * 2 + [shards[1]] * 2 + [shards[2]]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], tensors[name])
    checkpoint = Checkpoint(tmp_path / "out")
    assert set(checkpoint.tensors) == set(tensors)
    assert torch.equal(checkpoint.load("layer.4.weight"), tensors["layer.4.weight"])
    assert set(read_manifest(tmp_path / "out")) == {*shards, "model.safetensors.index.json", "config.json"}


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    write(tmp_path / "out", count=3, max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=1) as writer:
        writer.add("a", torch.zeros(8))
        writer.add("b", torch.zeros(8))
        assert not (tmp_path / "out").exists()
        assert [p.name.startswith(".out.") for p in tmp_path.iterdir()] == [True]
        assert names(writer.temporary) == {"shard-00000.safetensors"}, "full shards are flushed at once"
        writer.write_config({})
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_failure_leaves_nothing_behind(tmp_path: Path, exists: bool, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    if exists:
        write(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()} if exists else {}

    def interrupted() -> None:
        with CheckpointWriter(out, overwrite=True, max_shard_bytes=1) as writer:
            writer.add("a", torch.zeros(8))
            writer.add("b", torch.zeros(8))
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == ({"out"} if exists else set())
    if exists:
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_failure_in_the_last_step_keeps_the_old_directory(tmp_path: Path) -> None:
    """A tensor that safetensors cannot store fails inside the final flush."""
    out = tmp_path / "out"
    write(out)
    with (
        pytest.raises(Exception, match=r"(?i)sparse|layout|storage"),
        CheckpointWriter(out, overwrite=True) as w,
    ):
        w._pending["bad"] = torch.eye(4).to_sparse()
    assert names(tmp_path) == {"out"}
    check_manifest(out)


def test_overwrite_replaces_everything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, count=5, max_shard_bytes=1)
    tensors = write(out, count=1, overwrite=True)
    assert names(tmp_path) == {"out"}
    assert names(out) == {"model.safetensors", "config.json", "spense_manifest.json"}
    assert set(Checkpoint(out).tensors) == set(tensors)


def test_a_non_empty_target_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    CheckpointWriter(tmp_path / "out")  # empty: fine
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty; choose another directory or pass"):
        CheckpointWriter(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_a_file_in_the_way_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out is a file; choose another output directory"):
        Target(tmp_path / "out", overwrite=True).check()


def test_a_target_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writer = CheckpointWriter(out).__enter__()
    writer.add("a", torch.zeros(8))
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        writer.__exit__(None, None, None)
    assert names(tmp_path) == {"out"}
    assert names(out) == {"precious.txt"}


def test_an_empty_existing_target_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert names(tmp_path) == {"out"}
    assert "model.safetensors" in names(tmp_path / "out")


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out")
    assert names(tmp_path / "a" / "b") == {"out"}


def test_views_and_shared_storages_are_stored_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(32.0).reshape(4, 8)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("whole", base)
        writer.add("rows", base[1:3])
        writer.add("transposed", base.t())
        writer.write_config({})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["rows"], base[1:3])
    assert torch.equal(stored["transposed"], base.t())


def test_a_queued_view_holds_no_large_base(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("slice", torch.zeros(1000, 8)[:2])
        assert writer._pending["slice"].untyped_storage().nbytes() == 2 * 8 * 4
        writer.write_config({})


@pytest.mark.parametrize("max_shard_bytes", [1, 1 << 20])
def test_a_name_cannot_be_used_twice(tmp_path: Path, max_shard_bytes: int) -> None:
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=max_shard_bytes) as writer:
        writer.add("a", torch.zeros(8))
        writer.add("b", torch.zeros(8))
        with pytest.raises(ValueError, match="tensor a was added twice"):
            writer.add("a", torch.zeros(8))
        writer.write_config({})


def test_side_files_are_hashed_too_and_all_modes_are_normal(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "tokenizer.json").write_text("{}")
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("…", encoding="utf-8")
    for path in (source / "tokenizer.json", source / "additional_chat_templates" / "tool_use.jinja"):
        path.chmod(0o400)
    mask = os.umask(0o077)
    try:
        with CheckpointWriter(tmp_path / "out") as writer:
            writer.add("a", torch.zeros(8))
            writer.write_config({"own": 1})
            writer.copy_side_files(source)
    finally:
        os.umask(mask)
    out = tmp_path / "out"
    ours = {"model.safetensors", "config.json", "spense_manifest.json"}
    assert names(out) == {"tokenizer.json", "additional_chat_templates", *ours}
    assert set(read_manifest(out)) >= {"tokenizer.json", "additional_chat_templates/tool_use.jinja"}
    assert {p.stat().st_mode & 0o777 for p in (out, *out.rglob("*")) if p.is_dir()} == {0o755}
    assert {p.stat().st_mode & 0o777 for p in out.rglob("*") if p.is_file()} == {0o644}
    check_manifest(out)
