"""Directories as people publish them: settings of other machines, unused tensors, weights in two formats.

Each gives the checkpoint of the same model without these, byte for byte, or is refused before any work.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_spense.evaluation import evaluate
from vllm_spense.format import CheckpointError
from vllm_spense.models.export import export
from vllm_spense.models.parts import UnsupportedModelError
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.pruning.plan import plan
from vllm_spense.verification import verify

Edit = Callable[[Path], object]


def settings(**changes: Any) -> Edit:
    """An edit of config.json."""

    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """An edit of the weights."""

    def edit(directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        change(state)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def consolidated(directory: Path) -> None:
    """The weights in Mistral's own format, too; the names in it are other ones."""
    save_file({"layers.0.attention.wq.weight": torch.ones(4, 4)}, directory / "consolidated.safetensors")


def index(directory: Path) -> None:
    """Two shards and an index; beside them a file that it does not name."""
    state = load_file(directory / "model.safetensors")
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (directory / "model.safetensors").rename(directory / "consolidated-00001-of-00001.safetensors")
    save_file({"lora": torch.ones(2, 2)}, directory / "value_head.safetensors")


def code(directory: Path) -> None:
    """Llama with code of its own beside it, as models have that are older than transformers' class."""
    settings(auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"})(directory)
    (directory / "modeling_x.py").write_text("raise SystemExit('foreign code')")


def unused(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)  # from before transformers 4.32
    state["model.layers.2.eh_proj.weight"] = torch.ones(8, 8)  # a layer more: multi-token prediction


FLASH = {"_attn_implementation": "flash_attention_2"}
ACCEPTED: dict[str, tuple[Edit, str | None]] = {
    "output_attentions": (settings(output_attentions=True), None),
    "output_hidden_states": (settings(output_hidden_states=True), None),
    "return_dict": (settings(return_dict=False), None),
    "torchscript": (settings(torchscript=True), None),
    "use_cache": (settings(use_cache=False), None),
    "flash attention": (settings(**FLASH), "config.json: _attn_implementation is not taken over"),
    "attn_implementation": (settings(attn_implementation="flash_attention_2"), "attn_implementation is not"),
    "flash and outputs": (settings(output_attentions=True, **FLASH), "_attn_implementation is not taken"),
    "code": (code, "config.json: auto_map is not taken over"),
    "consolidated": (consolidated, None),
    "index": (index, None),
    "unused": (tensors(unused), r"does not use .*(inv_freq|eh_proj).*: left out"),
}


@pytest.fixture(scope="module")
def options(text_file: Path) -> dict[str, Any]:
    return {"calibration": str(text_file), "num_samples": 2, "seq_len": 64, "refine": 1, "regroup": 0}


@pytest.fixture(scope="module")
def expected(dense_model: Path, options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published") / "model"
    prune(dense_model, out, PruneConfig(**options))
    return out


def made(dense_model: Path, edit: Edit, out: Path) -> Path:
    shutil.copytree(dense_model, out)
    edit(out)
    return out


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize("layout", ACCEPTED)
def test_what_people_publish_gives_the_same_checkpoint(
    layout: str, dense_model: Path, expected: Path, options, text_file: Path, tmp_path: Path
) -> None:
    edit, line = ACCEPTED[layout]
    model = made(dense_model, edit, tmp_path / "model")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prune(model, tmp_path / "out" / "model", PruneConfig(**options))
        plan(model, PruneConfig(**options), "h200")
        dense = evaluate(model, text_file, seq_len=64, max_tokens=256)
    told = [text for w in said if re.search("left out|taken over", text := str(w.message))]
    assert bool(told) == (line is not None)
    assert all(re.search(line, text) for text in told)
    assert weights(tmp_path / "out" / "model") == weights(expected)
    assert dense.nll == evaluate(dense_model, text_file, seq_len=64, max_tokens=256).nll
    verify(tmp_path / "out" / "model")
    found = evaluate(tmp_path / "out" / "model", text_file, seq_len=64, max_tokens=256)
    assert found.nll == evaluate(expected, text_file, seq_len=64, max_tokens=256).nll


def test_config_keeps_what_a_copy_can_keep(dense_model: Path, options, tmp_path: Path) -> None:
    """A user's wishes for the outputs stay; code that is not copied and kernels of one machine do not."""
    wishes = {"output_hidden_states": True, "return_dict": False, "torchscript": True}
    model = made(dense_model, code, tmp_path / "model")
    settings(**wishes, **FLASH, experts_implementation="grouped_mm")(model)
    prune(model, tmp_path / "out", PruneConfig(**options))
    export(tmp_path / "out", tmp_path / "dense", format="bfloat16")
    before = json.loads((dense_model / "config.json").read_text())
    for directory in (tmp_path / "out", tmp_path / "dense"):
        after = json.loads((directory / "config.json").read_text())
        after.pop("quantization_config", None)
        assert after | {"dtype": ""} == before | wishes | {"dtype": ""}
        assert not list(directory.glob("*.py"))


HEAD = "lm_head.weight"
REFUSED: dict[str, tuple[Edit, type[Exception], str]] = {
    "no head": (tensors(lambda s: s.pop(HEAD)), CheckpointError, rf"tensor {HEAD}: .* it is missing"),
    "another head": (
        lambda d: (
            settings(architectures=["LlamaForRewards"], tie_word_embeddings=True)(d),
            tensors(lambda s: s.update({"score.weight": s.pop(HEAD)[:2].contiguous()}))(d),
        ),
        UnsupportedModelError,
        r"is a LlamaForRewards, whose score\.weight a LlamaForCausalLM lacks",
    ),
    "no bias": (
        tensors(lambda s: s.pop("model.layers.1.mlp.down_proj.bias")),
        CheckpointError,
        r"down_proj\.bias: .* it is missing",
    ),
    "two files": (
        lambda d: shutil.copy(d / "model.safetensors", d / "other.safetensors"),
        CheckpointError,
        "other.safetensors: second weight file beside model.safetensors without an index",
    ),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_what_is_refused_is_refused_first(
    layout: str, dense_model: Path, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, kind, message = REFUSED[layout]
    model = made(dense_model, edit, tmp_path / "model")
    monkeypatch.setattr("vllm_spense.format.Checkpoint.load", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(kind, match=message):
        prune(model, tmp_path / "out", PruneConfig(**options))
    with pytest.raises(kind, match=message):
        plan(model, PruneConfig(**options), "h200")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
