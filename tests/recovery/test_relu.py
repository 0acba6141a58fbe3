"""Relufication on tiny random Llamas: what comes out, what the penalty does, and every way it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny import LAYERS, make_llama, make_spense
from tests.tiny_families import make_family
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.evaluation import load_model
from vllm_spense.evaluation.density import measure_density
from vllm_spense.evaluation.hidden import hidden_values
from vllm_spense.format import Checkpoint, CheckpointError, CheckpointWriter
from vllm_spense.format.manifest import check_manifest
from vllm_spense.recovery import RecoveryConfig, RecoveryError, RecoveryReport, recover
from vllm_spense.recovery.output import write_rest, write_weights
from vllm_spense.recovery.penalty import L1Penalty
from vllm_spense.recovery.student import load_student
from vllm_spense.recovery.training import train
from vllm_spense.text import TextRecord
from vllm_spense.verification import verify

CPU = torch.device("cpu")
WORDS = 32
WINDOWS = torch.randint(0, WORDS, (8, 48), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense``, its pruned version ``pruned``, and ``text.txt``."""
    root = tmp_path_factory.mktemp("relu")
    add_tokenizer(make_llama(root / "dense"))
    make_spense(root / "dense", root / "pruned", codec="bf16")
    write_text(root / "text.txt", vocabulary=WORDS)
    return root


def options(root: Path, **changes: Any) -> RecoveryConfig:
    base = {"calibration": str(root / "text.txt"), "steps": 40, "batch": 2, "seq_len": 48}
    base |= {"learning_rate": 3e-4}
    return RecoveryConfig(**({"activation": "relu"} | base | changes))


@pytest.fixture(scope="module")
def done(root: Path) -> RecoveryReport:
    return recover(root / "dense", root / "out", options(root))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=WINDOWS).logits


def test_it_learns_and_gets_sparse(done: RecoveryReport) -> None:
    before, after = done.held_out
    assert after < 0.9 * before
    assert sum(done.losses[-8:]) < 0.95 * sum(done.losses[:8])
    assert done.density is not None
    assert done.density[0] == pytest.approx(0.5, abs=0.1)


def test_what_config_says(root: Path, done: RecoveryReport) -> None:
    before, after = (json.loads((root / name / "config.json").read_text()) for name in ("dense", "out"))
    assert len(after["sparsity_density"]) == LAYERS
    assert done.density is not None
    assert sum(after["sparsity_density"]) / LAYERS == pytest.approx(done.density[1], abs=1e-4)
    changed = {key for key in before if before[key] != after.get(key)} - {"transformers_version"}
    assert changed == {"hidden_act", "architectures"}
    assert (after["hidden_act"], after["model_type"]) == ("relu", "llama")
    assert after["architectures"] == ["SparseLlamaForCausalLM"]
    card = (root / "out" / "README.md").read_text()
    assert "ReLU in place of SiLU" in card
    assert "penalty of 2e-05" in card
    assert str(root) not in card
    check_manifest(root / "out")


