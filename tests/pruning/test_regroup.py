"""Groups of down's columns against brute force in fp64, and the whole run with them."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.pruning.problems import hessian, inputs, is_24, options, random_weight, without_encoding
from tests.tiny import INTER
from vllm_spense.evaluation import load_tokenizer
from vllm_spense.format import Checkpoint, Layout
from vllm_spense.format.codecs import codec_names
from vllm_spense.models.parts import Mlp
from vllm_spense.pruning import PruneConfig, PruneProgress, pipeline, prune
from vllm_spense.pruning.layer import LayerPruner, PrunedLayer, encode, reorder_rows
from vllm_spense.pruning.solvers.hessian import Hessian
from vllm_spense.pruning.solvers.obs import factorize, prune_magnitude
from vllm_spense.pruning.solvers.regroup import regroup
from vllm_spense.pruning.solvers.solver import Solver
from vllm_spense.text import sample_windows, tokenize

DENSE = 128  # of 208: see test_prune
SPARSE = INTER - DENSE
GATE, UP, DOWN = (f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down"))


def measure(weight: torch.Tensor, inverse: torch.Tensor, order: torch.Tensor) -> float:
    """What dropping the best two of each group costs, row by row and pair by pair, in fp64."""
    total = 0.0
    for group in order.view(-1, 4).tolist():
        for row in weight.double():
            costs = []
            for pair in map(list, combinations(group, 2)):
                block = inverse.double()[pair][:, pair]
                costs.append(float(row[pair] @ torch.linalg.solve(block, row[pair])))
            total += min(costs)
    return total


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the damped inverse of a Hessian."""
    h = hessian(inputs(columns, seed=seed)).matrix("test").double()
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(columns)
    return random_weight(rows, columns, seed), torch.linalg.inv(damped).float()


@pytest.mark.parametrize("columns", [16, 24, 28])
def test_no_round_of_regrouping_loses(columns: int) -> None:
    weight, inverse = problem(5, columns, columns)
    orders = [regroup(weight, inverse, rounds, seed=3) for rounds in range(7)]
    assert torch.equal(orders[0], torch.arange(columns))
    assert all(torch.equal(order.sort().values, orders[0]) for order in orders)
    losses = [measure(weight, inverse, order) for order in orders]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(orders[-1], regroup(weight, inverse, 6, seed=3))
    assert not torch.equal(orders[-1], regroup(weight, inverse, 6, seed=4))


@pytest.mark.parametrize("seed", range(4))
def test_two_groups_get_the_best_of_35_splits(seed: int) -> None:
    weight, inverse = problem(6, 8, seed)
    splits = [torch.tensor([*s, *sorted(set(range(8)) - set(s))]) for s in combinations(range(8), 4)]
    best = min(measure(weight, inverse, order) for order in splits if 0 in order[:4])
    found = measure(weight, inverse, regroup(weight, inverse, 1))
    assert found == pytest.approx(best, rel=1e-5)
    assert best < measure(weight, inverse, torch.arange(8))


def test_one_group_and_many_rows() -> None:
    weight, inverse = problem(3000, 16, 0)
    some = weight[::3]  # at most 1024
    assert torch.equal(regroup(weight, inverse, 4), regroup(some, inverse, 4))
    assert torch.equal(regroup(weight[:, :4], inverse[:4, :4], 4), torch.arange(4))


