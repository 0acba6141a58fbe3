"""The streamed gradient pass against one plain backward pass through the whole transformers model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.tiny_families import make_family, pruned_modules
from tests.tiny_gemma4 import make_gemma4
from vllm_spense.format import CheckpointError
from vllm_spense.network import logits_at, scored_positions
from vllm_spense.pruning.activations import LayerInputs, in_memory, on_disk
from vllm_spense.pruning.choice import sensitivity
from vllm_spense.pruning.choice.sensitivity import DOWN_SHARE, IndexCosts, index_costs
from vllm_spense.pruning.source import SourceModel

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 256, (3, 20), generator=torch.Generator().manual_seed(0))
KINDS = ["llama", "gemma3_text", "phi", "opt", "phi3", "qwen2_moe", "qwen3_moe", "gemma4_text"]
"""GLU; tied head and windows; parallel attention, fc1 and fc2; another tree; fused; shared experts; none;
gradients that come through another layer's keys and values."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("models")

    def make(kind: str) -> Path:
        if (root / kind).is_dir():
            return root / kind
        return make_gemma4(root / kind) if kind == "gemma4_text" else make_family(kind, root / kind)

    return make


@torch.no_grad()
def streamed(directory: Path, dtype: torch.dtype = torch.float32, allocate=in_memory, steps=None):
    source = SourceModel(directory, CPU)
    with source.resident(*source.embedding()):
        inputs = LayerInputs(source.network, WINDOWS, CPU, dtype=dtype, allocate=allocate)
    costs = index_costs(source, inputs, WINDOWS, steps)
    assert all(parameter.is_meta for parameter in source.network.parameters()), "nothing stays in memory"
    return costs