def test_transformers_loads_it_with_relu(root: Path, done: RecoveryReport) -> None:
    """Its own class, with what an MLP of ReLU gates computes."""
    model = AutoModelForCausalLM.from_pretrained(root / "out", dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    mlp, x = model.model.layers[0].mlp, torch.randn(5, model.config.hidden_size)
    expected = mlp.down_proj(mlp.gate_proj(x).clamp_min(0) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(logits(model.eval()), logits(load_model(root / "out")))


@pytest.mark.parametrize("source", ["dense", "pruned"])
def test_what_is_written_is_the_student(source: str, root: Path, tmp_path: Path) -> None:
    checkpoint, config = Checkpoint(root / source), options(root, train="all", steps=4, learning_rate=3e-3)
    student = load_student(checkpoint, config.train, CPU, relu=True)
    train(student, load_model(root / "dense"), WINDOWS, config)
    with CheckpointWriter(tmp_path / "out") as writer:
        write_rest(writer, checkpoint, config, TextRecord("none", "0" * 64))
        write_weights(writer, checkpoint, student, config)
    expected, written = logits(student.model), logits(load_model(tmp_path / "out", activations="none"))
    before = logits(load_student(checkpoint, config.train, CPU, relu=True).model)
    assert (written - expected).norm() < 0.1 * (before - expected).norm()
    silu = logits(load_model(root / source, activations="none"))
    assert (written - expected).norm() < 0.1 * (silu - expected).norm()


def test_zeros_of_a_pruned_checkpoint_stay(root: Path, tmp_path: Path) -> None:
    report = recover(root / "pruned", tmp_path / "out", options(root), root / "dense")
    verify(tmp_path / "out")
    before, after = Checkpoint(root / "pruned"), Checkpoint(tmp_path / "out")
    assert after.config["hidden_act"] == "relu"
    for module, spec in before.require_spense().modules.items():
        if spec.sparse:
            old, new = before.module_tensors(module), after.module_tensors(module)
            assert torch.equal(old["sparse_meta"], new["sparse_meta"])
            zeros = before.module_weight(module) == 0
            assert zeros.float().mean() > 0.2
            assert not after.module_weight(module)[zeros].any()
    entry = after.require_spense().provenance["recovery"][0]
    assert (entry["activation"], entry["l1"]) == ("relu", 2e-5)
    assert report.held_out[1] < report.held_out[0]
    assert measure_density(load_model(tmp_path / "out"), WINDOWS).mean < 0.7


def test_what_is_not_trained_keeps_every_bit(root: Path, done: RecoveryReport) -> None:
    before, after = (load_file(root / name / "model.safetensors") for name in ("dense", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    mlps = {f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(LAYERS) for p in ("gate", "up", "down")}
    assert changed >= mlps
    assert all("mlp" in name or "norm" in name for name in changed)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


# -- the penalty ---------------------------------------------------------------------------------


def test_the_penalty_is_its_definition(root: Path) -> None:
    model, penalty = load_model(root / "dense"), L1Penalty()
    seen: list[torch.Tensor] = []

    def see(name: str, hidden: torch.Tensor) -> None:
        seen.append(hidden.detach())
        penalty.see(name, hidden)

    with hidden_values(model, see):
        model(input_ids=WINDOWS)
    tokens = WINDOWS.numel()
    expected = sum(float(hidden.abs().sum()) / tokens for hidden in seen) / LAYERS
    assert float(penalty.take().detach()) == pytest.approx(expected, rel=1e-5)
    with hidden_values(model, penalty.see):
        model(input_ids=WINDOWS[:1])
    assert float(penalty.take().detach()) != pytest.approx(
        expected, rel=1e-5
    )  # nothing is left of the call before


def test_a_stronger_penalty_leaves_less(root: Path, tmp_path: Path) -> None:
    density = []
    for l1 in (0.0, 1e-2, 1e-1):
        report = recover(root / "dense", tmp_path / f"{l1}", options(root, l1=l1, learning_rate=1e-3))
        assert report.density is not None
        density.append(report.density[1])
        measured = measure_density(load_model(tmp_path / f"{l1}"), WINDOWS).mean
        assert measured == pytest.approx(report.density[1], abs=0.05)
    assert density[0] > density[1] > density[2]
    assert density[2] < 0.9 * density[0]


def test_a_step_descends_loss_and_penalty(root: Path) -> None:
    """The gradient of one step against plain autograd on the whole."""
    config = options(root, steps=1, batch=2, l1=0.05)
    dense = load_model(root / "dense")
    student = load_student(Checkpoint(root / "dense"), "mlp", CPU, relu=True)
    twin = load_student(Checkpoint(root / "dense"), "mlp", CPU, relu=True)
    losses = train(student, dense, WINDOWS[:2], config)

    total, divergence = torch.zeros(()), torch.zeros(())
    for window in WINDOWS[:2]:
        hidden: list[torch.Tensor] = []
        with hidden_values(twin.model, lambda name, h, hidden=hidden: hidden.append(h)):
            p, q = (m(input_ids=window[None]).logits[0, :-1].softmax(-1) for m in (dense, twin.model))
        kl = (p.detach() * (p.detach() / q).log()).sum(-1).mean() / 2
        l1 = torch.stack([h.abs().sum(-1).mean() for h in hidden]).mean() / 2
        total, divergence = total + kl + 0.05 * l1, divergence + kl
    assert losses[0] == pytest.approx(float(divergence.detach()), rel=1e-4)
    total.backward()
    theirs = [parameter.grad for parameter in student.parameters]
    ours = [parameter.grad for parameter in twin.parameters]
    norm = torch.stack([g.norm() for g in ours if g is not None]).norm()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine is not None
        assert other is not None
        torch.testing.assert_close(other, mine / max(1.0, float(norm)), rtol=1e-3, atol=1e-6)


# -- refusals ------------------------------------------------------------------------------------


def test_the_guard_compares_with_relu(root: Path, tmp_path: Path) -> None:
    """A run may end far worse than the SiLU model, whose loss is zero, but no worse than it began."""
    report = recover(root / "dense", tmp_path / "out", options(root, steps=1, learning_rate=1e-4))
    assert report.held_out[1] > 0.05
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RecoveryError, match=r"rose from .* nothing was written"):
        recover(root / "dense", tmp_path / "bad", options(root, steps=4, learning_rate=1.0))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["gemma3_text", "opt", "mistral"])
def test_other_families_are_refused(kind: str, root: Path, tmp_path: Path) -> None:
    model = add_tokenizer(make_family(kind, tmp_path / "model"))
    with pytest.raises(CheckpointError, match="takes Llama models"):
        recover(model, tmp_path / "out", options(root))
    assert not (tmp_path / "out").exists()


def test_a_relu_model_needs_its_teacher(root: Path, done: RecoveryReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--dense MODEL"):
        recover(root / "out", tmp_path / "again", options(root))
    report = recover(root / "out", tmp_path / "again", options(root, learning_rate=1e-4), root / "dense")
    assert report.held_out[0] == pytest.approx(done.held_out[1], rel=0.3)


def test_a_dense_model_needs_the_activation(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no Spense checkpoint"):
        recover(root / "dense", tmp_path / "out", options(root, activation=None), root / "dense")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": None, "l1": 1e-5}, "needs --activation relu"),
        ({"l1": -1.0}, "greater than or equal to 0"),
        ({"l1": float("inf")}, "finite"),
        ({"l1": float("nan")}, "l1"),
        ({"activation": "gelu"}, "relu"),
    ],
)
def test_options(wrong: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        options(root, **wrong)


def test_records_from_before_stay_as_they_were(root: Path) -> None:
    plain = options(root, activation=None).decisive()
    assert "activation" not in plain
    assert "l1" not in plain
    assert options(root).decisive()["l1"] == 2e-5
    assert options(root, l1=0.0).penalty == 0.0


def test_command(root: Path, tmp_path: Path) -> None:
    given = [
        "--activation",
        "relu",
        "--l1",
        "1e-4",
        "--calibration",
        root / "text.txt",
        "-o",
        tmp_path / "out",
    ]
    given += ["--steps", "2", "--seq-len", "32", "--dense", root / "dense"]
    command = [sys.executable, "-m", "vllm_spense.cli.app", "recover", root / "dense", *given]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"not zero: \d+\.\d% before, \d+\.\d% after", " ".join(done.stdout.split()))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_act"] == "relu"