@pytest.mark.parametrize("sparse", [24, 40])
@pytest.mark.parametrize(("kind", "weight_dtype"), [("glu", "fp8"), ("plain", "bf16")])
def test_regrouping_a_layer(kind: str, weight_dtype: str, sparse: int) -> None:
    """The MLP computes what it did before; dead inputs cost nothing, so they do not steer the groups."""
    torch.manual_seed(0)
    hidden, wide = 16, 40
    names = ["gate", "up"] if kind == "glu" else ["up"]
    inner = {name: nn.Linear(hidden, wide) for name in names}
    mlp = Mlp("mlp", inner, "down", nn.Linear(wide, hidden))
    x = torch.randn(7, hidden)

    def outputs() -> torch.Tensor:
        values = [linear(x) for linear in mlp.inner.values()]
        return mlp.down(nn.functional.silu(values[0]) * values[-1])

    samples = inputs(wide)
    for sample in samples:
        sample[:, [1, 2, 7]] = 0
    h = hessian(samples).matrix("test")
    with torch.no_grad():
        rows = Layout("output", wide, hidden, sparse)
        weights = {name: prune_magnitude(linear.weight + 1, rows) for name, linear in inner.items()}
        config = options(regroup=6, weight_dtype=weight_dtype)
        encoded = {name: encode(weight, rows, config.codecs) for name, weight in weights.items()}
        result = PrunedLayer(encoded, dict.fromkeys(names, rows))
        result.layouts["down"] = Layout("input", hidden, wide, sparse)
        earlier = torch.randperm(wide)
        result.row_order = dict.fromkeys(names, earlier)
        before, down = outputs(), mlp.down.weight.clone()
        order = LayerPruner(config, None)._regroup(mlp, result, h)
        torch.testing.assert_close(outputs(), before)
    assert torch.equal(mlp.down.weight, down[:, order])
    assert torch.equal(order[sparse:], torch.arange(sparse, wide)), "dense indices stay"
    for name in names:
        expected = encode(weights[name][order], rows, config.codecs)
        assert result.tensors[name].keys() == expected.keys()
        for short, tensor in expected.items():
            assert torch.equal(result.tensors[name][short].view(torch.uint8), tensor.view(torch.uint8)), short
        assert torch.equal(result.row_order[name], earlier[order])
    factor = factorize(h, 0.01, name="test")
    inverse = (factor.upper.t() @ factor.upper)[:sparse, :sparse]
    alive = down[:, :sparse].clone()
    alive[:, [1, 2, 7]] = 0
    assert torch.equal(order[:sparse], regroup(alive, inverse, 6))
    assert not torch.equal(order[:sparse], regroup(down[:, :sparse], inverse, 6))


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("sparse", [0, 24, 40])
def test_rows_of_every_codec_can_be_reordered(name: str, sparse: int) -> None:
    """Encoded rows in another order are the same bytes as rows that were reordered and then encoded."""
    config = options().model_copy(update={"weight_dtype": name})
    layout = Layout("output", 40, 16, sparse)
    weight = prune_magnitude(random_weight(40, 16), layout)
    order = torch.cat([torch.randperm(sparse), sparse + torch.randperm(40 - sparse)])
    expected = encode(weight[order], layout, config.codecs)
    found = reorder_rows(encode(weight, layout, config.codecs), layout, order)
    assert found.keys() == expected.keys()
    for short, tensor in expected.items():
        assert torch.equal(found[short].view(torch.uint8), tensor.view(torch.uint8)), short


# -- the whole run ---------------------------------------------------------------------------------


def run_options(text: Path, **changes: Any) -> PruneConfig:
    return options(**{"calibration": str(text), "num_samples": 8, "seq_len": 64} | changes)


PAPER = {"preset": "spensegpt+", "weight_dtype": "bf16"}


def windows_of(model: Path, text: Path) -> torch.Tensor:
    return sample_windows(tokenize(load_tokenizer(model), text.read_text()), 8, 64, seed=0)


