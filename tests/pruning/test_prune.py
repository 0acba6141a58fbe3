"""``prune`` from directory to directory on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pruning.problems import without_encoding
from tests.tiny import INTER, make_llama
from tests.tiny_text import add_tokenizer
from vllm_spense.evaluation import load_model, load_tokenizer
from vllm_spense.format import Checkpoint, CheckpointError, dequantize, quantize_per_channel
from vllm_spense.format.manifest import check_manifest, read_manifest
from vllm_spense.models.parts import UnsupportedModelError
from vllm_spense.pruning import PruneConfig, PruneProgress, prune
from vllm_spense.pruning.solvers.hessian import Hessian, output_error
from vllm_spense.pruning.solvers.solver import Solver
from vllm_spense.text import sample_windows, tokenize

GATE, UP, DOWN = (f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down"))
DENSE = 128  # the multiple of 64 nearest to half of 208 (rounded up)
SPARSE = INTER - DENSE


def options(text: Path | None, **changes: Any) -> PruneConfig:
    calibration = None if text is None else str(text)
    base = {
        "preset": "spensegpt+",
        "calibration": calibration,
        "num_samples": 8,
        "seq_len": 64,
        "weight_dtype": "bf16",
    }
    return PruneConfig(**(base | changes))


def weight(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    return checkpoint.module_weight(module)


def is_24(region: torch.Tensor) -> bool:
    return bool(((region.reshape(region.shape[0], -1, 4) != 0).sum(-1) <= 2).all())


@pytest.fixture(scope="module")
def pruned(dense_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("pruned") / "bf16"
    return prune(dense_model, out, options(text_file)), Checkpoint(out), Checkpoint(dense_model)


def order_of(checkpoint: Checkpoint, source: Checkpoint, layer: int = 0) -> torch.Tensor:
    """A layer's intermediate permutation, found through the biases (which no pruning changes)."""
    gate, up = (n.replace("layers.0", f"layers.{layer}") + ".bias" for n in (GATE, UP))
    before, after = source.load(gate), checkpoint.load(gate)
    same_up = source.load(up), checkpoint.load(up)
    keys = {pair: i for i, pair in enumerate(zip(before.tolist(), same_up[0].tolist(), strict=True))}
    assert len(keys) == INTER
    return torch.tensor([keys[p] for p in zip(after.tolist(), same_up[1].tolist(), strict=True)])


def test_dense_rows_are_identical_and_sparse_rows_are_24(pruned) -> None:
    report, checkpoint, source = pruned
    order = order_of(checkpoint, source)
    assert sorted(order.tolist()) == list(range(INTER))
    assert order.tolist() != list(range(INTER))
    assert order[:SPARSE].tolist() == sorted(order[:SPARSE].tolist())
    assert order[SPARSE:].tolist() == sorted(order[SPARSE:].tolist())
    for module in (GATE, UP):
        after, before = weight(checkpoint, module), source.load(f"{module}.weight")[order].float()
        assert torch.equal(after[SPARSE:], before[SPARSE:])
        assert is_24(after[:SPARSE])
        assert not torch.equal(after[:SPARSE], before[:SPARSE])
    after, before = weight(checkpoint, DOWN), source.load(f"{DOWN}.weight")[:, order].float()
    assert is_24(after[:, :SPARSE])
    changed = (after[:, SPARSE:] != before[:, SPARSE:]).float().mean()
    assert changed > 0.5  # compensation; bf16 rounding hides the smallest steps
    assert report.mlp_sparsity == pytest.approx(0.5 * SPARSE / INTER)
    assert report.tensor_parallel_sizes == [1, 2]  # 80 / 4 = 20 is no multiple of 8


