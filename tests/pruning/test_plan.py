"""The plan of a run against the run itself, and against the sizes of a 32B model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_llama
from tests.tiny_gemma4 import GEMMA4, gemma4, make_gemma4
from tests.tiny_text import add_tokenizer
from vllm_spense.format import Checkpoint, CheckpointError
from vllm_spense.models.parts import decoder_layers
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.pruning.activations import LayerInputs, in_memory
from vllm_spense.pruning.plan import Plan, plan

QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PAPER = {"calibration": "s1K-1.1", "num_samples": 128, "seq_len": 16384}


def config_only(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(QWEN3_32B | changes))
    return directory


def test_qwen3_32b_fits_one_gpu_and_a_modest_host(tmp_path: Path) -> None:
    """The milestone: 40 GB of device and 32 GB of host memory plus activations, at the paper's sizes."""
    found = plan(config_only(tmp_path / "model"), PruneConfig(**PAPER), "h200")
    assert len(found.layers) == 64
    assert 10e9 < found.device_bytes <= 40e9
    assert 4e9 < found.host_bytes <= 32e9
    hidden = 128 * 16384 * 5120
    joint = 65536 * 5120 * 4  # tokens of the joint fit in fp32
    assert found.activation_bytes == 2 * 2 * hidden + joint  # hidden states, attention's outputs in bf16
    assert found.source_bytes == pytest.approx(2 * 32.76e9, rel=0.01)
    mlp = 64 * 3 * 5120 * 25600
    attention = 64 * 2 * 5120 * (8192 + 1024)
    expected = mlp * (0.5 * 0.625 + 0.5) + attention + 2 * 2 * 5120 * 151936
    assert found.output_bytes == pytest.approx(expected, rel=0.01)
    layer = found.layers[7]
    tokens = 128 * 16384
    forwards = 2 * tokens * (2 * 2 + 1) * 5120 * 25600  # gate and up twice, down once
    assert layer.flop > forwards
    assert layer.flop == pytest.approx(forwards, rel=0.5)
    statistics = tokens * (5120**2 + 25600**2)
    # 5 fits of 4 iterations and a residual, 4 choices of pairs, W H; half of the rows of gate and up
    least_squares = 30 * 2 * (2 * 12800 * 5120**2 + 5120 * 25600**2)
    least_squares += 13 * 2 * 65536 * 12800 * 5120  # the joint fit of gate and up
    assert statistics + least_squares < layer.flop_fp32 < 1.1 * (statistics + least_squares)
    assert 0.2 * 3600 < found.seconds < 4 * 3600
    assert found.gradient is not None
    layers = sum(layer.seconds for layer in found.layers)
    assert found.seconds == pytest.approx(layers + found.gradient.seconds)


def test_the_gradient_pass_of_qwen3_32b(tmp_path: Path) -> None:
    """Its windows end at 256 tokens, three of seven scored: logits and layers' inputs are large."""
    model = config_only(tmp_path / "model")
    alone = PAPER | {"pilot_samples": 0}
    found = plan(model, PruneConfig(**alone), "h200").gradient
    assert found is not None
    tokens = 16 * 256
    assert found.activation_bytes == 66 * tokens * 5120 * 2  # 64 fronts, the last outputs, the gradients
    in_linears = 64 * (3 * 5120 * 25600 + 2 * 5120 * (8192 + 1024))
    head, scored = 5120 * 151936, (1 << 24) / (256 * 151936)
    assert found.flop == pytest.approx(2 * tokens * (3 * in_linears + 2 * head * scored), rel=0.1)
    piloted = plan(model, PruneConfig(**PAPER), "h200").gradient
    assert piloted is not None
    assert piloted.activation_bytes == found.activation_bytes
    pilot = 2 * 4 * 256 * ((65 / 2 + 6) * in_linears + 70 * head * scored)
    assert piloted.flop - found.flop == pytest.approx(pilot, rel=0.1)
    matrices, logits = 2 * 2 * 5120 * 151936, (1 << 24) * (2 * 2 + 3 * 4)
    costs = 2 * in_linears / 64 + 6 * 4 * 5120 * 25600  # a layer in bf16, what its costs take in fp32
    assert matrices + logits <= found.device_bytes == pytest.approx(costs, rel=0.05)
    few = plan(model, PruneConfig(**alone | {"num_samples": 4}), "h200")
    assert few.gradient is not None
    assert few.gradient.flop == found.flop / 4
    one = plan(model, PruneConfig(**PAPER | {"num_samples": 8, "seq_len": 256}), "h200")
    assert one.gradient is not None
    assert one.activation_bytes == one.gradient.activation_bytes, "more than the hidden states of one layer"
    assert plan(model, PruneConfig(**PAPER, preset="spensegpt+"), "h200").gradient is None