def without_pruning(
    model: Path, out: Path, config: PruneConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], list[Solver]]:
    """Weights and biases of both layers behind a run whose solver changes nothing, and its solvers."""
    stored: dict[str, torch.Tensor] = {}
    solvers: list[Solver] = []

    def keep(pruned: PrunedLayer, layer: Any, source: Any) -> Any:
        for name, tensors in pruned.tensors.items():
            stored[f"{name}.weight"] = tensors["weight"]
            if name in pruned.row_order:
                stored[f"{name}.bias"] = source.checkpoint.load(f"{name}.bias")[pruned.row_order[name]]
        if layer.name.endswith(".1"):
            raise KeyboardInterrupt
        return {"nothing": torch.zeros(1)}, {}

    def unchanged(solver: Solver, matrix: torch.Tensor, layout: Layout) -> torch.Tensor:
        solvers.append(solver)
        return matrix

    monkeypatch.setattr(Solver, "prune", unchanged)
    monkeypatch.setattr(pipeline, "pack_layer", keep)
    without_encoding(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, config)
    return stored, solvers


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_reordering_alone_leaves_the_function(
    keep_bytes: int, dense_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("vllm_spense.pruning.layer.KEEP_BYTES", keep_bytes)
    config = run_options(text_file, **PAPER, regroup=3)
    stored, solvers = without_pruning(dense_model, tmp_path / "out", config, monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(dense_model, dtype=torch.float32)
    ids = torch.arange(40)[None]
    before = model(ids).logits
    found = model.state_dict()[f"{GATE}.weight"].tolist()
    order = [found.index(row) for row in stored[f"{GATE}.weight"].tolist()]
    assert sorted(order) == list(range(INTER))
    assert order[:SPARSE] != sorted(order[:SPARSE]), "regrouped"
    assert order[SPARSE:] == sorted(order[SPARSE:])
    model.load_state_dict(stored, strict=False)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
    assert len(solvers) == 6
    seen = Hessian(INTER)
    model = AutoModelForCausalLM.from_pretrained(dense_model, dtype=torch.float32)
    model.get_submodule(DOWN).register_forward_pre_hook(lambda _, args: seen.add(args[0][..., order]))
    with torch.inference_mode():
        for window in windows_of(dense_model, text_file):
            model(window[None])
    assert solvers[2].name == DOWN
    expected = seen.matrix("test")
    assert (solvers[2].h - expected).norm() < 0.01 * expected.norm()


def test_written_rows_columns_and_biases_belong_together(
    dense_model: Path, text_file: Path, tmp_path: Path
) -> None:
    prune(dense_model, tmp_path / "out", run_options(text_file, **PAPER, regroup=4))
    checkpoint, source = Checkpoint(tmp_path / "out"), Checkpoint(dense_model)
    before, after = (
        list(zip(*(c.load(f"{name}.bias").tolist() for name in (GATE, UP)), strict=True))
        for c in (source, checkpoint)
    )
    order = torch.tensor([before.index(pair) for pair in after])
    assert sorted(order.tolist()) == list(range(INTER))
    assert order[:SPARSE].tolist() != sorted(order[:SPARSE].tolist())
    for name in (GATE, UP, DOWN):
        after, before = checkpoint.module_weight(name), source.load(f"{name}.weight").float()
        if name == DOWN:
            after, before = after.t(), before.t()
        similar = nn.functional.normalize(after) @ nn.functional.normalize(before).t()
        assert torch.equal(similar.argmax(1), order)
    assert is_24(checkpoint.module_weight(DOWN)[:, :SPARSE])


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("preset", ["spensegpt+", "guided"])
def test_a_resumed_run_gives_the_same_bytes(
    preset: str, dense_model: Path, text_file: Path, tmp_path: Path
) -> None:
    changes = {"regroup": 2, "order": "energy"}
    config = run_options(text_file, preset=preset, **changes)
    report = prune(dense_model, tmp_path / "whole", config)

    def stop(event: PruneProgress) -> None:
        if (event.stage, event.layer) == ("layers", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(dense_model, tmp_path / "out", config, stop)
    on_disk = {"resume": True, "cache_activations": "disk"}
    prune(dense_model, tmp_path / "out", config.model_copy(update=on_disk))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert all(0 < found < 1 for found in report.losses.values())
    card = (tmp_path / "out" / "README.md").read_text()
    default = options(preset=preset)
    for name, value in changes.items():
        assert (f"{name}={value!r}" in card) == (value != getattr(default, name)), name
