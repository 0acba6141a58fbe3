"""The options that no paper preset uses, each against brute force or a slow reference in fp64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny import HIDDEN, INTER
from vllm_spense.evaluation import load_tokenizer
from vllm_spense.format import FP8_DTYPE, Checkpoint, Layout, dequantize, quantize_per_channel
from vllm_spense.models.parts import Mlp
from vllm_spense.pruning import PruneConfig, PruneProgress, pipeline, prune
from vllm_spense.pruning.config import PRESETS
from vllm_spense.pruning.hessian import Hessian
from vllm_spense.pruning.layer import LayerPruner, PrunedLayer
from vllm_spense.pruning.moments import DenseStream, InputStatistics
from vllm_spense.pruning.plan import plan
from vllm_spense.pruning.regroup import regroup
from vllm_spense.pruning.rounding import round_and_refit
from vllm_spense.pruning.solve import Solver
from vllm_spense.pruning.solvers import factorize, obs_rows
from vllm_spense.text import sample_windows, tokenize

CPU = torch.device("cpu")
DENSE = 128  # of 208: see test_prune
SPARSE = INTER - DENSE
LAYOUTS = [Layout("output", 12, 48, 8), Layout("input", 12, 48, 24), Layout("input", 12, 48, 48)]
GATE, UP, DOWN = (f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down"))


def inputs(features: int, samples: int = 16, tokens: int = 30, seed: int = 0) -> list[torch.Tensor]:
    """Samples [tokens, features] that share a few directions, of sizes from 0.1 to 10 in no order."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, features, generator=generator)
    sizes = torch.logspace(-1, 1, features)[torch.randperm(features, generator=generator)]
    return [
        (
            torch.randn(tokens, 4, generator=generator) @ mix
            + torch.randn(tokens, features, generator=generator)
        )
        * sizes
        for _ in range(samples)
    ]


def hessian(samples: list[torch.Tensor], **options: bool) -> Hessian:
    h = Hessian(samples[0].shape[1], **options)
    for x in samples:
        h.add(x)
    return h


def second_moments(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
    """2 E[l rᵀ] in fp64, token by token."""
    pairs = [(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)]
    return 2 * sum(torch.outer(a.double(), b.double()) for a, b in pairs) / len(pairs)


def random_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(100 + seed))


def loss(weight: torch.Tensor, original: torch.Tensor, h: torch.Tensor) -> float:
    """Squared output error in fp64."""
    change = (weight - original).double()
    return float(((change @ h.double()) * change).sum())


def options(**changes: Any) -> PruneConfig:
    return PruneConfig(**({"calibration": "x"} | changes))


def is_24(region: torch.Tensor) -> bool:
    return bool(((region.reshape(region.shape[0], -1, 4) != 0).sum(-1) <= 2).all())


