"""Gate and up fitted to the MLP's intermediate values, against row-by-row solves and finite differences."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu, silu

from tests.tiny_families import make_family
from tests.tiny_text import write_text
from vllm_spense.format import Checkpoint
from vllm_spense.pruning import PruneConfig, layer, prune
from vllm_spense.pruning.solvers import joint
from vllm_spense.pruning.solvers.joint import _slope, _step, _value, fit_jointly, output_losses, split, stride
from vllm_spense.pruning.solvers.refit import conjugate_gradients

T, R, K = 300, 6, 16


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, K] with correlated features, and two weights [R, K]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, K, generator=g) + 2 * torch.randn(T, 1, generator=g)
    return x, torch.randn(R, K, generator=g) / 4, torch.randn(R, K, generator=g) / 4


def hessian(x: torch.Tensor) -> torch.Tensor:
    return 2 / len(x) * x.t() @ x


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros_like(weight).unflatten(1, (-1, 4))
    kept.scatter_(2, weight.abs().unflatten(1, (-1, 4)).topk(2, 2).indices, 1.0)
    return weight * kept.flatten(1)


@pytest.mark.parametrize("chunk", [T, 64])
def test_a_step_is_the_weighted_ridge_regression_of_each_row(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "CHUNK", chunk)
    x, weight, _ = inputs()
    weight = two_of_four(weight)
    slope, missing = torch.randn(T, R).exp(), torch.randn(T, R)
    squares = slope.square().split(joint.CHUNK)
    found = _step(weight, x, squares, (slope * missing).t() @ x, x.t() @ x, 60)
    for row in range(R):
        kept = weight[row] != 0
        a = (slope[:, row, None] * x[:, kept]).double()
        h = a.t() @ a
        mean = slope[:, row].square().mean() * x[:, kept].square().sum(0)
        h += joint.RIDGE * K / T * torch.diag(mean)
        best = torch.linalg.solve(h, a.t() @ missing[:, row].double())
        torch.testing.assert_close((found - weight)[row, kept].double(), best, rtol=1e-3, atol=1e-5)
    assert torch.equal(found != 0, weight != 0)


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_last_step_is_as_long_as_its_image_says(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = inputs()
    slope, missing = torch.randn(T, R).exp(), torch.randn(T, R)
    system = two_of_four(weight), x, [slope.square()], (slope * missing).t() @ x, x.t() @ x, iterations
    found = _step(*system)
    monkeypatch.setattr(joint, "conjugate_gradients", lambda *given: conjugate_gradients(*given[:5]))
    torch.testing.assert_close(found, _step(*system), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", [silu, gelu])
@pytest.mark.parametrize("which", [0, 1])
def test_slopes_are_those_of_finite_differences(activation: object, which: int) -> None:
    inner = [torch.randn(5, 3, dtype=torch.float64) for _ in range(2)]
    ahead, behind = ([z.clone() for z in inner] for _ in range(2))
    ahead[which] += 1e-6
    behind[which] -= 1e-6
    expected = (_value(activation, ahead) - _value(activation, behind)) / 2e-6
    torch.testing.assert_close(_slope(activation, inner, which), expected)
    if which == 0:
        single = (activation(inner[0] + 1e-6) - activation(inner[0] - 1e-6)) / 2e-6
        torch.testing.assert_close(_slope(activation, inner[:1], 0), single)


@pytest.mark.parametrize("linears", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_the_intermediate_values_come_closer(
    linears: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "RIDGE", 5.0)
    x, *weights = inputs(1)
    originals = weights[:linears]
    biases = [torch.linspace(-1, 1, R) if biased else None for _ in originals]
    pruned = [two_of_four(w) for w in originals]
    fitted = fit_jointly(silu, pruned, originals, biases, x, hessian(x), 8)

    def error(candidates: list[torch.Tensor]) -> torch.Tensor:
        def value(ws: list[torch.Tensor]) -> torch.Tensor:
            return _value(
                silu, [x @ w.t() + (0 if b is None else b) for w, b in zip(ws, biases, strict=True)]
            )

        return (value(candidates) - value(originals)).square().sum(0)

    assert (error(fitted) < error(pruned)).all()
    assert error(fitted).sum() < 0.3 * error(pruned).sum()
    for new, old in zip(fitted, pruned, strict=True):
        assert torch.equal(new != 0, old != 0)
    same = fit_jointly(silu, originals, originals, biases, x, hessian(x), 8)
    for new, old in zip(same, originals, strict=True):
        torch.testing.assert_close(new, old)


def test_rows_are_fitted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, *originals = inputs(2)
    pruned = [two_of_four(w) for w in originals]
    biases = [torch.randn(R), None]
    whole = fit_jointly(silu, pruned, originals, biases, x, hessian(x), 3)
    monkeypatch.setattr(joint, "ROWS", 4)
    monkeypatch.setattr(joint, "CHUNK", 70)
    for part, all_rows in zip(
        fit_jointly(silu, pruned, originals, biases, x, hessian(x), 3), whole, strict=True
    ):
        torch.testing.assert_close(part, all_rows)


def test_at_most_so_many_tokens() -> None:
    """32 per feature, 65536 in all: SmolLM2's and Qwen3-32B's calibration, and one that is small enough."""
    assert stride(64, 512, 576) == 2
    assert stride(128, 16384, 5120) == 32
    assert stride(8, 64, 16) == 1
    assert stride(8, 65, 16) == 2
    for samples, tokens, features in ((64, 512, 576), (3, 1000, 20), (7, 33, 5)):
        every = stride(samples, tokens, features)
        assert samples * (tokens // every) <= 32 * features < samples * tokens


def test_the_tokens_are_evenly_spaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = make_family("llama", tmp_path / "model"), write_text(tmp_path / "text.txt")
    given: list[torch.Tensor] = []
    fitted: list[torch.Tensor] = []
    judges: list[torch.Tensor] = []

    def see_split(x: torch.Tensor, every: int) -> tuple[torch.Tensor, torch.Tensor]:
        given.append(x.float().cpu())
        return split(x, every)

    def see(*args: object) -> list[torch.Tensor]:
        fitted.append(args[4])
        return fit_jointly(*args)

    def judge(*args: object) -> list[float]:
        judges.append(args[5])
        return output_losses(*args)

    monkeypatch.setattr(layer, "split", see_split)
    monkeypatch.setattr(layer, "fit_jointly", see)
    monkeypatch.setattr(layer, "output_losses", judge)
    config = PruneConfig(calibration=str(text), num_samples=8, seq_len=48, alignment=8, restart=True)
    for per_feature in (1 << 20, 2):
        monkeypatch.setattr(joint, "TOKENS_PER_FEATURE", per_feature)
        with warnings.catch_warnings(action="ignore"):
            prune(model, tmp_path / f"out{per_feature}", config)
    whole = torch.stack(given[:8])
    assert whole.shape[:2] == (8, 48)
    kept_back = torch.arange(48) % 16 == 15
    assert torch.equal(fitted[0], whole[:, ~kept_back].flatten(0, 1))
    assert torch.equal(judges[0], whole[:, kept_back].flatten(0, 1))
    whole = torch.stack(given[len(given) // 2 :][:8])
    every = stride(8, 48, whole.shape[2])
    assert every > 1
    assert torch.equal(fitted[len(fitted) // 2], whole[:, ::every].flatten(0, 1))
    assert torch.equal(judges[len(judges) // 2], whole[:, every // 2 :: 16 * every].flatten(0, 1))


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_checkpoint(kind: str, tmp_path: Path) -> None:
    """Other weights than without, 2:4 as before, and the dense rows exactly the same."""
    model, text = make_family(kind, tmp_path / "model"), write_text(tmp_path / "text.txt", 8000)
    found = []
    for iterations in (0, 2):
        out = tmp_path / f"out{iterations}"
        config = PruneConfig(
            calibration=str(text),
            num_samples=64,
            seq_len=48,
            alignment=8,
            weight_dtype="bf16",
            allocation="uniform",
            regroup=0,
            joint=iterations,
        )
        with warnings.catch_warnings(action="ignore"):
            prune(model, out, config)
        checkpoint = Checkpoint(out)
        name = next(n for n in checkpoint.require_spense().modules if "up_proj" in n or "fc1" in n)
        found.append(checkpoint.module_tensors(name))
    plain, fitted = found
    assert torch.equal(plain["dense_weight"], fitted["dense_weight"])
    assert not torch.equal(plain["sparse_values"], fitted["sparse_values"])
    assert torch.equal(plain["sparse_meta"], fitted["sparse_meta"])


@pytest.mark.parametrize("gated", [True, False])
def test_output_losses_are_those_of_the_mlp(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "CHUNK", 64)
    monkeypatch.setattr(joint, "ROWS", 4)
    x, gate, up = inputs()
    dense = [gate, up] if gated else [gate]
    pruned = [two_of_four(weight) for weight in dense]
    biases = [torch.randn(R), None][: len(dense)]
    down = torch.randn(5, R)

    def output(weights: list[torch.Tensor]) -> torch.Tensor:
        value = silu(x @ weights[0].t() + biases[0])
        return (value * (x @ weights[1].t()) if gated else value) @ down.t()

    found = output_losses(silu, [pruned, dense], dense, biases, down, x)
    assert found == [pytest.approx(float((output(pruned) - output(dense)).square().sum()), rel=1e-4), 0.0]


def test_a_fit_that_does_no_good_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layer where it spoils the weights, and nowhere else; that is on record and in the card."""
    model, text = make_family("llama", tmp_path / "model"), write_text(tmp_path / "text.txt", 8000)
    calls: list[int] = []

    def spoilt(*args: object) -> list[torch.Tensor]:
        calls.append(1)
        fitted = fit_jointly(*args)
        return [2 * weight for weight in fitted] if len(calls) == 2 else fitted

    monkeypatch.setattr(layer, "fit_jointly", spoilt)
    config = PruneConfig(
        calibration=str(text),
        num_samples=64,
        seq_len=48,
        alignment=8,
        allocation="uniform",
        weight_dtype="bf16",
    )
    with warnings.catch_warnings(action="ignore"):
        prune(model, tmp_path / "out", config)
    provenance = Checkpoint(tmp_path / "out").config["quantization_config"]["provenance"]
    assert "model.layers.1.mlp" in provenance["joint_left_out"]
    assert "model.layers.0.mlp" not in provenance["joint_left_out"]
    assert "left out in model.layers.1.mlp" in (tmp_path / "out" / "README.md").read_text()
