"""Perplexity and the loading of dense and Spense directories."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_llama, make_spense
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.evaluation import evaluate, load_model, load_tokenizer
from vllm_spense.evaluation.loading import StoredLinear
from vllm_spense.format import Checkpoint, CheckpointError
from vllm_spense.models.export import export
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.verification import verify


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_llama(tmp_path_factory.mktemp("evaluation") / "dense"))


@pytest.fixture(scope="module")
def spense(dense: Path) -> Path:
    return make_spense(dense, dense.parent / "spense")


@pytest.fixture(scope="module")
def text(dense: Path) -> Path:
    return write_text(dense.parent / "text.txt", 100)


@torch.inference_mode()
def logits(directory: Path, ids: torch.Tensor, **options) -> torch.Tensor:
    return load_model(directory, **options)(ids).logits


def test_perplexity_by_hand(dense: Path, text: Path) -> None:
    """100 tokens hold three windows of 32; the last four tokens are not scored."""
    seen: list[tuple[int, int]] = []
    result = evaluate(dense, text, seq_len=32, max_tokens=1000, progress=lambda *step: seen.append(step))
    ids = [int(word[1:]) for word in text.read_text().split()]
    scores = []
    for start in (0, 32, 64):
        window = torch.tensor(ids[start : start + 32])
        probabilities = logits(dense, window[None])[0].double().softmax(-1)
        scores += [-math.log(probabilities[i, window[i + 1]]) for i in range(31)]
    assert result.tokens == len(scores) == 93
    assert result.nll == pytest.approx(sum(scores) / 93, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    fewer = evaluate(dense, text, seq_len=32, max_tokens=95)
    assert fewer.tokens == 62


def test_spense_weights_only_equals_the_decompressed_model(dense: Path, spense: Path, tmp_path: Path) -> None:
    twin = export(spense, tmp_path / "twin", format="float32")
    ids = torch.arange(48)[None]
    expected = logits(twin, ids)
    torch.testing.assert_close(logits(spense, ids, activations="none"), expected, rtol=1e-3, atol=1e-3)
    distance = (logits(dense, ids) - expected).norm() / expected.norm()
    assert distance > 0.1  # negative control: the unpruned model is another one


def test_activation_quantisation_is_on_by_default(spense: Path) -> None:
    ids = torch.arange(48)[None]
    quantised, plain = logits(spense, ids), logits(spense, ids, activations="none")
    difference = float((quantised - plain).norm() / plain.norm())
    assert 0.005 < difference < 0.5


def test_stored_linear_is_w8a8(spense: Path) -> None:
    """One layer against the arithmetic written out."""
    name = "model.layers.0.mlp.down_proj"
    checkpoint = Checkpoint(spense)
    layer = load_model(spense).get_submodule(name)
    assert isinstance(layer, StoredLinear)
    x = torch.randn(2, 5, layer.weight.shape[1])
    scale = x.abs().amax(-1, keepdim=True) / 448
    rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
    expected = rounded @ checkpoint.module_weight(name).t()
    expected += checkpoint.load(f"{name}.bias").float()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_stored_linear_in_int8_is_exact(dense: Path, tmp_path: Path) -> None:
    """One layer against whole numbers: sums, then scales and bias, and nothing is rounded else."""
    name = "model.layers.0.mlp.down_proj"
    checkpoint = Checkpoint(make_spense(dense, tmp_path / "spense", codec="int8"))
    layer = load_model(checkpoint.directory).get_submodule(name)
    x = torch.randn(2, 5, layer.weight.shape[1])
    scale = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x * (1 / scale)).round().long()
    values, row_scale = checkpoint.linear(name).values(checkpoint.module_tensors(name))
    sums = (rounded @ values.long().t()).float()
    assert torch.equal(layer(x), sums * scale * row_scale + checkpoint.load(f"{name}.bias").float())
    plain = load_model(checkpoint.directory, activations="none").get_submodule(name)
    assert 0 < (plain(x) - layer(x)).norm() / plain(x).norm() < 0.02


def test_int8_from_pruning_to_what_others_load(dense: Path, text: Path, tmp_path: Path) -> None:
    """Prune, verify, evaluate, export; the twin is as good to the last bit, the weights in fp32 nearly."""
    config = PruneConfig(preset="magnitude", dense_ratio=0.5, weight_dtype="int8", alignment=16)
    spense = prune(dense, tmp_path / "spense", config).directory
    assert verify(spense).modules == 14
    assert json.loads((spense / "config.json").read_text())["quantization_config"]["codec"] == "int8"
    assert (
        "| weights | INT8 (symmetric, one scale per output channel) |" in (spense / "README.md").read_text()
    )
    found = evaluate(spense, text, seq_len=32)
    twin = export(spense, tmp_path / "twin", format="spense-dense")
    plain = export(spense, tmp_path / "plain", format="float32")
    assert evaluate(twin, text, seq_len=32).nll == found.nll
    unrounded = evaluate(plain, text, seq_len=32).nll  # the same weights, activations as they are
    assert 1e-4 < abs(unrounded - found.nll) < 0.05


def test_bf16_spense_loads_without_scales(dense: Path, tmp_path: Path) -> None:
    spense = make_spense(dense, tmp_path / "spense", codec="bf16")
    twin = export(spense, tmp_path / "twin", format="float32")
    ids = torch.arange(48)[None]
    torch.testing.assert_close(logits(spense, ids), logits(twin, ids), rtol=1e-3, atol=1e-3)


def test_text_errors(dense: Path, text: Path) -> None:
    with pytest.raises(ValueError, match="100 tokens, fewer than one window of 512"):
        evaluate(dense, text)
    with pytest.raises(ValueError, match="holds no window of 512"):
        evaluate(dense, text, max_tokens=100)
    with pytest.raises(ValueError, match=r"missing\.txt: no such text file"):
        evaluate(dense, text.parent / "missing.txt")


def test_lost_and_unknown_tensors_are_refused(spense: Path, tmp_path: Path) -> None:
    state = load_file(spense / "model.safetensors")
    for name, change in (
        ("model.norm.weight", lambda s: s.pop("model.norm.weight")),
        ("model.extra", lambda s: s.update({"model.extra": torch.ones(2)})),
    ):
        broken = tmp_path / name
        shutil.copytree(spense, broken)
        changed = dict(state)
        change(changed)
        save_file(changed, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_model(broken)


def test_extents_that_do_not_fit_the_model(spense: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(spense, broken)
    config = json.loads((broken / "config.json").read_text())
    config["intermediate_size"] = 200
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"down_proj.*shape \[144, 200\].*\[144, 208\]"):
        load_model(broken)


def test_tokenizer_comes_from_the_directory(dense: Path) -> None:
    assert load_tokenizer(dense)("w3 w1")["input_ids"] == [3, 1]


# -- what the files lack, and what they hold beside the model ------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"


def edited(dense: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(dense, out)
    state = load_file(dense / "model.safetensors")
    edit(state)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


DAMAGE = {
    "missing": (lambda s: s.pop(UP), rf"tensor {UP}: the model .* needs this tensor, and it is missing"),
    "no head": (lambda s: s.pop("lm_head.weight"), r"tensor lm_head\.weight: .* it is missing"),
    "no bias": (lambda s: s.pop("model.layers.0.self_attn.q_proj.bias"), r"q_proj\.bias: .* it is missing"),
    "shape": (lambda s: s.update({UP: s[UP][:-4].contiguous()}), rf"{UP}: shape \[204, 144\].*\[208, 144\]"),
}


@pytest.mark.parametrize("as_reference", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_dense_model_that_is_not_whole_is_never_scored(
    damage: str, as_reference: bool, dense: Path, spense: Path, text: Path, tmp_path: Path, capfd
) -> None:
    """transformers fills what is missing with random numbers and goes on."""
    edit, message = DAMAGE[damage]
    broken = edited(dense, tmp_path / "broken", edit)
    model, reference = (spense, broken) if as_reference else (broken, None)
    with pytest.raises(CheckpointError, match=message) as caught:
        evaluate(model, text, seq_len=32, reference=reference)
    assert str(broken) in str(caught.value)
    assert "MISSING" not in "".join(capfd.readouterr()), "transformers' table would hide the one line"


def test_unused_tensors_are_named_in_one_line(dense: Path, text: Path, tmp_path: Path) -> None:
    def add(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.2.mlp.up_proj.weight"] = torch.ones(4, 4)  # of a layer more than there are
        state["model.mtp.norm.weight"] = torch.ones(4)

    more = edited(dense, tmp_path / "more", add)
    with pytest.warns(UserWarning, match=r"use 2 tensors \(model\.layers\.2\.mlp\S+, …\): left out") as said:
        found = evaluate(more, text, seq_len=32)
    assert len([w for w in said if "left out" in str(w.message)]) == 1
    assert found.nll == evaluate(dense, text, seq_len=32).nll
