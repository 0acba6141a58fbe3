"""Density, hidden values and thresholds on tiny models, against the same figures taken by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import INTER, LAYERS, VOCAB, make_llama, make_spense
from tests.tiny_families import make_family, pruned_modules
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.evaluation import evaluate, load_model
from vllm_spense.evaluation.density import Density, LayerDensity, measure_density, text_density
from vllm_spense.evaluation.hidden import hidden_values, last_linears
from vllm_spense.evaluation.thresholds import apply_thresholds, dropped, thresholds_applied
from vllm_spense.format import CheckpointError
from vllm_spense.format.bitsandbytes import open_checkpoint

DOWNS = [f"model.layers.{i}.mlp.down_proj" for i in range(LAYERS)]
WINDOWS = torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``silu``, ``relu`` (the same weights), ``twell`` (silu with thresholds) and ``text.txt``."""
    root = tmp_path_factory.mktemp("density")
    add_tokenizer(make_llama(root / "silu"))
    for name in ("relu", "twell"):
        shutil.copytree(root / "silu", root / name)
    edit(root / "relu", hidden_act="relu")
    edit(root / "twell", quantization_config=settings({DOWNS[0]: 0.5, DOWNS[1]: 2.0}))
    write_text(root / "text.txt")
    return root


def edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def settings(inputs: dict[str, float]) -> dict[str, object]:
    return {"quant_method": "twell", "version": 1, "inputs": inputs}


def plain(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def by_hand(directory: Path) -> list[torch.Tensor]:
    """``act(gate) · up`` of each layer, all tokens of WINDOWS, from the inputs of the MLPs."""
    model, found = plain(directory), []
    for layer in model.model.layers:

        def see(mlp: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            gate, up = mlp.gate_proj(inputs[0]), mlp.up_proj(inputs[0])
            found.append((gate.clamp_min(0) * up).flatten(0, 1))

        layer.mlp.register_forward_pre_hook(see)
    with torch.no_grad():
        model(input_ids=WINDOWS)
    return found


def test_density_of_a_relu_model(root: Path) -> None:
    found = measure_density(load_model(root / "relu"), WINDOWS)
    assert list(found.layers) == DOWNS
    assert found.tokens == WINDOWS.numel()
    for layer, hidden in zip(found.layers.values(), by_hand(root / "relu"), strict=True):
        assert layer.neurons == INTER
        assert layer.density == pytest.approx(float((hidden != 0).float().mean()))
        assert layer.dead == int((hidden == 0).all(0).sum())
    assert 0.3 < found.mean < 0.7


def test_a_silu_model_uses_everything(root: Path) -> None:
    found = measure_density(load_model(root / "silu"), WINDOWS)
    assert (found.mean, found.dead) == (1.0, 0.0)


def test_means_are_over_neurons() -> None:
    found = Density({"a": LayerDensity(10, 0.5, 1), "b": LayerDensity(30, 0.1, 9)}, 7)
    assert found.mean == pytest.approx((5 + 3) / 40)
    assert found.dead == pytest.approx(10 / 40)


@pytest.mark.parametrize("kind", ["phi3", "gemma3_text", "opt", "qwen2_moe", "starcoder2"])
def test_last_linears_of_families(kind: str, tmp_path: Path) -> None:
    model = load_model(make_family(kind, tmp_path))
    names = list(last_linears(model))
    assert names == [modules[-1] for modules in pruned_modules(kind)]
    found = measure_density(model, torch.arange(24)[None] % 32)
    assert list(found.layers) == names


def test_hooks_are_gone_behind_the_block(root: Path) -> None:
    model = load_model(root / "silu")
    seen: list[str] = []
    with hidden_values(model, lambda name, hidden: seen.append(name)):
        model(input_ids=WINDOWS[:1])
    model(input_ids=WINDOWS[:1])
    assert seen == DOWNS


# -- thresholds ----------------------------------------------------------------------------------


def test_dropped() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 0.6, torch.nan, -torch.inf])
    expected = torch.tensor([-2.0, 0.0, 0.0, 0.0, 0.6, torch.nan, -torch.inf])
    assert torch.equal(dropped(x, 0.5).nan_to_num(9), expected.nan_to_num(9))
    assert torch.equal(dropped(x, 0.0).nan_to_num(9), x.nan_to_num(9))
    assert x[1] == -0.5


