"""Rounding that later columns make up for: against the slow definition, and what it gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pruning.problems import hessian, inputs, loss, options, random_weight
from vllm_spense.evaluation import load_model
from vllm_spense.format import Checkpoint, Codecs, Layout, LinearFormat
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.pruning.layer import LayerPruner, PrunedLayer, decode, encode
from vllm_spense.pruning.solvers.obs import factorize
from vllm_spense.pruning.solvers.rounding import round_columns, settle_columns
from vllm_spense.pruning.solvers.solver import Solver
from vllm_spense.pruning.targets import LayerTargets
from vllm_spense.verification import verify

LAYOUTS = [
    Layout("output", 12, 192, 0),
    Layout("output", 12, 192, 8),
    Layout("output", 12, 192, 12),
    Layout("input", 12, 192, 64),
    Layout("input", 12, 192, 192),
]


def slowly_rounded(weight: torch.Tensor, kept: torch.Tensor, h: torch.Tensor, step: float) -> torch.Tensor:
    """OPTQ by its first equations: behind each column by the inverse of what is left of the Hessian."""
    result = weight.double()
    left = h.double()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(left)
        stored = (result[:, j] / step).round() * step * kept[:, j]
        error = (result[:, j] - stored) / inverse[0, 0]
        result[:, j:] -= error[:, None] * inverse[0]
        result[:, j] = stored
        left = left[1:, 1:]
    return result


@pytest.mark.parametrize("block_size", [4, 7, 64])
def test_it_is_the_definition(block_size: int) -> None:
    weight = random_weight(5, 24)
    h = hessian(inputs(24)).matrix("test")
    kept = torch.rand(5, 24, generator=torch.Generator().manual_seed(1)) < 0.7
    factor = factorize(h, 0.01, name="test")
    damped = h.clone()
    damped.diagonal().add_(0.01 * h.diagonal().mean())
    found = round_columns(
        weight * kept, kept, factor.upper, lambda _, values: (values / 0.5).round() * 0.5, block_size
    )
    expected = slowly_rounded(weight * kept, kept, damped, 0.5)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    assert not found[~kept].any()


@pytest.mark.parametrize("block_size", [4, 7, 64])
def test_settled_values_gain_nothing_one_by_one(block_size: int) -> None:
    """Every pass lowers the error, until no single value has a better place; what is pruned stays zero."""
    weight, grid = random_weight(5, 24), torch.arange(-8, 9) * 0.5
    h = hessian(inputs(24)).matrix("test")
    kept = torch.rand(5, 24, generator=torch.Generator().manual_seed(1)) < 0.7
    target = weight * kept

    def rounded(column: int, values: torch.Tensor) -> torch.Tensor:
        return grid[(values[:, None] - grid).abs().argmin(1)]

    found = rounded(0, target.flatten()).view_as(target) * kept
    before = loss(found, target, h)
    for _ in range(8):
        found = settle_columns(found, target, kept, h, rounded, 1, block_size)
        assert loss(found, target, h) <= before * (1 + 1e-6)
        before = loss(found, target, h)
    assert not found[~kept].any()
    for row, column in kept.nonzero().tolist():
        for value in grid:
            other = found.clone()
            other[row, column] = value
            assert loss(other, target, h) >= before * (1 - 1e-5)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("order", ["natural", "energy"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_codes_that_answer_to_each_other_lose_less(layout: Layout, order: str, name: str) -> None:
    """Less than the nearest codes of the same pruned weight; what is stored is what the solver chose."""
    config = options(weight_dtype=name, order=order)
    h = hessian(inputs(192, samples=30)).matrix("test")
    original = random_weight(12, 192)
    solver = Solver(config, h, "test")
    pruned = solver.prune(original, layout)
    codecs = Codecs.of(name)
    rounded, roundings = solver.round(pruned, LinearFormat(layout, codecs))
    stored = decode(encode(rounded, layout, codecs, roundings), layout, codecs)
    torch.testing.assert_close(stored, rounded, atol=0, rtol=1e-6)
    assert not stored[pruned == 0].any()
    nearest = decode(encode(pruned, layout, codecs), layout, codecs)
    assert loss(stored, original, h) < 0.9 * loss(nearest, original, h)


def test_a_region_is_rounded_by_its_own_codec() -> None:
    """The 2:4 region in NF4: its errors go to the dense one, which is left to FP8."""
    layout = LAYOUTS[3]
    h = hessian(inputs(192, samples=30)).matrix("test")
    original = random_weight(12, 192)
    solver = Solver(options(), h, "test")
    pruned = solver.prune(original, layout)
    linear = LinearFormat(layout, Codecs.of({"sparse": "nf4", "dense": "fp8"}))
    rounded, roundings = solver.round(pruned, linear)
    stored = linear.decode(linear.encode(rounded, roundings=roundings))
    torch.testing.assert_close(stored[:, :64], rounded[:, :64], atol=0, rtol=1e-6)
    assert loss(stored, original, h) < loss(linear.decode(linear.encode(pruned)), original, h)


def test_fine_codecs_and_other_methods_round_to_nearest() -> None:
    layout = LAYOUTS[1]
    h = hessian(inputs(192)).matrix("test")
    weight = random_weight(12, 192)
    for config, name in (
        (options(), "fp8"),
        (
            options(
                method="magnitude",
                selection="spensegpt",
                refit=0,
                refine=0,
                order="natural",
                joint=0,
                regroup=0,
            ),
            "nf4",
        ),
    ):
        solver = Solver(config, h, "test")
        pruned = solver.prune(weight, layout)
        rounded, roundings = solver.round(pruned, LinearFormat(layout, Codecs.of(name)))
        assert rounded is pruned
        assert not roundings


@pytest.mark.parametrize("method", ["guided", "magnitude"])
def test_regions_of_a_model_in_codecs_of_their_own(
    dense_model: Path, text_file: Path, tmp_path: Path, method: str
) -> None:
    """NF4 where it is 2:4, FP8 where it is dense, bf16 in attention: written, sound, read back, resumed."""
    config = PruneConfig(
        preset=method,
        weight_dtype="bf16",
        sparse_dtype="nf4",
        dense_dtype="fp8",
        alignment=16,
        calibration=None if method == "magnitude" else str(text_file),
        num_samples=8,
        seq_len=32,
    )
    prune(dense_model, tmp_path / "out", config)
    verify(tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    spense = checkpoint.require_spense()
    assert spense.version == 2
    mixed = Codecs.of({"sparse": "nf4", "dense": "fp8"})
    assert {checkpoint.linear(name).codecs for name in spense.modules} == {mixed}
    assert all(name.rpartition(".")[0].endswith("mlp") for name in spense.modules)
    assert "2:4 regions NF4, dense regions FP8; all else bf16" in (tmp_path / "out" / "README.md").read_text()
    state = load_model(tmp_path / "out").state_dict()
    for name in spense.modules:
        torch.testing.assert_close(state[f"{name}.weight"].float(), checkpoint.module_weight(name))


def test_a_killed_run_with_regions_of_their_own_goes_on(
    dense_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions: dict[str, Any] = {
        "weight_dtype": "bf16",
        "sparse_dtype": "nf4",
        "dense_dtype": "fp8",
        "alignment": 16,
    }
    config = PruneConfig(calibration=str(text_file), num_samples=8, seq_len=32, pilot_samples=2, **regions)
    prune(dense_model, tmp_path / "whole", config)
    real = LayerPruner.prune
    layers: list[int] = []

    def killed(self: LayerPruner, index: int, targets: LayerTargets) -> PrunedLayer:
        layers.append(index)
        if layers == [0, 1]:
            raise KeyboardInterrupt
        return real(self, index, targets)

    monkeypatch.setattr(LayerPruner, "prune", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(dense_model, tmp_path / "out", config)
    prune(dense_model, tmp_path / "out", config.model_copy(update={"resume": True}))
    assert layers == [0, 1, 1]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