def test_everything_else_is_copied(pruned) -> None:
    _, checkpoint, source = pruned
    mlp = {f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")}
    rest = [n for n in source.tensors if n.rpartition(".")[0] not in mlp]
    assert sorted(rest) == sorted(checkpoint.plain_tensors())
    for name in rest:
        assert torch.equal(checkpoint.load(name), source.load(name))
        assert checkpoint.load(name).dtype == source.load(name).dtype
    for module in mlp:
        before, after = source.load(f"{module}.bias"), checkpoint.load(f"{module}.bias")
        assert before.dtype == after.dtype
        assert before.sort().values.equal(after.sort().values)
    config = checkpoint.require_spense()
    assert set(config.modules) == mlp
    assert "model.layers.0.self_attn.q_proj" in config.ignore
    assert "lm_head" in config.ignore
    files = {p.name for p in checkpoint.directory.iterdir()}
    assert {"README.md", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= files
    check_manifest(checkpoint.directory)


def test_provenance_and_card(pruned, text_file: Path) -> None:
    report, checkpoint, _ = pruned
    provenance = checkpoint.require_spense().provenance
    assert provenance["options"]["method"] == "obs"
    assert provenance["calibration"]["source"] == text_file.name
    assert str(text_file.parent) not in json.dumps(provenance)
    assert len(provenance["calibration"]["sha256"]) == 64
    assert provenance["losses"][DOWN] == pytest.approx(report.losses[DOWN], rel=1e-5)
    assert all(0 < loss < 1 for loss in report.losses.values())
    card = (checkpoint.directory / "README.md").read_text()
    assert "vllm serve" in card
    assert f"{report.losses[GATE]:.4f}" in card


def test_fp8_keeps_attention_dense_and_rounds_it(dense_model: Path, text_file: Path, tmp_path: Path) -> None:
    steps: list[PruneProgress] = []
    prune(dense_model, tmp_path / "out", options(text_file, weight_dtype="fp8"), steps.append)
    checkpoint, source = Checkpoint(tmp_path / "out"), Checkpoint(dense_model)
    config = checkpoint.require_spense()
    assert len(config.modules) == 14
    query = "model.layers.1.self_attn.q_proj"
    assert config.modules[query].sparse == 0
    assert config.modules[query].split == "output"
    expected = dequantize(*quantize_per_channel(source.load(f"{query}.weight")))
    assert torch.equal(weight(checkpoint, query), expected)
    assert torch.equal(checkpoint.load(f"{query}.bias"), source.load(f"{query}.bias"))
    assert [(s.stage, s.layer, s.layers) for s in steps] == [
        ("check", 1, 2),
        ("check", 2, 2),
        ("layers", 1, 2),
        ("layers", 2, 2),
    ]
    steps = steps[2:]
    assert steps[-1].remaining == 0
    assert set(steps[0].losses) == {GATE, UP, DOWN}


@pytest.mark.parametrize("weight_dtype", ["bf16", "fp8", "int8"])
def test_losses_are_those_of_the_model_that_was_written(
    weight_dtype: str, dense_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """True-sequential: every statistic was taken behind all that had been pruned and rounded before."""
    report = prune(dense_model, tmp_path / "out", options(text_file, weight_dtype=weight_dtype))
    checkpoint, source = Checkpoint(tmp_path / "out"), Checkpoint(dense_model)
    model = load_model(tmp_path / "out", activations="none")
    seen: dict[str, Hessian] = {}
    for name in report.losses:
        module = model.get_submodule(name)
        seen[name] = Hessian(module.weight.shape[1])
        module.register_forward_pre_hook(lambda _, args, h=seen[name]: h.add(args[0]))
    ids = tokenize(load_tokenizer(dense_model), text_file.read_text())
    with torch.inference_mode():
        model(sample_windows(ids, 8, 64, seed=0))
    for name, loss in report.losses.items():
        order = order_of(checkpoint, source, int(name.split(".")[2]))
        before = source.load(f"{name}.weight").float()
        before = before[:, order] if "down" in name else before[order]
        change = weight(checkpoint, name) - before
        assert loss == pytest.approx(output_error(change, before, seen[name].matrix(name)), rel=1e-3)


def test_two_runs_are_bit_identical_and_the_seed_matters(
    dense_model: Path, text_file: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prune(dense_model, tmp_path / name, options(text_file, weight_dtype="fp8", seed=seed))
    a, b, c = (read_manifest(tmp_path / name) for name in "abc")
    assert a == b
    assert a["model-00001-of-00003.safetensors"] != c["model-00001-of-00003.safetensors"]


@pytest.mark.parametrize("method", ["obs", "wanda", "magnitude"])
def test_ratio_0_is_strict_24(method: str, dense_model: Path, text_file: Path, tmp_path: Path) -> None:
    report = prune(dense_model, tmp_path / "out", options(text_file, method=method, dense_ratio=0))
    checkpoint = Checkpoint(tmp_path / "out")
    assert report.mlp_sparsity == 0.5
    assert is_24(weight(checkpoint, DOWN))
    spec = checkpoint.require_spense().modules[DOWN]
    assert (spec.split, spec.dense) == ("input", 0)


def test_ratio_1_is_the_dense_model(dense_model: Path, tmp_path: Path) -> None:
    report = prune(dense_model, tmp_path / "out", options(None, dense_ratio=1))
    checkpoint, source = Checkpoint(tmp_path / "out"), Checkpoint(dense_model)
    assert report.mlp_sparsity == 0
    assert report.tensor_parallel_sizes == [1, 2, 4, 8]
    for module in (GATE, UP, DOWN):
        assert checkpoint.require_spense().modules[module].split == "output"
        assert torch.equal(weight(checkpoint, module), source.load(f"{module}.weight").float())


def test_magnitude_without_data(dense_model: Path, tmp_path: Path) -> None:
    config = options(None, method="magnitude", selection="spensegpt")
    report = prune(dense_model, tmp_path / "out", config)
    checkpoint, source = Checkpoint(tmp_path / "out"), Checkpoint(dense_model)
    after, before = weight(checkpoint, GATE), source.load(f"{GATE}.weight").float()
    assert torch.equal(after[SPARSE:], before[SPARSE:])
    groups = before[:SPARSE].reshape(-1, 4).abs()
    assert torch.allclose(after[:SPARSE].reshape(-1, 4).abs().sum(1), groups.topk(2).values.sum(1))
    assert 0 < report.losses[GATE] < 0.5


def test_tied_head_is_not_written(text_file: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    add_tokenizer(tmp_path / "in")
    prune(tmp_path / "in", tmp_path / "out", options(text_file))
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").tensors


def test_permutation_alone_leaves_the_function(
    dense_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a solver that prunes nothing, the permuted model gives the same outputs."""
    from transformers import AutoModelForCausalLM

    from vllm_spense.pruning import pipeline

    stored: dict[str, torch.Tensor] = {}

    def keep(pruned, layer, source) -> None:
        for name, tensors in pruned.tensors.items():
            stored[f"{name}.weight"] = tensors["weight"]
            if name in pruned.row_order:
                bias = source.checkpoint.load(f"{name}.bias")
                stored[f"{name}.bias"] = bias[pruned.row_order[name]]
        raise KeyboardInterrupt

    monkeypatch.setattr(Solver, "prune", lambda _self, matrix, layout: matrix)
    monkeypatch.setattr(pipeline, "pack_layer", keep)
    without_encoding(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prune(dense_model, tmp_path / "out", options(text_file))
    assert not list(tmp_path.iterdir())  # nothing is left of a run that finished no layer
    model = AutoModelForCausalLM.from_pretrained(dense_model, dtype=torch.float32)
    ids = torch.arange(40)[None]
    before = model(ids).logits
    moved = model.state_dict()[f"{GATE}.weight"] != stored[f"{GATE}.weight"]
    assert moved.any()
    model.load_state_dict(stored, strict=False)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)


# -- errors --------------------------------------------------------------------------------------


def test_calibration_is_asked_for() -> None:
    for changes in ({}, {"method": "wanda"}, {"method": "magnitude", "selection": "spensegpt+"}):
        with pytest.raises(ValueError, match="needs calibration text"):
            PruneConfig(**changes)
    PruneConfig(method="magnitude", selection="spensegpt")
    with pytest.raises(ValueError, match="Extra inputs"):
        PruneConfig(calibration="x", densratio=0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("w1 " * 63, "63 tokens, fewer than one window of 64"),
        (None, "no such text file"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_bad_calibration_text(
    content: str | bytes | None, message: str, dense_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message):
        prune(dense_model, tmp_path / "out", options(text))
    assert not (tmp_path / "out").exists()


def test_overlapping_windows_warn(dense_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 " * 30)
    with pytest.warns(UserWarning, match="overlap heavily"):
        prune(dense_model, tmp_path / "out", options(tmp_path / "text.txt"))


def damaged(source: Path, out: Path, name: str, value: float) -> Path:
    shutil.copytree(source, out)
    state = load_file(out / "model.safetensors")
    state[name][0, 0] = value
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_name_the_tensor(
    value: float, dense_model: Path, text_file: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = damaged(dense_model, tmp_path / "in", name, value)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + ".*NaN or infinity") as caught:
        prune(source, tmp_path / "out", options(text_file))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.spense-work", "in"]
    assert "1 finished layers are kept" in caught.value.__notes__[0]


def test_out_in_use_is_refused_before_any_work(dense_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        prune(dense_model, tmp_path / "out", options(tmp_path / "missing.txt"))
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_spense_source_is_refused(pruned, text_file: Path, tmp_path: Path) -> None:
    report, _, _ = pruned
    with pytest.raises(ValueError, match="Spense checkpoint already"):
        prune(report.directory, tmp_path / "out", options(text_file))


def test_missing_model_and_bin_only_model(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model directory"):
        prune(tmp_path / "nothing", tmp_path / "out", options(text_file))
    source = make_llama(tmp_path / "in")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles are never read"):
        prune(source, tmp_path / "out", options(text_file))


def test_ragged_intermediate_size(text_file: Path, tmp_path: Path) -> None:
    source = add_tokenizer(make_llama(tmp_path / "in", inter=204))
    with pytest.raises(ValueError, match=r"intermediate size 204.*multiple of 8"):
        prune(source, tmp_path / "out", options(text_file, dense_ratio=0))
    assert not (tmp_path / "out").exists()


def test_unsupported_models(text_file: Path, tmp_path: Path) -> None:
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        GPTNeoXConfig,
        MixtralConfig,
        Qwen3MoeConfig,
    )

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "pad_token_id": 0,
    }
    cases = {
        "neox": (
            GPTNeoXConfig(**sizes),
            "no mlp or feed_forward or no self_attn or linear_attn; supported .*Llama.*Phi",
        ),
        "gpt2": (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=512), "no list of decoder"),
        "mixtral": (MixtralConfig(**sizes, num_local_experts=2), r"mixture of experts \(mixtral\)"),
        "qwen3_moe": (Qwen3MoeConfig(**sizes, num_experts=2, head_dim=16), "nothing to prune"),
    }
    for name, (config, message) in cases.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        add_tokenizer(tmp_path / name)
        with pytest.raises(UnsupportedModelError, match=message):
            prune(tmp_path / name, tmp_path / "out", options(text_file))
        assert not (tmp_path / "out").exists()