# -- regroup ---------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("kind", ["glu", "plain"])
def test_regrouping_a_layer(kind: str, sparse: int) -> None:
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
        weights = {name: linear.weight.clone() + 1 for name, linear in inner.items()}
        rows = Layout("output", wide, hidden, sparse)
        result = PrunedLayer(weights.copy(), dict.fromkeys(names, rows))
        result.layouts["down"] = Layout("input", hidden, wide, sparse)
        earlier = torch.randperm(wide)
        result.row_order = dict.fromkeys(names, earlier)
        before, down = outputs(), mlp.down.weight.clone()
        order = LayerPruner(options(regroup=6), None)._regroup(mlp, result, h)
        torch.testing.assert_close(outputs(), before)
    assert torch.equal(mlp.down.weight, down[:, order])
    assert torch.equal(order[sparse:], torch.arange(sparse, wide)), "dense indices stay"
    for name in names:
        assert torch.equal(result.weights[name], weights[name][order])
        assert torch.equal(result.row_order[name], earlier[order])
    factor = factorize(h, 0.01, name="test")
    inverse = (factor.upper.t() @ factor.upper)[:sparse, :sparse]
    alive = down[:, :sparse].clone()
    alive[:, [1, 2, 7]] = 0
    assert torch.equal(order[:sparse], regroup(alive, inverse, 6))
    assert not torch.equal(order[:sparse], regroup(down[:, :sparse], inverse, 6))


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_energy_order_is_a_permuted_sweep(layout: Layout) -> None:
    rows, cols = layout.sparse_shape
    weight, h = random_weight(12, 48), hessian(inputs(48)).matrix("test")
    energies = [float(h.diagonal()[g : g + 4].sum()) for g in range(0, cols, 4)]
    groups = sorted(range(cols // 4), key=lambda g: -energies[g])
    order = torch.tensor([4 * g + i for g in groups for i in range(4)] + list(range(cols, 48)))
    factor = factorize(h[order][:, order], 0.01, name="test")
    expected = weight.clone()
    expected[:rows, order] = obs_rows(weight[:rows, order], cols, factor.upper, factor.dead)
    alone = {"refit": 0, "refine": 0}
    found = Solver(options(order="energy", **alone), h, "test").prune(weight, layout)
    assert torch.equal(found, expected)
    assert is_24(found[:rows, :cols])
    assert torch.equal(found[rows:], weight[rows:])
    natural = Solver(options(order="natural", **alone), h, "test").prune(weight, layout)
    assert not torch.equal(found, natural)


def test_the_next_linear_has_the_same_order() -> None:
    """Gate and up share a solver, least squares and all."""
    layout, h = LAYOUTS[0], hessian(inputs(48)).matrix("test")
    both = Solver(options(order="energy"), h, "test")
    both.prune(random_weight(12, 48), layout)
    second = random_weight(12, 48, seed=1)
    alone = Solver(options(order="energy"), h, "test").prune(second, layout)
    assert torch.equal(both.prune(second, layout), alone)
    assert loss(alone, second, h) < 0.9 * loss(
        Solver(options(order="energy", refit=0, refine=0), h, "test").prune(second, layout), second, h
    )


# -- search_damping --------------------------------------------------------------------------------


def test_every_eighth_sample_is_held_out() -> None:
    samples = [x[: 10 + i] for i, x in enumerate(inputs(20, samples=17))]
    found = hessian(samples, hold_out=True)
    halves = found.halves()
    assert halves is not None
    held = [samples[7], samples[15]]
    fit = [x for i, x in enumerate(samples) if i not in (7, 15)]
    for half, expected in zip(halves, (fit, held), strict=True):
        torch.testing.assert_close(half.double(), second_moments(expected, expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.matrix("test"), hessian(samples).matrix("test")), "of all samples"


def test_fewer_than_eight_samples_keep_the_damping() -> None:
    config, samples = options(search_damping=True, damping=0.03), inputs(48, samples=7)
    statistics = InputStatistics(48, CPU, config)
    for x in samples:
        statistics.add(x)
    solver = statistics.moments("test").solver(config, "test")
    assert solver.halves is None
    solver.prune(random_weight(12, 48), LAYOUTS[1])
    assert solver._factor is not None
    assert solver._factor.damping == 0.03


@pytest.mark.parametrize("order", ["natural", "energy"])
def test_the_damping_is_the_best_on_held_out_samples(order: str) -> None:
    layout, alone = LAYOUTS[1], {"refit": 0, "refine": 0}
    cols = layout.sparse
    chosen = set()
    for tokens, seed in ((2, 0), (4, 1), (6, 2), (30, 3), (30, 4), (30, 5)):
        weight, samples = random_weight(12, 48, seed), inputs(48, tokens=tokens, seed=seed)
        sums = hessian(samples, hold_out=True)
        h, halves = sums.matrix("test"), sums.halves()
        assert halves is not None
        visited = Solver(options(order=order), h, "test")._column_order(h, cols)
        visited = torch.arange(48) if visited is None else visited

        def swept(
            h: torch.Tensor, damping: float, weight: torch.Tensor = weight, visited: torch.Tensor = visited
        ) -> torch.Tensor:
            factor = factorize(h[visited][:, visited], damping, name="test")
            return obs_rows(weight[:, visited], cols, factor.upper, factor.dead)[:, visited.argsort()]

        losses = {d: loss(swept(halves[0], d), weight, halves[1]) for d in (0.001, 0.01, 0.1)}
        best = min(losses, key=losses.__getitem__)
        solver = Solver(options(order=order, search_damping=True, **alone), h, "test", halves=halves)
        found = solver.prune(weight, layout)
        assert solver._factor is not None
        assert solver._factor.damping == pytest.approx(best)
        torch.testing.assert_close(found, swept(h, best), rtol=1e-4, atol=1e-5)
        assert solver.raised_damping is None
        chosen.add(best)
    assert len(chosen) > 1, "the samples decide"


# -- asymmetric ------------------------------------------------------------------------------------


def moments_of(samples: list[torch.Tensor], originals: list[torch.Tensor], share: float) -> InputStatistics:
    statistics = InputStatistics(48, CPU, options(asymmetric=share), originals)
    for x in samples:
        statistics.add(x)
    return statistics


def perturbed(samples: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) * x.std(0)
            for i, x in enumerate(samples)]  # fmt: skip


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_cross_moments(share: float) -> None:
    originals = inputs(48)
    samples = perturbed(originals)
    found = moments_of(samples, originals, share).moments("test")
    cross, h = second_moments(originals, samples), second_moments(samples, samples)
    assert found.h is not None
    assert found.cross is not None
    torch.testing.assert_close(found.h.double(), h, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.cross.double(), h + share * (cross - h), rtol=1e-4, atol=1e-3)
    assert (cross - cross.t()).abs().max() > 0.1, "transposing it would be seen"
    order = torch.randperm(48)
    moved = found.take(order)
    assert moved.cross is not None
    assert torch.equal(moved.cross, found.cross[order][:, order])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_target_is_the_least_squares_solution(share: float) -> None:
    """Of W' x = W (x + share (x* - x)) over all tokens, with the damping as a ridge around W."""
    originals = inputs(48)
    samples = perturbed(originals)
    solver = moments_of(samples, originals, share).moments("test").solver(options(asymmetric=share), "test")
    weight = random_weight(12, 48)
    x, original = torch.cat(samples).double(), torch.cat(originals).double()
    ridge = 0.01 * second_moments(samples, samples).diagonal().mean()
    scale, dense = (2 / len(x)) ** 0.5, weight.double()
    left = torch.cat([scale * x, ridge.sqrt() * torch.eye(48)])
    right = torch.cat([scale * (x + share * (original - x)) @ dense.t(), ridge.sqrt() * dense.t()])
    expected = torch.linalg.lstsq(left, right).solution.t()
    assert solver.h is not None
    found = solver._retargeted(weight, solver.h)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert (expected - dense).abs().max() > 0.1
    pruned = solver.prune(weight, LAYOUTS[0])
    assert torch.equal(pruned[8:], found[8:]), "dense rows make up for it, too"
    plain = Solver(options(), solver.h, "test").prune(weight, LAYOUTS[0])

    def error(w: torch.Tensor) -> float:
        return float((left @ w.double().t() - right).square().sum())

    assert error(pruned) < 0.9 * error(plain)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equal_streams_leave_nothing_to_make_up_for(layout: Layout) -> None:
    samples, weight = inputs(48), random_weight(12, 48)
    h = hessian(samples).matrix("test")
    plain = Solver(options(), h, "test").prune(weight, layout)
    assert torch.equal(plain, Solver(options(), h, "test", cross=h).prune(weight, layout))
    both = moments_of(samples, samples, 1.0).moments("test").solver(options(asymmetric=1), "test")
    torch.testing.assert_close(both._retargeted(weight, h), weight, rtol=1e-4, atol=1e-4)
    assert loss(both.prune(weight, layout), weight, h) == pytest.approx(loss(plain, weight, h), rel=0.02)
    assert moments_of(samples, inputs(48, seed=1), 0.0).moments("test").cross.equal(h)


def test_without_it_there_is_no_second_stream() -> None:
    class Inputs:
        def fork(self) -> Inputs:
            return self

    assert LayerPruner(options(), Inputs()).dense is None  # type: ignore[arg-type]
    assert LayerPruner(options(asymmetric=0.1), Inputs()).dense is not None  # type: ignore[arg-type]


# -- rounding --------------------------------------------------------------------------------------


def rounding_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A dense weight, the same with a 2:4 region of 24 columns, and a Hessian."""
    h = hessian(inputs(48)).matrix("test")
    dense = random_weight(12, 48)
    dense[3] = 0
    return dense, Solver(options(), h, "test").prune(dense, LAYOUTS[1]), h


def test_rounded_values_lie_on_the_grid_of_their_row() -> None:
    dense, pruned, h = rounding_problem()
    damped = h + 1e-4 * h.diagonal().mean() * torch.eye(48)
    before = pruned.clone()
    rounded = round_and_refit(pruned, 24, damped, dense @ damped)
    assert torch.equal(pruned, before)
    _, scale = quantize_per_channel(pruned)
    units = rounded / scale[:, None]
    torch.testing.assert_close(units.to(FP8_DTYPE).float(), units, rtol=1e-6, atol=0)
    assert units.abs().max() <= 448
    assert (rounded[:, :24][pruned[:, :24] == 0] == 0).all()
    assert (rounded[3] == 0).all()
    stored = dequantize(*quantize_per_channel(rounded))
    torch.testing.assert_close(stored, rounded, rtol=3e-7, atol=0)  # a scale may differ in its last bit
    nearest = dequantize(*quantize_per_channel(pruned))
    before, by_nearest, by_refit = (loss(w, dense, h) for w in (pruned, nearest, rounded))
    assert 0 < by_refit - before < 0.6 * (by_nearest - before)


def test_weights_that_outgrow_their_scale_saturate() -> None:
    weight = random_weight(12, 48)
    h = hessian(inputs(48)).matrix("test")
    rounded = round_and_refit(weight, 0, h, 3 * weight @ h)
    _, scale = quantize_per_channel(weight)
    assert torch.isfinite(rounded).all()
    assert (rounded.abs().amax(1) <= 448 * scale).all()
    assert (rounded.abs() == 448 * scale[:, None]).any()


@pytest.mark.parametrize("order", ["natural", "energy"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_solver_rounds_every_row(layout: Layout, order: str) -> None:
    h, weight = hessian(inputs(48)).matrix("test"), random_weight(12, 48)
    original = weight.clone()
    rows, cols = layout.sparse_shape
    plain, refitted, bf16 = (
        Solver(options(order=order, **changes), h, "test").prune(weight, layout)
        for changes in ({}, {"rounding": "refit"}, {"rounding": "refit", "weight_dtype": "bf16"})
    )
    assert torch.equal(weight, original)
    assert torch.equal(plain, bf16), "nothing to make up for"
    nearest = dequantize(*quantize_per_channel(plain))
    torch.testing.assert_close(dequantize(*quantize_per_channel(refitted)), refitted, rtol=3e-7, atol=0)
    assert is_24(refitted[:rows, :cols])
    for part in (slice(rows), slice(rows, None))[: 1 + (rows < 12)]:
        before, by_nearest, by_refit = (loss(w[part], weight[part], h) for w in (plain, nearest, refitted))
        assert 0 < by_refit - before < 0.6 * (by_nearest - before)


def test_no_input_no_rounding_error() -> None:
    config = options(rounding="refit")
    layout = Layout("output", 8, 16, 4)
    weight = random_weight(8, 16)
    pruned = Solver(config, torch.zeros(16, 16), "test").prune(weight, layout)
    assert torch.equal(pruned[4:], weight[4:])


# -- the whole run ---------------------------------------------------------------------------------


def run_options(text: Path, **changes: Any) -> PruneConfig:
    return options(**{"calibration": str(text), "num_samples": 8, "seq_len": 64} | changes)


PAPER = {"preset": "spensegpt+", "weight_dtype": "bf16"}
ALL = {"regroup": 2, "order": "energy", "search_damping": True, "asymmetric": 0.5, "rounding": "refit"}


def windows_of(model: Path, text: Path) -> torch.Tensor:
    return sample_windows(tokenize(load_tokenizer(model), text.read_text()), 8, 64, seed=0)


def without_pruning(
    model: Path, out: Path, config: PruneConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], list[Solver]]:
    """Weights and biases of both layers behind a run whose solver changes nothing, and its solvers."""
    stored: dict[str, torch.Tensor] = {}
    solvers: list[Solver] = []

    def keep(pruned: PrunedLayer, layer: Any, source: Any, config: PruneConfig) -> Any:
        for name, matrix in pruned.weights.items():
            stored[f"{name}.weight"] = matrix
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
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, config)
    return stored, solvers


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_reordering_alone_leaves_the_function(
    keep_bytes: int, dense_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("vllm_spense.pruning.layer.KEEP_BYTES", keep_bytes)
    config = run_options(text_file, **PAPER, regroup=3, asymmetric=1)
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
    for solver in solvers:  # both streams are the same model, so they see the same, in the same order
        assert solver.cross is not None
        assert solver.h is not None
        assert (solver.cross - solver.h).norm() < 0.001 * solver.h.norm()
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


def test_the_second_stream_is_the_dense_model(
    dense_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    seen: list[list[torch.Tensor]] = []
    advance: Callable[..., None] = DenseStream.advance

    def record(stream: DenseStream, index: int, layer: Any) -> None:
        advance(stream, index, layer)
        seen.extend([x.clone() for x in inputs] for inputs in (stream.reader, stream.down))

    monkeypatch.setattr(DenseStream, "advance", record)
    prune(dense_model, tmp_path / "out", run_options(text_file, asymmetric=0.5))
    assert sum(x.numel() for inputs in seen[:2] for x in inputs) == 8 * 64 * (HIDDEN + INTER)
    model = AutoModelForCausalLM.from_pretrained(dense_model, dtype=torch.float32)
    expected: list[torch.Tensor] = []
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.down_proj):
            linear.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    with torch.inference_mode():
        for sample, window in enumerate(windows_of(dense_model, text_file)):
            expected.clear()
            model(window[None])
            for inputs, right in zip(seen, expected, strict=True):
                error = (inputs[sample] - right).norm() / right.norm()
                assert error < 0.02, "hidden states wait in bf16"


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize(
    ("changes", "preset"),
    [({"asymmetric": 0.5}, "spensegpt+"), (ALL, "guided")],
    ids=["asymmetric", "all"],
)
def test_a_resumed_run_gives_the_same_bytes(
    changes: dict[str, Any], preset: str, dense_model: Path, text_file: Path, tmp_path: Path
) -> None:
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
    default = options()
    for name, value in changes.items():
        assert (f"{name}={value!r}" in card) == (value != getattr(default, name)), name


# -- border ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"regroup": -1}, "regroup"),
        ({"order": "random"}, "order"),
        ({"asymmetric": 1.5}, "asymmetric"),
        ({"rounding": "up"}, "rounding"),
        ({"method": "wanda", "regroup": 2}, "regroup: only for method 'obs', not 'wanda'"),
        ({"method": "wanda", "order": "energy"}, "order: only for method 'obs'"),
        ({"method": "wanda", "search_damping": True}, "search_damping: only for method 'obs'"),
        ({"method": "magnitude", "asymmetric": 0.5}, "asymmetric: only for method 'obs', not 'magnitude'"),
        ({"preset": "spensegpt+", "rounding": "refit"}, "rounding 'refit' is a least squares: give refit"),
    ],
)
def test_contradictions_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**given)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "guided"])
def test_paper_presets_use_none_of_them(preset: str) -> None:
    config = options(preset=preset)
    assert (config.regroup, config.order, config.search_damping) == (0, "natural", False)
    assert (config.asymmetric, config.rounding) == (0, "nearest")


def test_what_the_plan_counts(dense_model: Path) -> None:
    sizes = {"num_samples": 8, "seq_len": 64, "preset": "spensegpt+", "calibration": "x"}

    def planned(**changes: Any) -> Any:
        return plan(dense_model, PruneConfig(**sizes | changes), "h200")

    base, both = planned(), planned(asymmetric=0.5)
    tokens = 8 * 64
    linears = 3 * HIDDEN * INTER + HIDDEN * 32 * (4 + 2 + 2 + 4)
    recorded = HIDDEN + INTER  # in bf16, as are the hidden states
    assert both.activation_bytes - base.activation_bytes == 2 * tokens * (HIDDEN + recorded)
    forward = both.layers[0].flop - base.layers[0].flop
    assert forward == pytest.approx(2 * tokens * linears, rel=0.15)  # and attention, and biases
    products = sum(2 * tokens * k**2 + 4 / 3 * k**3 for k in (HIDDEN, INTER))
    assert both.layers[0].flop_fp32 - base.layers[0].flop_fp32 == pytest.approx(products)
    for changes, matrices in (
        ({"asymmetric": 0.5}, 1),
        ({"search_damping": True}, 2),
        ({"order": "energy"}, 1),
    ):
        more = planned(**changes).device_bytes - base.device_bytes
        assert more == 4 * matrices * INTER**2
    nearest, refitted = planned(preset="guided"), planned(preset="guided", rounding="refit")
    assert refitted.seconds > nearest.seconds
    bf16 = {"preset": "guided", "weight_dtype": "bf16"}
    assert planned(**bf16, rounding="refit").seconds == planned(**bf16).seconds
