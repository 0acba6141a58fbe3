"""``recover`` on tiny random models: what it trains, what it leaves alone, and every way it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import make_llama, make_spense
from tests.tiny_families import make_family
from tests.tiny_text import add_tokenizer
from vllm_spense.evaluation import load_model
from vllm_spense.format import Checkpoint, CheckpointError, CheckpointWriter
from vllm_spense.models.export import export
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.recovery import RecoveryConfig, RecoveryError, RecoveryProgress, recover, training
from vllm_spense.recovery.output import round_stochastically, write_rest, write_weights
from vllm_spense.recovery.student import load_student
from vllm_spense.recovery.training import learning_rate, train
from vllm_spense.text import TextRecord
from vllm_spense.verification import verify

CPU = torch.device("cpu")
DTYPES = ("bf16", "fp8")
WORDS = 32  # of the vocabulary's 512: few enough that some steps teach something about other windows
HELD_OUT = torch.randint(0, WORDS, (4, 64), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense``, its pruned versions ``bf16`` and ``fp8``, and ``text.txt``."""
    root = tmp_path_factory.mktemp("recovery")
    add_tokenizer(make_llama(root / "dense"))
    for name in DTYPES:
        make_spense(root / "dense", root / name, codec=name)
    numbers = torch.randint(0, WORDS, (4000,), generator=torch.Generator().manual_seed(6)).tolist()
    (root / "text.txt").write_text(" ".join(f"w{number}" for number in numbers))
    return root


@pytest.fixture(scope="module")
def recovered(root: Path) -> dict[str, Path]:
    """A finished run by weight dtype; ``all`` is bf16 with attention trained, too."""
    for name in DTYPES:
        recover(root / name, root / f"{name}-out", options(root), root / "dense")
    recover(root / "bf16", root / "all-out", options(root, train="all"), root / "dense")
    return {name: root / f"{name}-out" for name in (*DTYPES, "all")}


def options(root: Path, **changes: Any) -> RecoveryConfig:
    base = {
        "calibration": str(root / "text.txt"),
        "steps": 4,
        "batch": 2,
        "seq_len": 64,
        "learning_rate": 5e-4,
    }
    return RecoveryConfig(**(base | changes))


