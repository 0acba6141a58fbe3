"""The first look at a model directory: every kind of unusable one is named, with the cure, on one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.refused_models import FILES, LFS, WEIGHTS, cut, make, sharded, write
from tests.tiny import make_llama
from tests.tiny_text import add_tokenizer
from vllm_spense.evaluation import load_model, load_tokenizer
from vllm_spense.format import Checkpoint, CheckpointError
from vllm_spense.format.broken_files import diagnose
from vllm_spense.pruning.source import source_directory
from vllm_spense.sources import check_source, check_tensors, check_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_llama(tmp_path_factory.mktemp("good") / "llama"))


def check_line(error: BaseException, directory: Path) -> None:
    """One printable line of bounded length that names the directory and the cure."""
    text = str(error)
    assert text.isprintable()
    assert len(text) < 3000
    assert str(directory) in text
    assert ". Fix: " in text


def look_at(directory: Path) -> None:
    check_source(directory)
    check_tensors(Checkpoint(directory))


@pytest.mark.parametrize("kind", FILES)
def test_what_is_refused_by_its_files(kind: str, good: Path, tmp_path: Path) -> None:
    directory = make(FILES[kind], good, tmp_path / "model")
    with pytest.raises(CheckpointError, match=FILES[kind].message) as caught:
        look_at(directory)
    check_line(caught.value, directory)
    evaluated = FILES[kind].evaluated or FILES[kind].message
    with pytest.raises(CheckpointError, match=evaluated):  # `spense eval` says the same of most
        load_model(directory)


@pytest.mark.parametrize("kind", ["gptq", "pointer for the tokenizer", "adapter", "a file"])
def test_it_stands_before_every_other_step(kind: str, good: Path, tmp_path: Path) -> None:
    directory = make(FILES[kind], good, tmp_path / "model")
    for first in (source_directory, load_tokenizer):
        with pytest.raises(CheckpointError, match=FILES[kind].message):
            first(directory)


def test_good_directories_pass(good: Path, tiny_spense: Path, tmp_path: Path) -> None:
    assert check_source(good)["model_type"] == "llama"
    assert check_source(tiny_spense)["quantization_config"]["quant_method"] == "spense"
    check_tensors(Checkpoint(tiny_spense))  # weight_scale is ours there
    many = make(FILES["gptq"], good, tmp_path / "many")
    (many / "config.json").write_bytes((good / "config.json").read_bytes())
    sharded(many)
    (many / "pytorch_model.bin").write_text(LFS)  # what is not read may be a pointer
    (many / "training_args.bin").write_text("x")
    (many / "chat_template.jinja").write_text("")
    check_source(many)
    (tmp_path / "planned").mkdir()
    (tmp_path / "planned" / "config.json").write_bytes((good / "config.json").read_bytes())
    check_source(tmp_path / "planned")


def test_a_directory_without_a_tokenizer(good: Path, tmp_path: Path) -> None:
    check_tokenizer(good)
    bare = make_llama(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"no tokenizer is there \(none of tokenizer\.json") as caught:
        check_tokenizer(bare)
    check_line(caught.value, bare)
    with pytest.raises(CheckpointError, match="no tokenizer is there"):
        load_tokenizer(bare)


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / WEIGHTS)
    assert diagnose(tmp_path / WEIGHTS) is None
    assert diagnose(Path("/dev/zero")) is None


@pytest.mark.parametrize(("edit", "words"), [(write(WEIGHTS, LFS), "Git LFS pointer"), (cut, "ends after")])
def test_spense_checkpoints_say_the_same(edit, words: str, tiny_spense: Path, tmp_path: Path) -> None:
    """`inspect`, `verify`, `export` and the plugin open checkpoints with :class:`Checkpoint`."""
    import shutil

    shutil.copytree(tiny_spense, tmp_path / "copy")
    edit(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(tmp_path / "copy")
