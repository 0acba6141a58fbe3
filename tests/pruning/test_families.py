"""Every supported family through ``prune``, against the dense transformers model with the new weights put in.

The reference knows nothing of Spense layers: it takes the original model, undoes the permutation on the
written matrices and keeps the original biases.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.tiny_families import EXPERTS, FAMILIES, INTER, make_family, pruned_modules
from vllm_spense.evaluation import load_model, load_tokenizer
from vllm_spense.format import Checkpoint, CheckpointError, quantize_per_channel
from vllm_spense.models.export import export
from vllm_spense.models.families import family_of
from vllm_spense.models.fused import part_rows
from vllm_spense.models.parts import decoder_layers
from vllm_spense.models.split import split_fused
from vllm_spense.planning import read_model
from vllm_spense.pruning import PruneConfig, PruneReport, pipeline, prune
from vllm_spense.pruning.config import Preset
from vllm_spense.pruning.layer import LayerPruner
from vllm_spense.text import sample_windows, tokenize
from vllm_spense.verification import verify

RUNS = [(kind, "bf16", "spensegpt+") for kind in FAMILIES]
FP8 = ("gemma3_text", "phi3", "phi", "opt", "qwen2_moe", "gemma4_text", "qwen3_5_text", "falcon_h1")
RUNS += [(kind, "fp8", "spensegpt+") for kind in FP8]
RUNS += [
    (kind, "bf16", "guided") for kind in ("gemma4_text", "qwen3_5_text", "falcon_h1", "cohere", "apertus")
]
IDS = torch.arange(3, 51)[None]


@dataclass
class Pruned:
    """One finished run: directories, and what the pruner did and saw on the way."""

    kind: str
    dense: Path
    spense: Path
    report: PruneReport
    warnings: list[str]
    order: dict[str, torch.Tensor] = field(default_factory=dict)
    hidden: list[torch.Tensor] = field(default_factory=list)

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.spense)

    def original(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.dense, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def family(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """``family(kind, weight_dtype, preset)`` makes and prunes the model, once."""
    root = tmp_path_factory.mktemp("families")
    dense = cache(lambda kind: make_family(kind, root / kind))

    @cache
    def run(kind: str, weight_dtype: str, preset: Preset) -> Pruned:
        order: dict[str, torch.Tensor] = {}
        hidden: list[torch.Tensor] = []
        plain = LayerPruner.prune

        def spy(self: LayerPruner, index: int, layer):
            hidden.append(self.inputs.hidden.float().clone())
            result = plain(self, index, layer)
            order.update(result.row_order)
            return result

        out = root / f"{kind}-{weight_dtype}-{preset}"
        options = {"preset": preset, "num_samples": 4, "seq_len": 64, "weight_dtype": weight_dtype}
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr(LayerPruner, "prune", spy)
            report = prune(dense(kind), out, PruneConfig(calibration=str(text_file), **options))
        said = [str(w.message) for w in caught]
        return Pruned(kind, dense(kind), out, report, said, order, hidden)

    return lambda kind, weight_dtype, preset="spensegpt+": run(kind, weight_dtype, preset)


def written(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    return checkpoint.module_weight(module)


def put(model: nn.Module, module: str, weight: torch.Tensor) -> None:
    """Set a weight of a transformers model, through rows of the fused linear where it has one."""
    parent, _, last = module.rpartition(".")
    owner = model.get_submodule(parent)
    if hasattr(owner, last):
        getattr(owner, last).weight.data.copy_(weight)
        return
    fused = getattr(owner, "gate_up_proj" if last in ("gate_proj", "up_proj") else "qkv_proj").weight.data
    sizes = {"gate_proj": (0, INTER), "up_proj": (INTER, 2 * INTER)}
    sizes |= {"q_proj": (0, 96), "k_proj": (96, 144), "v_proj": (144, 192)}  # 4, 2 and 2 heads of 24
    start, stop = sizes[last]
    fused[start:stop] = weight


def reference(run: Pruned) -> nn.Module:
    model, checkpoint = run.original(), run.checkpoint
    rest = set(checkpoint.require_spense().modules)
    for names in pruned_modules(run.kind):
        back = torch.argsort(run.order[names[0]])
        for name in names[:-1]:
            put(model, name, written(checkpoint, name)[back])
        put(model, names[-1], written(checkpoint, names[-1])[:, back])
        rest -= set(names)
    for name in rest:
        put(model, name, written(checkpoint, name))
    return model


@pytest.mark.parametrize(("kind", "weight_dtype", "preset"), RUNS)
@torch.no_grad()
def test_the_checkpoint_is_the_dense_model_with_the_new_weights(
    kind: str, weight_dtype: str, preset: Preset, family
) -> None:
    run = family(kind, weight_dtype, preset)
    model = load_model(run.spense, activations="none")
    got, expected = model(IDS).logits, reference(run)(IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert (run.original()(IDS).logits - expected).abs().mean() > 0.03 * expected.abs().mean()
    verify(run.spense)


@pytest.mark.parametrize("kind", FAMILIES)
def test_regions(kind: str, family) -> None:
    """2:4 in S; the dense rows of the inner linears keep every bit; nothing else is pruned."""
    run = family(kind, "bf16")
    checkpoint, model = run.checkpoint, run.original()
    modules = checkpoint.require_spense().modules
    before = state_of(model, run.kind)
    assert set(modules) == {name for names in pruned_modules(kind) for name in names}
    assert set(run.report.losses) == set(modules)
    for names in pruned_modules(kind):
        order = run.order[names[0]]
        assert order.tolist() != sorted(order.tolist())
        sparse = modules[names[0]].sparse
        assert 0 < sparse < len(order)
        for name in names[:-1]:
            after = written(checkpoint, name)
            assert is_24(after[:sparse])
            assert torch.equal(after[sparse:], before[f"{name}.weight"][order][sparse:])
        after = written(checkpoint, names[-1])
        assert (modules[names[-1]].split, modules[names[-1]].sparse) == ("input", sparse)
        assert is_24(after[:, :sparse])
        moved = before[f"{names[-1]}.weight"][:, order]
        assert (after - moved).norm() < 0.7 * moved.norm()  # √2 for columns in another order
    assert all(0 < loss < 1 for loss in run.report.losses.values())


def state_of(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """The model's tensors, gate and up apart where they are fused."""
    state = dict(model.state_dict())
    for name in [n for n in state if family_of(kind).fused and "gate_up_proj" in n]:
        fused = state.pop(name)
        state[name.replace("gate_up_proj", "gate_proj")] = fused[:INTER]
        state[name.replace("gate_up_proj", "up_proj")] = fused[INTER:]
    return state