def kept(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    """Boolean [N, K]: all of D, and in S what the stored metadata points at, decoded bit by bit."""
    layout, tensors = checkpoint.layout(module), checkpoint.module_tensors(module)
    mask = torch.ones(layout.out_features, layout.in_features, dtype=torch.bool)
    rows, columns = layout.sparse_shape
    mask[:rows, :columns] = False
    for row in range(rows if layout.sparse else 0):
        for group in range(columns // 4):
            nibble = int(tensors["sparse_meta"][row, group // 2]) >> 4 * (group % 2)
            mask[row, 4 * group + (nibble & 3)] = True
            mask[row, 4 * group + (nibble >> 2 & 3)] = True
    return mask


def divergence(model: torch.nn.Module, dense: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """KL(dense ‖ model) per next token, from its definition."""
    p, q = (m(input_ids=windows).logits[:, :-1].softmax(-1) for m in (dense, model))
    return (p * (p / q).log()).sum(-1).mean()


def gap(directory: Path, dense: Path) -> float:
    with torch.no_grad():
        return float(divergence(load_model(directory, activations="none"), load_model(dense), HELD_OUT))


# -- what changes and what does not --------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16", "fp8", "all"])
def test_zeros_and_layouts_stay(name: str, root: Path, recovered: dict[str, Path]) -> None:
    verify(recovered[name])
    before, after = Checkpoint(root / name.replace("all", "bf16")), Checkpoint(recovered[name])
    assert after.require_spense().modules == before.require_spense().modules
    assert after.require_spense().tensor_parallel_sizes == before.require_spense().tensor_parallel_sizes
    assert after.tensors.keys() == before.tensors.keys()
    for tensor, info in before.tensors.items():
        assert (after.tensors[tensor].dtype, after.tensors[tensor].shape) == (info.dtype, info.shape)
    for module, spec in before.require_spense().modules.items():
        old, new = before.module_tensors(module), after.module_tensors(module)
        if spec.sparse:
            assert torch.equal(old["sparse_meta"], new["sparse_meta"])
            changed = (old["sparse_values"].float() != new["sparse_values"].float()).float().mean()
            assert changed > (0.05 if name == "fp8" else 0.5)


@pytest.mark.parametrize("name", ["bf16", "fp8", "all"])
def test_the_rest_keeps_every_bit(name: str, root: Path, recovered: dict[str, Path]) -> None:
    before, after = (
        load_file(directory / "model.safetensors")
        for directory in (root / name.replace("all", "bf16"), recovered[name])
    )
    differing = {n for n in before if not torch.equal(bits(before[n]), bits(after[n]))}
    modules = {n.rpartition(".")[0] for n in differing}
    trained = {f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")}
    trained |= {f"model.layers.{i}.{n}_layernorm" for i in range(2) for n in ("input", "post_attention")}
    if name == "all":
        trained |= {f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"}
    assert modules == trained | {"model.norm"}
    assert not any(n.endswith("bias") for n in differing)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_it_comes_closer_to_the_dense_model(weight_dtype: str, root: Path, tmp_path: Path) -> None:
    config = options(root, steps=30, learning_rate=3e-3)
    report = recover(root / weight_dtype, tmp_path / "out", config, root / "dense")
    before, after = gap(root / weight_dtype, root / "dense"), gap(tmp_path / "out", root / "dense")
    assert after < 0.9 * before
    assert len(report.losses) == 30
    assert report.held_out == pytest.approx((before, after), rel=0.2)  # of other windows
    assert report.losses[0] == pytest.approx(before, rel=0.2)  # of other windows
    assert sum(report.losses[-5:]) < 0.9 * sum(report.losses[:5])


def test_equal_runs_give_equal_bytes(root: Path, recovered: dict[str, Path], tmp_path: Path) -> None:
    one = recover(root / "bf16", tmp_path / "same", options(root), root / "dense")
    two = recover(root / "bf16", tmp_path / "other", options(root, seed=8), root / "dense")
    assert one.losses != two.losses
    files = [d / "model.safetensors" for d in (recovered["bf16"], tmp_path / "same", tmp_path / "other")]
    first, same, other = (file.read_bytes() for file in files)
    assert first == same
    assert first != other


def test_provenance_and_card(root: Path, recovered: dict[str, Path], tmp_path: Path) -> None:
    recover(recovered["bf16"], tmp_path / "twice", options(root, objective="tokens", steps=1))
    entries = Checkpoint(tmp_path / "twice").require_spense().provenance["recovery"]
    assert [e["objective"] for e in entries] == ["distill", "tokens"]
    assert [e["tokens"] for e in entries] == [4 * 2 * 64, 2 * 64]
    assert entries[0]["text"]["source"] == "text.txt"
    assert "calibration" not in entries[0]
    card = (tmp_path / "twice" / "README.md").read_text()
    assert card.count("## Recovery") == 2
    assert "text.txt" in card
    assert str(tmp_path) not in (tmp_path / "twice" / "config.json").read_text() + card
    assert (tmp_path / "twice" / "tokenizer.json").is_file()


# -- one step against plain autograd -------------------------------------------------------------


@pytest.mark.parametrize("objective", ["both", "distill", "tokens"])
def test_steps_equal_adamw_on_plain_autograd(
    objective: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two windows, on the exported model, with AdamW written out and the zeros put back."""
    monkeypatch.setattr(training, "MAX_NORM", 0.1)
    export(root / "fp8", tmp_path / "plain", format="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(root / "dense", dtype=torch.float32)
    checkpoint = Checkpoint(root / "fp8")
    student = load_student(checkpoint, "mlp", CPU)
    teacher = None if objective == "tokens" else dense
    config = options(root, steps=2, batch=2, objective=objective)
    losses = train(student, teacher, HELD_OUT, config)

    named = {n: p for n, p in plain.named_parameters() if "mlp" in n or "norm" in n}
    named = {n: p for n, p in named.items() if not n.endswith("bias")}
    assert len(named) == len(student.trained)
    masks = {f"{m}.weight": kept(checkpoint, m) for m in checkpoint.require_spense().modules}
    m, v = ({n: torch.zeros_like(p) for n, p in named.items()} for _ in range(2))
    for t, windows in enumerate(HELD_OUT.split(2), start=1):
        loss = loss_of(plain, dense, windows, objective)
        assert losses[t - 1] == pytest.approx(float(loss.detach()), rel=1e-4)
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        gradients = {n: g * masks.get(n, torch.ones_like(g)) for n, g in gradients.items()}
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        assert norm > 0.1
        for n, p in named.items():
            g = gradients[n] * 0.1 / norm
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.95 * v[n] + 0.05 * g * g
            step = (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.95**t)).sqrt() + 1e-8)
            p.data -= learning_rate(t - 1, config) * step
    got = {n: value for trained in student.trained for n, value in trained.values()}
    start = dict(load_student(checkpoint, "mlp", CPU).model.named_parameters())
    for name, parameter in named.items():
        mine = got.get(name, got.get(name.removesuffix(".weight")))
        assert mine is not None
        moved = (parameter - start[name]).abs()
        assert (mine - parameter).abs().mean() < 1e-3 * moved.mean()
        if name in masks:
            assert int((~masks[name]).sum()) > 0 or "down" not in name
            assert not mine[~masks[name]].any()


def loss_of(model: Any, dense: Any, windows: torch.Tensor, objective: str) -> torch.Tensor:
    chosen = model(input_ids=windows).logits[:, :-1].softmax(-1).gather(-1, windows[:, 1:, None])
    surprise = -chosen.log().mean()
    if objective == "tokens":
        return surprise
    distance = divergence(model, dense, windows)
    return distance if objective == "distill" else 0.5 * distance + 0.5 * surprise


def test_learning_rate() -> None:
    config = RecoveryConfig(calibration="x", steps=20, learning_rate=1e-3)
    rates = [learning_rate(step, config) for step in range(20)]
    assert rates[:2] == pytest.approx([5e-4, 1e-3])
    assert rates[1:3] == pytest.approx([1e-3, 1e-3])
    assert rates[11] == pytest.approx(5e-4)
    assert sorted(rates[2:], reverse=True) == rates[2:]
    assert 0 < rates[-1] < 1e-5
    assert learning_rate(0, RecoveryConfig(calibration="x", steps=1, learning_rate=1e-3)) == 1e-3


def test_other_windows_than_prunings() -> None:
    assert RecoveryConfig(calibration="x").seed != PruneConfig(calibration="x").seed


# -- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float8_e4m3fn, 2**-3), (torch.int8, 1)]
)
def test_rounding_is_right_on_average(dtype: torch.dtype, step: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for sign in (1, -1):
        value = sign * torch.full((20000,), 1 + step / 10)
        rounded = round_stochastically(value, dtype, generator)
        assert set(rounded.tolist()) == {sign * 1.0, sign * (1 + step)}
        assert (rounded != sign).float().mean() == pytest.approx(0.1, abs=0.01)
    held = (8 * torch.randn(64, 64)).to(dtype).float()
    held[0] = 0
    assert torch.equal(round_stochastically(held, dtype, generator), held)
    assert torch.equal(round_stochastically(held + step, torch.float32, generator), held + step)


@pytest.mark.parametrize(("codec", "factor"), [("fp8", 1.01), ("int8", 1.003)])
def test_a_small_step_survives_rounding(codec: str, factor: float, root: Path, tmp_path: Path) -> None:
    """Most weights move by less than half a step of e4m3 or int8: their sum has to arrive all the same."""
    checkpoint = Checkpoint(make_spense(root / "dense", tmp_path / codec, codec=codec))
    student = load_student(checkpoint, "mlp", CPU)
    names = [name for trained in student.trained for name in trained.parts if "up_proj" in name]
    with torch.no_grad():
        for parameter in student.parameters:
            largest = parameter.abs().amax(-1, keepdim=True)  # stays, and so do scales
            parameter *= torch.where(parameter.abs() < largest, factor, 1)
    config = options(root)
    write(checkpoint, tmp_path / "out", student, config, TextRecord("none", "0" * 64))
    for name in names:
        old, new = (c.module_weight(name) for c in (checkpoint, Checkpoint(tmp_path / "out")))
        assert float((new * old).sum() / (old * old).sum()) == pytest.approx(factor, abs=0.2 * (factor - 1))


def write(checkpoint: Checkpoint, out: Path, student: Any, config: Any, text: TextRecord) -> None:
    with CheckpointWriter(out) as writer:
        write_rest(writer, checkpoint, config, text)
        write_weights(writer, checkpoint, student, config)


# -- families ------------------------------------------------------------------------------------


FAMILIES = ["phi3", "glm4", "gemma2", "gemma4_text", "gemma4_moe", "qwen3_5_text", "falcon_h1", "apertus"]
FAMILIES += ["opt", "phi", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_families(kind: str, weight_dtype: str, root: Path, tmp_path: Path) -> None:
    """What is written is the trained student: parts of fused linears in order, experts as they were."""
    dense = make_family(kind, tmp_path / "dense")
    how = PruneConfig(preset="magnitude", dense_ratio=0.5, weight_dtype=weight_dtype)
    prune(dense, tmp_path / "pruned", how)
    checkpoint = Checkpoint(tmp_path / "pruned")
    config = options(root, train="all", learning_rate=1e-2)
    student = load_student(checkpoint, config.train, CPU)
    windows = HELD_OUT[:, :32].contiguous()
    train(student, load_model(dense), windows.repeat(2, 1), config)
    write(checkpoint, tmp_path / "out", student, config, TextRecord("none", "0" * 64))
    verify(tmp_path / "out")
    with torch.no_grad():
        before, after = (
            load_model(tmp_path / d, activations="none")(windows).logits for d in ("pruned", "out")
        )
        expected = student.model(windows).logits
    tolerance = 0.1 if weight_dtype == "bf16" else 0.35  # rounding: e4m3 has 4 bits less
    assert (after - expected).norm() < tolerance * (before - expected).norm()
    old, new = checkpoint, Checkpoint(tmp_path / "out")
    for name in old.plain_tensors():
        if "experts" in name.split(".") or "embed" in name or name.endswith("bias"):
            assert torch.equal(old.load(name), new.load(name))


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "dense", "error", "message"),
    [
        ({}, None, ValueError, "--dense"),
        ({}, "bf16", ValueError, "Spense checkpoint itself"),
        ({}, "missing", ValueError, "missing"),
        ({}, "tuned", ValueError, "was not pruned from"),
        ({}, "small", ValueError, "was not pruned from"),
        ({"calibration": "missing.txt"}, "dense", ValueError, "no such text file"),
        ({"seq_len": 5000}, "dense", ValueError, "4000 tokens, fewer than one window"),
        ({"learning_rate": 1.0}, "nan", RecoveryError, "step 1 of 4: the loss is nan.* --learning-rate"),
        (
            {"learning_rate": 1.0},
            "dense",
            RecoveryError,
            "rose from .* nothing was written.* --learning-rate",
        ),
    ],
)
def test_refusals_leave_nothing(
    changes: dict[str, Any], dense: str | None, error: type, message: str, root: Path, tmp_path: Path
) -> None:
    if dense in ("tuned", "nan"):
        name = {"tuned": "model.embed_tokens.weight", "nan": "model.layers.1.self_attn.o_proj.weight"}[dense]
        shutil.copytree(root / "dense", tmp_path / dense)
        state = load_file(tmp_path / dense / "model.safetensors")
        state[name][5] = state[name][6] if dense == "tuned" else torch.nan
        save_file(state, tmp_path / dense / "model.safetensors", metadata={"format": "pt"})
    if dense == "small":
        make_family("llama", tmp_path / "small")
    original = None if dense is None else root / dense if (root / dense).exists() else tmp_path / dense
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        recover(root / "bf16", tmp_path / "out", options(root, **changes), original)
    assert sorted(tmp_path.iterdir()) == before


def test_a_teacher_that_is_not_whole_teaches_nothing(root: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    shutil.copytree(root / "dense", tmp_path / "teacher")
    state = load_file(tmp_path / "teacher" / "model.safetensors")
    del state[name]
    save_file(state, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"teacher, tensor {name}: .* it is missing"):
        recover(root / "bf16", tmp_path / "out", options(root), tmp_path / "teacher")
    assert not (tmp_path / "out").exists()


def test_a_dense_directory_is_no_checkpoint_to_recover(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no Spense checkpoint"):
        recover(root / "dense", tmp_path / "out", options(root), root / "dense")
    assert not (tmp_path / "out").exists()


def test_out_in_use(root: Path, recovered: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(recovered["bf16"], tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        recover(root / "bf16", tmp_path / "out", options(root, calibration="unread"), root / "dense")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    config = options(root, overwrite=True, steps=1)
    with pytest.raises(FileExistsError, match="is an input of this command"):
        recover(tmp_path / "out", tmp_path / "out", config, root / "dense")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    recover(root / "bf16", tmp_path / "out", config, root / "dense")
    verify(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"learning_rate": 0}, {"learning_rate": float("nan")}, {"seq_len": 1}, {"lr": 1}]
)
def test_options(wrong: dict[str, Any], root: Path) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        options(root, **wrong)


# -- progress and command ------------------------------------------------------------------------


def test_progress(root: Path, tmp_path: Path) -> None:
    events: list[RecoveryProgress] = []
    report = recover(root / "bf16", tmp_path / "out", options(root), root / "dense", events.append)
    assert [(e.step, e.steps, e.loss) for e in events] == [(i + 1, 4, x) for i, x in enumerate(report.losses)]
    assert events[-1].remaining == 0
    assert all(e.tokens_per_second > 0 and 0 < e.elapsed <= report.seconds for e in events)


def test_command(root: Path, tmp_path: Path) -> None:
    options = ["--steps", "2", "--batch", "1", "--seq-len", "32", "--learning-rate", "1e-3"]
    files = ["--dense", root / "dense", "--calibration", root / "text.txt", "-o", tmp_path / "out"]
    done = spense("recover", root / "fp8", *files, *options)
    assert done.returncode == 0, done.stderr
    assert re.search(r"step +2/2 +loss \d+\.\d{4} +\d+ tokens/s", done.stdout)
    assert "vllm serve" in done.stdout.replace("\n", " ")
    assert re.search(r"not learnt from: \d+\.\d{4} before, \d+\.\d{4} after", done.stdout)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["provenance"]["recovery"][0]["learning_rate"] == 1e-3
    verify(tmp_path / "out")


def spense(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_spense.cli.app", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)
