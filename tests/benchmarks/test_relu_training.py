"""The training behind the claim, at the size of a test: equal starts, resuming, the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.accuracy import relu_training, small_llama
from benchmarks.accuracy.small_llama import LEARNING_RATE, Plan, learning_rate, make_tokenizer, train
from benchmarks.common.results import read
from tests.tiny_text import write_text
from vllm_spense.evaluation import load_tokenizer
from vllm_spense.text import tokenize

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with ``train.txt`` and ``test.txt``, and models small enough for a test."""
    monkeypatch.setattr(small_llama, "SIZES", small_llama.SIZES | SMALL)
    (tmp_path / "text").mkdir()
    for split in ("train", "test"):
        write_text(tmp_path / "text" / f"{split}.txt", words=6000, vocabulary=40)
    return tmp_path / "text"


def trained(plan: Plan, text: Path, out: Path) -> list[float]:
    tokenizer = make_tokenizer(text / "train.txt")
    return train(
        plan, tokenize(tokenizer, (text / "train.txt").read_text()), tokenizer, out, lambda s: None
    ).losses


def test_training_learns_and_is_the_same_again(text: Path, tmp_path: Path) -> None:
    plan = Plan("relu", 0.0, 0, 40)
    losses = trained(plan, text, tmp_path / "one")
    assert losses[-1] < 0.8 * losses[0]
    assert trained(plan, text, tmp_path / "two") == losses
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(model.model.layers[0].mlp.act_fn).__name__ == "ReLU"
    assert model.config.architectures == ["SparseLlamaForCausalLM"]
    written = (text / "test.txt").read_text()
    tokenizer = load_tokenizer(tmp_path / "one")
    assert tokenizer.decode(tokenize(tokenizer, written)) == written


def test_plans_start_from_the_same_weights(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a change in the one step nothing tells them apart but the seed."""
    monkeypatch.setattr(small_llama, "LEARNING_RATE", 0.0)
    found = {}
    for plan in (Plan("silu", 0.0, 0, 1), Plan("relu", 1.0, 0, 1), Plan("relu", 0.0, 1, 1)):
        trained(plan, text, tmp_path / plan.key)
        found[plan.key] = load_file(tmp_path / plan.key / "model.safetensors")
    silu, relu, other = found.values()
    assert all(torch.equal(silu[name], relu[name]) for name in silu)
    assert not torch.equal(silu["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_learning_rate() -> None:
    rates = [learning_rate(step, 100) for step in range(100)]
    assert max(rates) == rates[4] == rates[5] == LEARNING_RATE
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 * LEARNING_RATE, rel=0.01)


def test_finished_runs_are_kept(text: Path, tmp_path: Path) -> None:
    results, work, plan = tmp_path / "results.json", tmp_path / "work", Plan("relu", 0.01, 0, 20)
    relu_training.measure(plan, text, work, results)
    first = read(results)
    weights = work / "relu-0.01-0-20" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    entry = first["measured"][plan.key]
    assert 0 < entry["density"] < 0.6
    assert len(entry["layers"]) == 2
    assert entry["loss"] < 7.7
    relu_training.measure(plan, text, work, results)
    assert read(results) == first
    weights.unlink()
    relu_training.measure(plan, text, work, results)
    assert weights.stat().st_mtime_ns != stamp
    assert read(results)["measured"][plan.key]["loss"] == entry["loss"]


def figures(loss: float, density: float) -> dict[str, Any]:
    layers = [{"neurons": 1024, "density": density * part, "dead": 3} for part in (0.5, 1.5)]
    return {"loss": loss, "density": density, "dead": 0.25, "layers": layers}


def test_the_table() -> None:
    plans = relu_training.plans(0)
    entries = {plans["silu"].key: figures(4.0, 1.0), plans["relu"].key: figures(4.01, 0.4)}
    name = list(plans)[2]
    entries[plans[name].key] = figures(4.02, 0.05)
    entries["relu/0/7"] = figures(9.0, 0.9)  # a trial of another length
    lines = relu_training.report({"measured": entries}).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["SiLU", "ReLU", relu_training.label(name)]
    cells = [cell.strip() for cell in lines[2].split("|")[2:-1]]
    assert cells == ["0", "4.0200", "+0.0200", "+0.0100", "5.0%", "51 of 1024", "2.5 7.5", "25.0%"]
    assert "–" in lines[0]
    assert relu_training.report({}).count("\n") == 1
    controls = {f"{plans['relu'].key}/0.001": figures(5.0, 0.3)}
    lines = relu_training.report({"measured": entries | controls}, 1e-3).splitlines()[2:]
    assert len(lines) == 1
    assert "| 5.0000 | – | – |" in lines[0]


def test_other_learning_rates_have_names_of_their_own() -> None:
    plan = Plan("relu", 0.0, 3, 1500)
    assert relu_training.key_of(plan, LEARNING_RATE) == "relu/3/1500"
    assert relu_training.key_of(plan, 1e-3) == "relu/3/1500/0.001"