def is_24(region: torch.Tensor) -> bool:
    return bool(((region.reshape(region.shape[0], -1, 4) != 0).sum(-1) <= 2).all())


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_the_joint_fit_knows_what_comes_into_down(kind: str, family) -> None:
    """The activation of gate times up, or of a plain MLP's values, in the model's own forward."""
    model = family(kind, "bf16").original()
    split_fused(model)
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for layer in decoder_layers(model):
        mlp = layer.mlp
        for name, linear in {} if mlp is None else {"x": mlp.reader, "values": mlp.down}.items():
            hook = lambda _, args, key=(layer.name, name): seen.update({key: args[0]})  # noqa: E731
            handles.append(linear.register_forward_pre_hook(hook))
    model(IDS)
    for layer in decoder_layers(model):
        if (mlp := layer.mlp) is None:
            continue
        first, *rest = (linear(seen[layer.name, "x"]) for linear in mlp.inner.values())
        values = mlp.activation(first) * (rest[0] if rest else 1)
        torch.testing.assert_close(values, seen[layer.name, "values"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_serving_plan_counts_the_same_linears(kind: str, family) -> None:
    """Or refuses models whose layers keep another cache than a token's keys and values."""
    run = family(kind, "bf16")
    if kind in ("gemma4_text", "gemma4_moe", "qwen3_5_text", "falcon_h1"):
        with pytest.raises(CheckpointError, match="can be predicted"):
            read_model(run.dense)
        return
    counted: Counter[str] = Counter()
    for linear in read_model(run.dense).linears:
        counted[linear.kind] += linear.count * sum(p.out_features * p.in_features for p in linear.parts)
    expected: Counter[str] = Counter()
    model = run.original()
    split_fused(model)
    for layer in decoder_layers(model):
        expected["attention"] += sum(x.weight.numel() for x in layer.dense.values())
        if layer.mlp is not None:
            expected["mlp"] += sum(x.weight.numel() for x in (*layer.mlp.inner.values(), layer.mlp.down))
    assert counted == expected


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_ratio_1_is_the_original(kind: str, family, tmp_path: Path) -> None:
    run = family(kind, "bf16")
    prune(run.dense, tmp_path / "out", PruneConfig(dense_ratio=1, weight_dtype="bf16", calibration=None))
    got = load_model(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(got, run.original()(IDS).logits, rtol=1e-4, atol=1e-4)
    verify(tmp_path / "out")


@pytest.mark.parametrize("weight_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("kind", [*FP8, "qwen3_moe"])
@torch.no_grad()
def test_every_layer_is_calibrated_behind_the_pruned_ones(
    kind: str, weight_dtype: str, family, text_file: Path
) -> None:
    run = family(kind, weight_dtype)
    ids = tokenize(load_tokenizer(run.dense), text_file.read_text())
    windows = sample_windows(ids, 4, 64, seed=0)
    pruned = layer_inputs(load_model(run.spense, activations="none"), windows)
    dense = layer_inputs(run.original(), windows)
    torch.testing.assert_close(run.hidden[0], pruned[0], rtol=1e-2, atol=1e-3)
    for seen, after, before in list(zip(run.hidden, pruned, dense, strict=True))[1:]:
        error, moved = (seen - after).norm(), (before - after).norm()
        assert error < 0.02 * after.norm()  # hidden states may be kept in bf16
        assert error < 0.2 * moved


def layer_inputs(model: nn.Module, windows: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states in front of each layer of a whole forward."""
    base = model.model.decoder if hasattr(model.model, "decoder") else model.model
    seen: list[torch.Tensor] = []
    for layer in base.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    model(windows)
    return seen


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen3_moe"])
def test_a_checkpoint_says_what_its_run_reported(kind: str, family) -> None:
    """OPT's linears lie in no ``mlp``, and two layers of Qwen3-MoE have nothing that is pruned."""
    run = family(kind, "bf16")
    found = pipeline._report_of(run.spense, run.report.config, 0.0)
    assert found.layers == run.report.layers == 3
    assert found.losses == pytest.approx(run.report.losses, rel=1e-5)
    assert found.mlp_sparsity == pytest.approx(run.report.mlp_sparsity)
    assert found.tensor_parallel_sizes == run.report.tensor_parallel_sizes


# -- what is stored how --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_experts_stay_as_they_are_and_are_named(kind: str, family) -> None:
    run = family(kind, "bf16")
    before, after = load_file(run.dense / "model.safetensors"), run.checkpoint
    kept = [
        name for name in before if ".experts." in name or "shared_expert_gate" in name or ".gate." in name
    ]
    assert len(kept) >= 2 * EXPERTS * 3
    for name in kept:
        assert torch.equal(before[name], after.load(name))
    said = [text for text in run.warnings if "routed experts" in text]
    assert len(said) == 1
    assert f"{2 * EXPERTS} routed experts in 2 layers (0.000295 GB)" in said[0]  # 2·4·3·64·96 in bf16


def test_fp8_leaves_router_and_shared_gate_alone(family) -> None:
    modules = family("qwen2_moe", "fp8").checkpoint.require_spense().modules
    assert not [name for name in modules if "shared_expert_gate" in name or ".experts." in name]
    assert "model.layers.1.self_attn.q_proj" in modules


@pytest.mark.parametrize("weight_dtype", ["bf16", "fp8"])
def test_phi3_is_stored_in_parts(weight_dtype: str, family) -> None:
    checkpoint = family("phi3", weight_dtype).checkpoint
    assert not [name for name in checkpoint.tensors if "gate_up" in name or "qkv" in name]
    modules = checkpoint.require_spense().modules
    assert "model.layers.0.mlp.gate_proj" in modules
    assert ("model.layers.0.self_attn.k_proj" in modules) == (weight_dtype == "fp8")


@pytest.mark.parametrize(("kind", "weight_dtype"), [("phi3", "bf16"), ("phi3", "fp8"), ("glm4", "bf16")])
@torch.no_grad()
def test_exports_load_into_transformers(kind: str, weight_dtype: str, family, tmp_path: Path) -> None:
    """Fused linears are fused again, because everyone else expects it so."""
    run = family(kind, weight_dtype)
    export(run.spense, tmp_path / "dense", format="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    expected = load_model(run.spense, activations="none")(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    if weight_dtype == "fp8":
        export(run.spense, tmp_path / "fp8", format="fp8")
        state = load_file(tmp_path / "fp8" / "model.safetensors")
        name = "model.layers.1.self_attn.qkv_proj"
        assert state[f"{name}.weight"].shape == (192, 96)
        fused = load_file(run.dense / "model.safetensors")[f"{name}.weight"]
        assert torch.equal(state[f"{name}.weight"].float(), quantize_per_channel(fused)[0].float())
        assert state[f"{name}.weight_scale"].shape == (192, 1)


def test_rows_of_a_fused_linear() -> None:
    assert part_rows("gate_up_proj", 12, {}) == {"gate_proj": (0, 6), "up_proj": (6, 12)}
    config = {"num_attention_heads": 4, "num_key_value_heads": 1}
    assert part_rows("qkv_proj", 36, config) == {"q_proj": (0, 24), "k_proj": (24, 30), "v_proj": (30, 36)}
    assert part_rows("qkv_proj", 36, {"num_attention_heads": 4})["q_proj"] == (0, 12)


def test_tied_heads_are_not_written(family) -> None:
    for kind in ("qwen2", "gemma2", "gemma3_text", "opt"):
        run = family(kind, "bf16")
        tied = json.loads((run.dense / "config.json").read_text())["tie_word_embeddings"]
        assert ("lm_head.weight" in run.checkpoint.tensors) == (not tied)
