"""Damaged checkpoints: each is refused with a clear message, by the tools and by the vLLM plugin.

Every case damages a copy of one valid checkpoint. ``rehash`` cases then get a manifest that matches the
damage, so that the structure and the values are found wrong on their own, not by their hash.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.format.corruption_cases import CASES, HASH, VALUE, Case
from tests.format.corruption_tools import CONFIG, GATE, WEIGHTS, number
from vllm_spense.format import Checkpoint, CheckpointError, CheckpointWriter
from vllm_spense.format.manifest import check_manifest, write_manifest
from vllm_spense.format.validate import check_checkpoint, check_values


@pytest.fixture(scope="module")
def sharded(tiny_spense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in three weight files."""
    out = tmp_path_factory.mktemp("sharded") / "spense"
    tensors = load_file(tiny_spense / WEIGHTS)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with CheckpointWriter(out, max_shard_bytes=int(size * 0.41)) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.write_config(json.loads((tiny_spense / CONFIG).read_text()))
    return out


@pytest.fixture
def damaged(tiny_spense: Path, sharded: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a damaged copy; ``rehash`` overrules the case's own wish."""

    def make(case: Case, rehash: bool | None = None) -> Path:
        directory = tmp_path / "copy"
        shutil.copytree(sharded if case.sharded else tiny_spense, directory)
        case.damage(directory)
        if case.rehash if rehash is None else rehash:
            write_manifest(directory)
        return directory

    return make


def use_tools(directory: Path) -> None:
    """What `spense verify` does with the files."""
    checkpoint = Checkpoint(directory)
    check_checkpoint(checkpoint)
    check_manifest(directory)


@pytest.fixture(scope="module")
def start_plugin() -> Callable[[Path], None]:
    """What vLLM does with the plugin before it loads a tensor."""
    pytest.importorskip("vllm")
    from vllm_spense.serving.config import SpenseConfig

    def start(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        SpenseConfig.from_config(config["quantization_config"]).maybe_update_config(str(directory))

    return start


def check_all_values(checkpoint: Checkpoint) -> None:
    """What the plugin does with every module's tensors once they are loaded."""
    for module in checkpoint.require_spense().modules:
        check_values(checkpoint.module_tensors(module), checkpoint.linear(module).codecs, module=module)


def select(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.at in kinds])


@pytest.mark.parametrize("which", ["one file", "sharded"])
def test_the_undamaged_checkpoints_are_accepted(
    which: str, tiny_spense: Path, sharded: Path, start_plugin: Callable[[Path], None]
) -> None:
    directory = sharded if which == "sharded" else tiny_spense
    assert len(list(directory.glob("*.safetensors"))) == (3 if which == "sharded" else 1)
    use_tools(directory)
    start_plugin(directory)


@select("start", "values", "plain", "tools")
def test_tools_refuse(name: str, damaged: Callable[..., Path]) -> None:
    directory = damaged(CASES[name])
    with pytest.raises(CheckpointError, match=CASES[name].message) as caught:
        use_tools(directory)
    assert "Fix: " in str(caught.value)


@select("start")
def test_plugin_refuses_at_start(
    name: str, damaged: Callable[..., Path], start_plugin: Callable[[Path], None]
) -> None:
    directory = damaged(CASES[name])
    with pytest.raises(CheckpointError, match=CASES[name].message) as caught:
        start_plugin(directory)
    assert "Fix: " in str(caught.value)


@select("values", "plain")
def test_plugin_refuses_changed_values_by_their_hash(
    name: str, damaged: Callable[..., Path], start_plugin: Callable[[Path], None]
) -> None:
    with pytest.raises(CheckpointError, match=f"{HASH}|the manifest says"):
        start_plugin(damaged(CASES[name], rehash=False))


@select("values")
def test_plugin_refuses_changed_values_after_loading(
    name: str, damaged: Callable[..., Path], start_plugin: Callable[[Path], None]
) -> None:
    """With a matching manifest the start succeeds, and the check before the first kernel finds it."""
    directory = damaged(CASES[name])
    start_plugin(directory)
    with pytest.raises(CheckpointError, match=CASES[name].message):
        check_all_values(Checkpoint(directory))


def test_there_are_many_distinct_cases() -> None:
    assert len(CASES) >= 100


@pytest.mark.parametrize("region", ["sparse_values", "dense_weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bfloat16_values(tiny_spense_bf16: Path, tmp_path: Path, region: str, value: float) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(tiny_spense_bf16, directory)
    use_tools(directory)
    number(f"{GATE}.{region}", value)(directory)
    write_manifest(directory)
    with pytest.raises(CheckpointError, match=VALUE.format(GATE, region, "NaN or infinity", 5)):
        use_tools(directory)