def reference(kind: str, directory: Path) -> list[torch.Tensor]:
    """Per prunable MLP the costs, by the formula: group by group, row by row, column by column."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    state = network.state_dict()
    entering: dict[str, torch.Tensor] = {}
    leaving: dict[str, torch.Tensor] = {}

    def watch(name: str, parts: list[str]) -> None:
        def see(_module, args, output: torch.Tensor) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            for part in parts:
                entering[part] = entering.get(part, 0) + (x.double() ** 2).sum(0)
            output.register_hook(see_gradient)

        def see_gradient(gradient: torch.Tensor) -> None:
            flat = gradient.reshape(-1, gradient.shape[-1]).double() ** 2
            for part, piece in zip(parts, flat.sum(0).chunk(len(parts)), strict=True):
                leaving[part] = leaving.get(part, 0) + piece

        network.get_submodule(name).register_forward_hook(see)

    groups = pruned_modules(kind)
    for names in groups:
        if kind == "phi3":  # fused here, apart in ours
            fused = names[0].replace("gate_proj", "gate_up_proj")
            watch(fused, names[:2])
            state |= dict(
                zip([f"{n}.weight" for n in names[:2]], state[f"{fused}.weight"].chunk(2), strict=True)
            )
            watch(names[2], names[2:])
        else:
            for name in names:
                watch(name, [name])
    for window in WINDOWS:
        logits = network(input_ids=window[None], use_cache=False).logits[0, :-1]
        cross_entropy(logits, window[1:], reduction="sum").backward()
    costs = []
    for *inner, down in groups:
        weight = state[f"{down}.weight"].double()
        total = torch.zeros(weight.shape[1], dtype=torch.float64)
        for i in range(weight.shape[1]):
            total[i] = DOWN_SHARE * entering[down][i] * (weight[:, i] ** 2 * leaving[down]).sum()
            for name in inner:
                row = (state[f"{name}.weight"][i].double() ** 2 * entering[name]).view(-1, 4)
                lost = sum(float(group.sort().values[:2].sum()) for group in row)
                total[i] += leaving[name][i] * lost
        costs.append(total)
    return costs


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_those_of_a_plain_backward_pass(kind: str, model) -> None:
    known, expected = streamed(model(kind)), reference(kind, model(kind))
    found = known.fisher
    assert len(found) == len(known.scores) == 3
    assert [len(scores) for scores in known.scores] == [len(cost) for cost in found]
    assert [len(cost) > 0 for cost in found] == [kind != "qwen3_moe" or i == 0 for i in range(3)]
    costs = [cost for cost in found if len(cost)]
    for cost, wanted in zip(costs, expected, strict=True):
        assert cost.dtype == torch.float32
        assert (cost > 0).all() or kind == "opt", "ReLU never opens for some"
        torch.testing.assert_close(cost.double(), wanted, rtol=2e-3, atol=2e-3 * float(wanted.mean()))
    assert expected[0].max() > 3 * expected[0].median(), "there is something to choose"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi"])
def test_scores_are_spensegpt_plus_of_the_dense_model(kind: str, model) -> None:
    network = AutoModelForCausalLM.from_pretrained(model(kind), dtype=torch.float32).eval()
    norms: dict[str, torch.Tensor] = {}

    def watch(name: str) -> None:
        def see(_module, args) -> None:
            norms[name] = norms.get(name, 0) + args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

        network.get_submodule(name).register_forward_pre_hook(see)

    groups = pruned_modules(kind)
    for names in groups:
        for name in names:
            watch(name)
    for window in WINDOWS:
        network(input_ids=window[None], use_cache=False)
    for found, (*inner, down) in zip(streamed(model(kind)).scores, groups, strict=True):
        wanted = torch.zeros_like(found)
        for name in inner:
            means = (network.get_submodule(name).weight.abs() * norms[name].sqrt()).mean(1)
            wanted += means / means.mean()
        means = (network.get_submodule(down).weight.abs() * norms[down].sqrt()).mean(0)
        torch.testing.assert_close(found, wanted + means / means.mean(), rtol=1e-4, atol=1e-5)


def test_consensus_is_the_mean_of_ranks() -> None:
    known = IndexCosts(
        [torch.tensor([3.0, 1e9, 1.0, 2.0]), torch.empty(0)],
        [torch.tensor([0.1, 0.2, 0.4, 0.3]), torch.empty(0)],
    )
    ranked, nothing = known.ranking("consensus")
    assert ranked.tolist() == [1.0, 2.0, 1.5, 1.5]
    assert nothing.numel() == 0
    assert known.ranking("fisher") is known.fisher
    assert known.ranking("spensegpt+") is known.scores
    assert known.ranking("spensegpt")[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_large_vocabulary_is_asked_at_fewer_tokens(
    kind: str, model, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = model(kind)
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    vocabulary = network.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(sensitivity, "LOGITS", 19 * vocabulary // 3)
    found = streamed(directory).fisher
    kept = scored_positions(network, 19, sensitivity.LOGITS)
    assert kept.tolist() == [0, 4, 8, 12, 16]
    torch.testing.assert_close(
        logits_at(network, WINDOWS[0], kept), network(input_ids=WINDOWS[:1]).logits[0, kept]
    )
    monkeypatch.setattr(sensitivity, "logits_at", lambda net, tokens, at: net(tokens[None]).logits[0, at])
    for cost, wanted in zip(found, streamed(directory).fisher, strict=True):
        torch.testing.assert_close(cost, wanted)
    monkeypatch.setattr(sensitivity, "LOGITS", 1 << 25)
    assert not torch.allclose(found[0], streamed(directory).fisher[0])


def test_bf16_between_layers_changes_little(model, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    exact = streamed(model("llama")).fisher
    rounded = streamed(model("llama"), torch.bfloat16, steps=lambda *step: steps.append(step)).fisher
    for a, b in zip(rounded, exact, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()
    assert steps == [(i, 6) for i in range(1, 7)]
    mapped = streamed(model("llama"), torch.bfloat16, on_disk(tmp_path)).fisher
    assert all(torch.equal(a, b) for a, b in zip(mapped, rounded, strict=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN or infinity"),
        ("model.layers.0.self_attn.k_proj.weight", r"model\.layers\.0\.self_attn\.k_proj\.weight.*NaN"),
        ("lm_head.weight", "calibration loss.*NaN or infinite"),
        ("model.norm.weight", "calibration loss.*NaN or infinite"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_named_where_it_is(tensor: str, message: str, value: float, model, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        streamed(changed(model("llama"), tmp_path, {tensor: value}))


def test_states_that_overflow_name_their_layer(model, tmp_path: Path) -> None:
    huge = {f"model.layers.1.mlp.{p}_proj.weight": 1e38 for p in ("gate", "up", "down")}
    with pytest.raises(CheckpointError, match=r"module model\.layers\.1: .*NaN or infin"):
        streamed(changed(model("llama"), tmp_path, huge))


def changed(directory: Path, out: Path, values: dict[str, float]) -> Path:
    for path in directory.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    state = load_file(out / "model.safetensors")
    for name, value in values.items():
        state[name].view(-1)[0] = value
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out