def test_a_checkpoint_with_thresholds_is_loaded_with_them(root: Path) -> None:
    """Against the MLPs written out."""
    model = plain(root / "silu")
    for layer, threshold in zip(model.model.layers, (0.5, 2.0), strict=True):
        mlp = layer.mlp

        def forward(
            x: torch.Tensor, mlp: torch.nn.Module = mlp, threshold: float = threshold
        ) -> torch.Tensor:
            hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            kept = (hidden.abs() > threshold).to(hidden.dtype)
            return mlp.down_proj(hidden * kept)

        mlp.forward = forward
    with torch.no_grad():
        expected = model(input_ids=WINDOWS).logits
        loaded = load_model(root / "twell")(input_ids=WINDOWS).logits
        whole = load_model(root / "silu")(input_ids=WINDOWS).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)
    assert (loaded - whole).abs().max() > 0.1


def test_density_of_thresholds(root: Path) -> None:
    found = measure_density(load_model(root / "twell"), WINDOWS)
    first, second = found.layers.values()
    assert 0.02 < second.density < first.density < 0.9


def test_eval_applies_them(root: Path) -> None:
    options = {"seq_len": 64, "max_tokens": 256}
    whole, skipped = (evaluate(root / name, root / "text.txt", **options) for name in ("silu", "twell"))
    assert abs(whole.nll - skipped.nll) > 1e-3
    assert whole.tokens == skipped.tokens


def test_thresholds_are_gone_behind_the_block(root: Path) -> None:
    model = load_model(root / "silu")
    with torch.no_grad():
        before = model(input_ids=WINDOWS).logits
        with thresholds_applied(model, {DOWNS[0]: 1.0}, root):
            inside = model(input_ids=WINDOWS).logits
        assert torch.equal(model(input_ids=WINDOWS).logits, before)
    assert not torch.equal(inside, before)


@pytest.mark.parametrize("name", ["model.layers.7.mlp.down_proj", "model.norm", "model.layers.0.mlp"])
def test_a_threshold_for_no_linear(name: str, root: Path) -> None:
    with pytest.raises(CheckpointError, match="no linear of the model"):
        apply_thresholds(load_model(root / "silu"), {name: 1.0}, root)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (settings({"model.layers.9.mlp.down_proj": 0.1}), "no file has its weight"),
        (settings({DOWNS[0]: -0.1}), "greater than or equal to 0"),
        (settings({}), "inputs"),
        (settings({DOWNS[0]: 0.1}) | {"version": 2}, "version 2"),
    ],
)
def test_hostile_settings(changed: dict[str, object], message: str, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "silu", tmp_path / "model")
    edit(tmp_path / "model", quantization_config=changed)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "model")


def test_it_is_no_spense_checkpoint(root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"thresholds for activations.*spense eval"):
        open_checkpoint(root / "twell").require_spense()


# -- command -------------------------------------------------------------------------------------


def spense(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_spense.cli.app", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_inspect_with_text(root: Path) -> None:
    options = ["--text", root / "text.txt", "--max-tokens", "1024"]
    done = spense("inspect", root / "relu", *options, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    found = text_density(root / "relu", root / "text.txt", max_tokens=1024)
    assert told["density"] == pytest.approx(found.mean)
    assert told["layers"][DOWNS[1]]["neurons"] == INTER
    assert told["tokens"] == 1024
    table = spense("inspect", root / "twell", *options)
    assert table.returncode == 0, table.stderr
    assert "of the hidden values are not zero, over 1024 tokens" in " ".join(table.stdout.split())
    refused = spense("inspect", root / "twell")
    assert refused.returncode == 1
    assert "--text FILE" in " ".join(refused.stderr.split())


def test_density_of_a_spense_checkpoint(root: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(make_spense(root / "relu", tmp_path / "spense"), tmp_path / "copy")
    assert 0.2 < measure_density(load_model(edited), WINDOWS).mean < 0.8
