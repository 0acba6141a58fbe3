"""Attention as a target, against a slow reference that moves heads one by one.

The reference takes the dense transformers model and puts the written matrices back, head by head; it
knows nothing of Spense layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.tiny_families import FAMILIES, make_family
from tests.tiny_text import write_text
from vllm_spense.cli.app import app
from vllm_spense.evaluation import load_model, load_tokenizer
from vllm_spense.format import Checkpoint
from vllm_spense.format.report import inspect
from vllm_spense.models.export import export
from vllm_spense.models.parts import decoder_layers
from vllm_spense.ops.tune import layer_specs
from vllm_spense.pruning import PruneConfig, PruneReport, pipeline, prune
from vllm_spense.pruning.choice import attention
from vllm_spense.pruning.choice.attention import move_groups, target
from vllm_spense.pruning.layer import LayerPruner
from vllm_spense.pruning.plan import plan
from vllm_spense.pruning.resume import ResumeError
from vllm_spense.pruning.solvers.hessian import Hessian, output_error
from vllm_spense.pruning.solvers.solver import Solver
from vllm_spense.pruning.source import SourceModel
from vllm_spense.text import sample_windows, tokenize
from vllm_spense.verification import verify

HEAD, HEADS, KV = 16, 8, 4
"""Features of a head, query heads, key/value heads (8 in multi-head attention)."""
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD,
}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"hidden_size": 128, "head_dim": None},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {"hidden_size": 128, "head_dim": None},
    "phi": {"hidden_size": 128},
    "opt": {"hidden_size": 128},
}
IDS = torch.arange(3, 51)[None]
OUT = {"phi": "dense", "opt": "out_proj"}


def make(kind: str, out: Path, **changes: Any) -> Path:
    sizes = SIZES | ({"head_dim": None} if FAMILIES[kind].get("head_dim", 0) is None else {})
    return make_family(kind, out, **(sizes | CHANGES[kind] | changes))


def options(text: Path, **changes: Any) -> PruneConfig:
    base = {"preset": "spensegpt+", "num_samples": 4, "seq_len": 64, "weight_dtype": "bf16"}
    base |= {"targets": "mlp+attention", "calibration": str(text)}
    return PruneConfig(**(base | changes))


@dataclass
class Pruned:
    """One finished run and the orders of rows that the pruner applied."""

    kind: str
    dense: Path
    spense: Path
    report: PruneReport
    order: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.spense)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return split_state(self.dense)

    def names(self, layer: int) -> list[str]:
        """q, k, v and o of a layer."""
        prefix = f"model.{'decoder.' if self.kind == 'opt' else ''}layers.{layer}.self_attn"
        return [f"{prefix}.{short}" for short in ("q_proj", "k_proj", "v_proj", OUT.get(self.kind, "o_proj"))]

    def groups(self, layer: int) -> list[int]:
        """The order of the key/value heads, read from the order of k's rows."""
        rows = self.order[self.names(layer)[1]]
        return [int(row) // HEAD for row in rows[::HEAD]]

    @property
    def ratio(self) -> int:
        """Query heads per key/value head."""
        return 1 if self.kind == "opt" else HEADS // KV


def split_state(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors on disk, Phi-3's q, k and v apart."""
    state = load_file(directory / "model.safetensors")
    for name in [n for n in state if "qkv_proj" in n]:
        parts = state.pop(name).split([HEADS * HEAD, KV * HEAD, KV * HEAD])
        for short, part in zip("qkv", parts, strict=True):
            state[name.replace("qkv_proj", f"{short}_proj")] = part
    return state


def written(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    return checkpoint.module_weight(module)


def heads_of(matrix: torch.Tensor, groups: list[int], ratio: int, dim: int) -> torch.Tensor:
    """``matrix`` with ``ratio`` heads per group along ``dim``, one by one in the order of the groups."""
    heads = [group * ratio + i for group in groups for i in range(ratio)]
    return torch.cat([matrix.narrow(dim, head * HEAD, HEAD) for head in heads], dim)


def is_24(region: torch.Tensor) -> bool:
    return bool(((region.reshape(region.shape[0], -1, 4) != 0).sum(-1) <= 2).all())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    """``model(kind)`` is a dense directory, made once."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda kind: make(kind, root / kind))


@pytest.fixture(scope="module")
def family(model, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """``family(kind, weight_dtype)`` prunes the model, once."""
    root = tmp_path_factory.mktemp("pruned")

    @cache
    def run(kind: str, weight_dtype: str) -> Pruned:
        order: dict[str, torch.Tensor] = {}
        plain = LayerPruner.prune

        def spy(self: LayerPruner, index: int, layer):
            result = plain(self, index, layer)
            order.update(result.row_order)
            return result

        out = root / f"{kind}-{weight_dtype}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LayerPruner, "prune", spy)
            report = prune(model(kind), out, options(text, weight_dtype=weight_dtype))
        return Pruned(kind, model(kind), out, report, order)

    return lambda kind, weight_dtype="bf16": run(kind, weight_dtype)


# -- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHANGES)
def test_regions_are_whole_groups_of_heads(kind: str, family) -> None:
    """2:4 in S; dense rows of q, k and v keep every bit; biases move along; o's columns are those groups."""
    run = family(kind)
    before, modules, moved = run.state, run.checkpoint.require_spense().modules, False
    for layer in range(2):
        q, k, v, o = run.names(layer)
        groups = run.groups(layer)
        sparse = len(groups) // 2
        assert sorted(groups) == list(range(len(groups)))
        assert groups[:sparse] == sorted(groups[:sparse])
        assert groups[sparse:] == sorted(groups[sparse:])
        moved |= groups != sorted(groups)
        for name, ratio in ((q, run.ratio), (k, 1), (v, 1)):
            rows = sparse * ratio * HEAD
            assert (modules[name].split, modules[name].sparse) == ("output", rows)
            after, expected = written(run.checkpoint, name), before[f"{name}.weight"].float()
            expected = heads_of(expected, groups, ratio, 0)
            assert is_24(after[:rows])
            assert torch.equal(after[rows:], expected[rows:])
            assert 0 < (after[:rows] - expected[:rows]).norm() < 0.7 * expected[:rows].norm()
            if (bias := before.get(f"{name}.bias")) is not None:
                assert torch.equal(run.checkpoint.load(f"{name}.bias"), heads_of(bias, groups, ratio, 0))
        columns = sparse * run.ratio * HEAD
        assert (modules[o].split, modules[o].sparse) == ("input", columns)
        after = written(run.checkpoint, o)
        assert is_24(after[:, :columns])
        expected = heads_of(before[f"{o}.weight"].float(), groups, run.ratio, 1)
        assert (after - expected).norm() < 0.7 * expected.norm()  # √2 for columns in another order
        for name in (q, k, v, o):
            assert 0 < run.report.losses[name] < 1
    assert moved, "no layer moved a head: nothing was tested"


@pytest.mark.parametrize(("kind", "weight_dtype"), [*((k, "bf16") for k in CHANGES), ("phi3", "fp8")])
@torch.no_grad()
def test_the_checkpoint_is_the_dense_model_with_the_new_weights(kind: str, weight_dtype: str, family) -> None:
    """The written heads, put back one by one, in the original order of heads."""
    run = family(kind, weight_dtype)
    reference = AutoModelForCausalLM.from_pretrained(run.dense, dtype=torch.float32).eval()
    for name in run.checkpoint.require_spense().modules:
        weight = written(run.checkpoint, name)
        if ".self_attn." in name:
            layer = int(name.partition("layers.")[2].partition(".")[0])
            q, _, _, o = run.names(layer)
            back = torch.tensor(run.groups(layer)).argsort().tolist()
            weight = heads_of(weight, back, run.ratio if name in (q, o) else 1, 1 if name == o else 0)
        elif name in run.order:
            weight = weight[run.order[name].argsort()]
        else:
            inner = next(n for n in run.order if n.rpartition(".")[0] == name.rpartition(".")[0])
            weight = weight[:, run.order[inner].argsort()]
        put(reference, name, weight)
    got = load_model(run.spense, activations="none")(IDS).logits
    torch.testing.assert_close(got, reference(IDS).logits, rtol=1e-3, atol=1e-3)
    verify(run.spense)


def put(model: nn.Module, module: str, weight: torch.Tensor) -> None:
    """Set a weight of a transformers model, through rows of the fused linear where it has one."""
    parent, _, last = module.rpartition(".")
    owner = model.get_submodule(parent)
    if hasattr(owner, last):
        getattr(owner, last).weight.data.copy_(weight)
        return
    fused = getattr(owner, "gate_up_proj" if last in ("gate_proj", "up_proj") else "qkv_proj").weight.data
    start = {"k_proj": HEADS * HEAD, "v_proj": (HEADS + KV) * HEAD, "up_proj": len(fused) // 2}.get(last, 0)
    fused[start : start + len(weight)] = weight


@pytest.mark.parametrize("kind", CHANGES)
@torch.no_grad()
def test_the_order_of_groups_alone_leaves_the_function(kind: str, model) -> None:
    """And rows that do not move along with their head do change it."""
    source = SourceModel(model(kind), torch.device("cpu"))
    config = PruneConfig(method="magnitude", selection="spensegpt", targets="mlp+attention")
    with source.resident(source.network):
        before = source.network(IDS).logits
        for layer in decoder_layers(source.network):
            found = target(layer, config)
            move_groups(found, torch.arange(found.groups).roll(1))
        torch.testing.assert_close(source.network(IDS).logits, before, rtol=1e-3, atol=1e-3)
        found.out.weight.copy_(found.out.weight.roll(HEAD, 1))
        assert (source.network(IDS).logits - before).abs().max() > 0.1


@torch.no_grad()
def test_the_function_with_a_solver_that_prunes_nothing(
    model, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the run but the zeros: orders, biases and files, next to the dense model."""
    monkeypatch.setattr(Solver, "prune", lambda _self, weight, _layout: weight)
    monkeypatch.setattr("vllm_spense.pruning.layer.LayerPruner.layouts", all_dense)
    prune(model("qwen2"), tmp_path / "out", options(text))
    got = load_model(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(got, load_model(model("qwen2"))(IDS).logits, rtol=1e-3, atol=1e-3)
    before, after = split_state(model("qwen2")), Checkpoint(tmp_path / "out")
    name = "model.layers.{}.self_attn.k_proj"
    assert any(
        not torch.equal(before[f"{name.format(i)}.weight"].float(), written(after, name.format(i)))
        for i in range(2)
    )


def all_dense(self: LayerPruner, index: int, layer) -> dict:
    from vllm_spense.format import Layout

    linears = {**layer.mlp.inner, layer.mlp.down_name: layer.mlp.down, **layer.dense}
    return {name: Layout("output", *linear.weight.shape, 0) for name, linear in linears.items()}


# -- which groups, and how they are pruned -------------------------------------------------------


def test_scores_of_groups_by_hand(model, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's, from the definition in loops: mean of |w|·√H per projection, normalised."""
    found: list[torch.Tensor] = []
    monkeypatch.setattr(attention, "permutation", lambda scores, *sizes: found.append(scores) or rank(*sizes))
    prune(model("llama"), tmp_path / "out", options(text))
    before = AutoModelForCausalLM.from_pretrained(model("llama"), dtype=torch.float32).eval()
    q, k, v, o = (getattr(before.model.layers[0].self_attn, f"{short}_proj") for short in "qkvo")
    moments = {q: Hessian(96), o: Hessian(HEADS * HEAD)}
    for linear, moment in moments.items():
        linear.register_forward_pre_hook(lambda _, args, m=moment: m.add(args[0]))
    windows = sample_windows(tokenize(load_tokenizer(model("llama")), text.read_text()), 4, 64, seed=0)
    with torch.no_grad():
        for window in windows:
            before(window[None])
    roots = {linear: moment.matrix("").diagonal().sqrt() for linear, moment in moments.items()}
    scores = torch.zeros(KV)
    for linear, ratio in ((q, 2), (k, 1), (v, 1), (o, 2)):
        energy = linear.weight.detach().abs() * roots[o if linear is o else q]
        parts = energy.split(ratio * HEAD, dim=1 if linear is o else 0)
        means = torch.stack([part.mean() for part in parts])
        scores += means / means.mean()
    assert len(scores.unique()) == KV
    torch.testing.assert_close(found[0], scores, rtol=1e-4, atol=1e-4)


def rank(groups: int, dense: int) -> torch.Tensor:
    assert (groups, dense) == (KV, KV // 2)
    return torch.arange(groups)


@pytest.mark.parametrize("weight_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
@torch.no_grad()
def test_losses_are_those_of_the_model_that_was_written(
    kind: str, weight_dtype: str, family, text: Path
) -> None:
    """True-sequential: o behind the pruned and rounded q, k and v, and so on, layer by layer."""
    run = family(kind, weight_dtype)
    served = load_model(run.spense, activations="none")
    windows = sample_windows(tokenize(load_tokenizer(run.dense), text.read_text()), 4, 64, seed=0)
    for layer in range(2):
        names, groups = run.names(layer), run.groups(layer)
        block = served.get_submodule(names[0].rpartition(".")[0])
        seen = {}
        for reader in (getattr(block, "qkv_proj", None) or block.q_proj, block.o_proj):
            seen[reader] = Hessian(reader.weight.shape[1])
            reader.register_forward_pre_hook(lambda _, args, h=seen[reader]: h.add(args[0]))
        for window in windows:
            served(window[None])
        h_in, h_out = (h.matrix("") for h in seen.values())
        for name, ratio, dim in zip(names, (run.ratio, 1, 1, run.ratio), (0, 0, 0, 1), strict=True):
            before = heads_of(run.state[f"{name}.weight"].float(), groups, ratio, dim)
            change = written(run.checkpoint, name) - before
            expected = output_error(change, before, h_out if dim else h_in)
            tolerance = 2e-2 if layer else 1e-3  # between layers, states are kept in bf16
            assert run.report.losses[name] == pytest.approx(expected, rel=tolerance)
    assert list(run.report.losses)[:4] == run.names(0)


@pytest.mark.parametrize(("ratio", "sparse"), [(0, 4), (0.25, 3), (0.3, 3), (0.375, 2), (0.8, 1)])
def test_the_share_is_rounded_to_whole_groups(
    ratio: float, sparse: int, model, text: Path, tmp_path: Path
) -> None:
    """Its own share, whatever the MLP's is; plan and inspection agree with the file."""
    config = options(text, attention_dense_ratio=ratio, dense_ratio=1, preset="wanda")
    report = prune(model("qwen3"), tmp_path / "out", config)
    modules = Checkpoint(tmp_path / "out").require_spense().modules
    name = "model.layers.1.self_attn"
    assert modules[f"{name}.q_proj"].sparse == modules[f"{name}.o_proj"].sparse == sparse * 2 * HEAD
    assert modules[f"{name}.k_proj"].sparse == modules[f"{name}.v_proj"].sparse == sparse * HEAD
    assert modules["model.layers.1.mlp.up_proj"].sparse == 0
    assert report.mlp_sparsity == 0
    total = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert plan(model("qwen3"), config).output_bytes == total["metadata"]["total_size"]
    found = inspect(tmp_path / "out")
    assert found.mlp_sparsity == 0
    weights, zeros = 2 * 2 * HEAD * HEADS * 96 + 2 * 2 * HEAD * KV * 96, sparse / KV / 2
    assert found.sparsity == pytest.approx(zeros)
    assert sum(m.spec.out_features * m.spec.in_features for m in found.hybrid) == weights


def test_without_data(model, tmp_path: Path) -> None:
    """Magnitude and the last groups need no text."""
    config = PruneConfig(method="magnitude", selection="spensegpt", targets="mlp+attention")
    prune(model("opt"), tmp_path / "out", config.model_copy(update={"weight_dtype": "bf16"}))
    checkpoint, before = Checkpoint(tmp_path / "out"), split_state(model("opt"))
    name = "model.decoder.layers.0.self_attn.v_proj"
    after = written(checkpoint, name)
    assert torch.equal(after[64:], before[f"{name}.weight"][64:].float())
    largest = before[f"{name}.weight"][:64].float().reshape(-1, 4).abs().topk(2).values.sum(1)
    assert torch.allclose(after[:64].reshape(-1, 4).abs().sum(1), largest)


def test_the_mlp_alone_is_the_default(model, text: Path, tmp_path: Path) -> None:
    """Also where all of attention is asked to stay dense."""
    for name, changes in (("a", {"targets": "mlp"}), ("b", {"attention_dense_ratio": 1})):
        prune(model("llama"), tmp_path / name, options(text, weight_dtype="fp8", **changes))
        modules = Checkpoint(tmp_path / name).require_spense().modules
        pruned = {n.rpartition(".")[2] for n, spec in modules.items() if spec.sparse}
        assert pruned == {"gate_proj", "up_proj", "down_proj"}
    weights = [load_file(tmp_path / n / "model-00002-of-00003.safetensors") for n in "ab"]
    assert all(torch.equal(weights[0][n].float(), weights[1][n].float()) for n in weights[0])


# -- what rests on it ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "sizes"), [("llama", [1, 2]), ("opt", [1, 2])])
def test_a_rank_takes_whole_groups_of_each_region(kind: str, sizes: list[int], family) -> None:
    """Four key/value heads: 2 + 2. OPT's eight, 4 + 4, would do for 4, but 80 columns of the MLPs not."""
    run = family(kind)
    assert run.report.tensor_parallel_sizes == sizes
    assert run.checkpoint.require_spense().tensor_parallel_sizes == sizes


@pytest.mark.parametrize(
    ("heads", "ratio", "sizes"), [(4, 0.25, [1]), (4, 0.5, [1, 2]), (4, 0, [1, 2, 4]), (3, 0.3, [1])]
)
def test_promised_sizes_end_with_the_heads(
    heads: int, ratio: float, sizes: list[int], text: Path, tmp_path: Path
) -> None:
    """Rows alone could be cut further (16 of one head by 2), and vLLM would repeat heads: not promised."""
    source = make("qwen3", tmp_path / "in", num_key_value_heads=heads, num_attention_heads=2 * heads)
    config = options(text, preset="wanda", dense_ratio=1, attention_dense_ratio=ratio)
    assert prune(source, tmp_path / "out", config).tensor_parallel_sizes == sizes


def test_the_plan_knows_of_attention(model, text: Path) -> None:
    """More passes over attention, more to solve, fewer bytes to write."""
    plans = [plan(model("llama"), options(text, targets=t), "h200") for t in ("mlp", "mlp+attention")]
    before, after = (found.layers[0] for found in plans)
    once = 2 * 4 * 64 * (2 * HEADS + 2 * KV) * HEAD * 96  # FLOP of its linears
    assert 2 * once < after.flop - before.flop < 4 * once
    assert after.flop_fp32 > before.flop_fp32 + 4 * 64 * (96**2 + (HEADS * HEAD) ** 2)
    assert after.output_bytes < before.output_bytes


def test_the_command(model, text: Path, tmp_path: Path) -> None:
    command = ["prune", str(model("llama")), "-o", str(tmp_path / "out"), "--calibration", str(text)]
    command += ["--targets", "mlp+attention", "--attention-dense-ratio", "0.25", "--seq-len", "64"]
    said = CliRunner().invoke(app, [*command, "--dry-run", "--json"], catch_exceptions=False)
    attention = {"targets": "mlp+attention", "attention_dense_ratio": 0.25}
    config = PruneConfig(calibration=str(text), seq_len=64, **attention)
    assert json.loads(said.stdout)["output_bytes"] == plan(model("llama"), config).output_bytes


def test_two_layers_of_vllm_stand_for_attention(family) -> None:
    """Tuning measures q, k and v as one layer, and o along its inputs, as a rank has them."""
    specs = layer_specs(family("phi3", "fp8").checkpoint, tensor_parallel=2)
    found = {(s.split, s.sparse_sizes, s.dense_sizes) for s in specs}
    assert ("output", (32, 16, 16), (32, 16, 16)) in found
    assert ("input", (32,), (32,)) in found
    assert len(specs) == 4


@pytest.mark.parametrize("format", ["float32", "fp8", "spense-dense"])
@torch.no_grad()
def test_exports_have_the_same_function(format: str, family, tmp_path: Path) -> None:
    run = family("phi3", "fp8")
    export(run.spense, tmp_path / "out", format=format)
    expected = load_model(run.spense, activations="none")(IDS).logits
    if format == "fp8":  # transformers needs another package to read it
        weights = load_file(tmp_path / "out" / "model.safetensors")
        name = "model.layers.1.self_attn"
        stored = (f"{name}.{short}_proj" for short in "qkv")
        parts = [run.checkpoint.linear(n).values(run.checkpoint.module_tensors(n))[0].float() for n in stored]
        assert torch.equal(weights[f"{name}.qkv_proj.weight"].float(), torch.cat(parts))
        return
    got = load_model(tmp_path / "out", activations="none")(IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_record_card_and_inspection(family) -> None:
    run = family("opt", "fp8")
    said = run.checkpoint.require_spense().provenance
    assert said["options"]["targets"] == "mlp+attention"
    assert set(run.names(1)) <= set(said["losses"])
    card = (run.spense / "README.md").read_text()
    assert "projections of attention are pruned" in card
    losses = [run.report.losses[name] for name in run.names(1)]
    row = "| model.decoder.layers.1 | " + " | ".join(f"{loss:.4f}" for loss in losses)
    assert row in card
    assert "| layer | q | k | v | out | fc1 | fc2 |" in card
    report = inspect(run.spense)
    assert report.mlp_sparsity == pytest.approx(run.report.mlp_sparsity)
    assert len(report.hybrid) == 12


@pytest.mark.parametrize("weight_dtype", ["bf16", "fp8"])
def test_resume_gives_the_same_bytes(
    weight_dtype: str, family, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = family("qwen2", weight_dtype)
    plain = LayerPruner.prune

    def interrupted(self: LayerPruner, index: int, layer):
        if index == 1:
            raise KeyboardInterrupt
        return plain(self, index, layer)

    with monkeypatch.context() as patch:
        patch.setattr(LayerPruner, "prune", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(run.dense, tmp_path / "out", options(text, weight_dtype=weight_dtype))
    for changes in ({"targets": "mlp"}, {"attention_dense_ratio": 0.25}):
        with pytest.raises(ResumeError, match=r"options\.(targets|attention_dense_ratio)"):
            prune(
                run.dense, tmp_path / "out", options(text, weight_dtype=weight_dtype, resume=True, **changes)
            )
    config = options(text, weight_dtype=weight_dtype, resume=True)
    report = prune(run.dense, tmp_path / "out", config)
    for path in run.spense.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert report.losses == run.report.losses
    again = pipeline._report_of(tmp_path / "out", config, 0.0)
    assert (again.layers, again.mlp_sparsity) == (2, pytest.approx(report.mlp_sparsity))
