"""The base model's name in card and record, whatever way the path is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.tiny import make_llama
from vllm_spense import PruneConfig, prune
from vllm_spense.sources import BaseModel, base_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("names") / "My-Llama", bias=False, layers=1)


@pytest.mark.parametrize("spelling", [".", "./", "../My-Llama", "../My-Llama/", "{}", "{}/", "{}/."])
def test_a_folder_is_called_by_its_name(llama: Path, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama)
    assert base_model(Path(spelling.format(llama))) == BaseModel("My-Llama")


def test_a_link_keeps_its_name(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(llama)
    assert base_model(tmp_path / "current").name == "current"


def test_a_snapshot_of_the_cache(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--org--My-Llama-2" / "snapshots" / COMMIT
    shutil.copytree(llama, snapshot)
    expected = BaseModel("org/My-Llama-2", COMMIT)
    assert base_model(snapshot) == expected
    monkeypatch.chdir(snapshot)
    assert base_model(Path()) == expected
    os.symlink(snapshot, tmp_path / "link")
    assert base_model(tmp_path / "link") == expected
    (snapshot.parents[1]).rename(tmp_path / "hub" / "models--gpt2")  # the old names without an organisation
    assert base_model(tmp_path / "hub" / "models--gpt2" / "snapshots" / COMMIT).name == "gpt2"


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("org/my-llama", "org/my-llama"),
        ("org/Other", "My-Llama"),  # what it was tuned from
        ("/home/me/My-Llama", "My-Llama"),
        ("../My-Llama", "My-Llama"),
        (7, "My-Llama"),
    ],
)
def test_name_or_path_may_know_the_hub(llama: Path, said: object, name: str, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "My-Llama")
    raw = json.loads((llama / "config.json").read_text())
    (tmp_path / "My-Llama" / "config.json").write_text(json.dumps(raw | {"_name_or_path": said}))
    assert base_model(tmp_path / "My-Llama") == BaseModel(name)


def provenance_of(directory: Path) -> dict[str, str]:
    config = json.loads((directory / "config.json").read_text())
    found: dict[str, str] = config["quantization_config"]["provenance"]
    return found


def test_card_and_record_say_it(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama)
    config = PruneConfig(preset="magnitude", dense_ratio=0.5)
    prune(".", tmp_path / "out", config)
    provenance = provenance_of(tmp_path / "out")
    assert provenance["base_model"] == "My-Llama"
    assert "base_revision" not in provenance
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nbase_model: My-Llama\n" in card
    assert "| base model | My-Llama |" in card
    snapshot = tmp_path / "models--org--a b: c" / "snapshots" / COMMIT
    shutil.copytree(llama, snapshot)
    prune(snapshot, tmp_path / "second", config)
    provenance = provenance_of(tmp_path / "second")
    assert (provenance["base_model"], provenance["base_revision"]) == ("org/a b: c", COMMIT)
    card = (tmp_path / "second" / "README.md").read_text()
    assert '\nbase_model: "org/a b: c"\n' in card  # YAML would read a mapping
    assert f"| base model | org/a b: c at commit {COMMIT} |" in card
    assert "--reference 'org/a b: c'\n" in card