def test_the_joint_fit_costs_gemms_over_some_tokens(tmp_path: Path) -> None:
    """Dense values, gate's outputs; up's twice, two residuals; of 3 iterations two, two and one each."""
    model = config_only(tmp_path / "model")
    gemms = 3 + 2 + 2 + 2 * (2 + 2 + 1)
    for options, tokens in ((PAPER, 65536), (PAPER | {"num_samples": 4, "seq_len": 128}, 512)):
        fitted, plain = (plan(model, PruneConfig(**options, joint=n), "h200") for n in (3, 0))
        more = fitted.layers[5].flop_fp32 - plain.layers[5].flop_fp32
        shared = 2 * 3 * 8 * 2 * 12800 * 5120**2  # without a term in tokens
        assert more == pytest.approx(gemms * 2 * tokens * 12800 * 5120 + shared)
        assert fitted.layers[5].seconds > plain.layers[5].seconds
    fitted, plain = (plan(model, PruneConfig(**PAPER, joint=n), "h200") for n in (3, 0))
    assert fitted.activation_bytes - plain.activation_bytes == 65536 * 5120 * 4


def test_the_order_of_energies_needs_a_second_hessian(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model")
    sizes = PAPER | {"preset": "spensegpt+"}
    ordered, plain = (plan(model, PruneConfig(**sizes, order=o), "h200") for o in ("energy", "natural"))
    assert ordered.layers[5].device_bytes - plain.layers[5].device_bytes == 4 * 25600**2


def test_regrouping_inverts_the_hessian_of_down(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model")
    some, none = (plan(model, PruneConfig(**PAPER, regroup=n), "h200") for n in (3, 0))
    inverse = 4 / 3 * 25600**3 + 2 * 25600 * 12800**2
    assert some.layers[5].flop_fp32 - none.layers[5].flop_fp32 == pytest.approx(inverse)
    dense = PAPER | {"dense_ratio": 1.0}
    some, none = (plan(model, PruneConfig(**dense, regroup=n), "h200") for n in (3, 0))
    assert some.layers[5].flop_fp32 == none.layers[5].flop_fp32


def test_refit_adds_temporaries_of_a_block_of_rows(tmp_path: Path) -> None:
    """Where a layer is wider than long: 4096 rows of 2048 columns, twelve times, beside H, H damped and U."""
    model = config_only(tmp_path / "model", hidden_size=2048, intermediate_size=4096)
    sizes = {"calibration": "x", "num_samples": 8, "seq_len": 128}
    with_refit, without = (
        plan(model, PruneConfig(**sizes, preset="guided", refit=n, refine=n), "h200") for n in (8, 0)
    )
    columns, rows = 4096, 2048  # of down
    extra = 4 * columns * (3 * columns + 12 * rows) - 4 * 6 * columns**2
    layers = (found.layers[0].device_bytes for found in (with_refit, without))
    assert next(layers) - next(layers) == extra > 0
    assert with_refit.layers[0].seconds > without.layers[0].seconds


def test_what_makes_a_plan_larger(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model")

    def planned(config: dict[str, Any] | None = None, **changes: Any) -> Plan:
        return plan(config_only(model, **(config or {})), PruneConfig(**(PAPER | changes)), "h200")

    base = planned()
    joint = planned().activation_bytes - planned(joint=0).activation_bytes  # the same number of tokens
    assert (planned(num_samples=64).activation_bytes - joint) * 2 == base.activation_bytes - joint
    assert planned(num_samples=64).device_bytes == base.device_bytes
    assert planned({"num_hidden_layers": 32}).device_bytes == base.device_bytes
    assert planned({"num_hidden_layers": 32}).host_bytes == base.host_bytes, "one layer at a time"
    assert planned({"num_hidden_layers": 32}).seconds == pytest.approx(base.seconds / 2, rel=1e-3)
    assert planned({"intermediate_size": 51200}).device_bytes > 2 * base.device_bytes
    assert planned(weight_dtype="bf16").output_bytes > 1.5 * base.output_bytes
    assert planned(dense_ratio=0).output_bytes < base.output_bytes
    assert planned(refine=8).seconds > base.seconds > planned(refine=0).seconds
    assert planned(refine=0).seconds > planned(refine=0, refit=0).seconds
    paper = planned(preset="spensegpt+")
    assert paper.layers[0].flop > base.layers[0].flop, "one more pass to score indices"
    assert planned(method="wanda").seconds < paper.seconds
    assert planned(method="magnitude", selection="spensegpt", calibration=None).activation_bytes == 0


@pytest.mark.parametrize("preset", ["spensegpt+", "guided"])
@pytest.mark.parametrize("weight_dtype", ["fp8", "bf16"])
def test_output_bytes_are_those_of_the_run(
    weight_dtype: str, preset: str, dense_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """To the byte; one budget for all layers may leave less than a block of indices unspent."""
    sizes = {"num_samples": 4, "seq_len": 64, "weight_dtype": weight_dtype}
    config = PruneConfig(calibration=str(text_file), preset=preset, **sizes)
    found = plan(dense_model, config)
    prune(dense_model, tmp_path / "out", config)
    tensors = Checkpoint(tmp_path / "out")
    total = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    wide = 1 if weight_dtype == "fp8" else 2
    block = 3 * 144 * config.alignment * (wide - wide / 2 - 1 / 8)  # dense instead of half and positions
    unspent = found.output_bytes - total["metadata"]["total_size"]
    assert unspent == 0 if preset == "spensegpt+" else 0 <= unspent < block
    assert len(found.layers) == 2
    assert tensors.quantization is not None
    assert found.device_bytes == 0, "a CPU's memory is the host's"
    assert found.dtype == "float32"


def test_the_command(tmp_path: Path) -> None:
    model = add_tokenizer(make_llama(tmp_path / "model"))
    command = [sys.executable, "-m", "vllm_spense.cli.app", "prune", str(model), "-o", str(tmp_path / "out")]
    command += ["--calibration", "text", "--seq-len", "64", "--dry-run"]
    said = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    found = json.loads(said)
    assert len(found["layers"]) == 2
    assert found["host_bytes"] > 100e6
    table = subprocess.run([*command, "--device-model", "b200"], capture_output=True, text=True, check=True)
    assert "1 to 2, each" in table.stdout
    assert "B200" in table.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "nothing was written"


def test_headers_are_checked_where_there_are_any(dense_model: Path, tmp_path: Path) -> None:
    for path in dense_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"intermediate_size": 256}))
    config = PruneConfig(method="magnitude", selection="spensegpt")
    with pytest.raises(CheckpointError, match=r"shape \[208, 144\].*needs \[256, 144\]"):
        plan(tmp_path, config)


@torch.no_grad()
def test_arguments_that_differ_between_windows_are_counted(tmp_path: Path) -> None:
    """Gemma 4: what the windows of a run allocate, but for the hidden states themselves."""
    allocated: list[int] = []

    def allocate(shape: Any, dtype: torch.dtype) -> torch.Tensor:
        kept = in_memory(shape, dtype)
        allocated.append(kept.nbytes)
        return kept

    model = gemma4()
    windows = torch.randint(3, 500, (4, 64))
    inputs = LayerInputs(model, windows, torch.device("cpu"), allocate=allocate)
    for index, layer in enumerate(decoder_layers(model)):
        inputs.advance(index, layer.module)
    hidden = windows.numel() * GEMMA4["hidden_size"] * 2
    assert inputs.hidden.nbytes == hidden
    config = PruneConfig(calibration="x", num_samples=4, seq_len=64, pilot_samples=0)
    found = plan(make_gemma4(tmp_path / "model"), config)
    assert found.gradient is not None
    assert found.gradient.activation_bytes - 5 * hidden == sum(allocated) - hidden > 2 * hidden
    assert found.activation_bytes > sum(allocated)
