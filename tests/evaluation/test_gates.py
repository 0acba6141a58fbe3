"""Published activation-sparse models in transformers, without the code that they come with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_text import write_text
from tests.twell_models import LAYOUTS, activated, build, density, flat_prompts, write
from vllm_spense.evaluation import evaluate, load_model
from vllm_spense.evaluation.density import measure_density, text_density
from vllm_spense.format import CheckpointError
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.sources import load_config


@pytest.mark.filterwarnings("ignore:.*does not use")
@pytest.mark.parametrize("kind", LAYOUTS)
def test_they_compute_what_they_were_trained_with(kind: str, tmp_path: Path) -> None:
    expected, model = build(kind), load_model(write(kind, tmp_path / kind))
    with torch.no_grad():
        logits, found = (m(input_ids=flat_prompts()).logits for m in (expected, model))
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)
    shares = [layer.density for layer in measure_density(model, flat_prompts()).layers.values()]
    assert shares == pytest.approx(density(expected), abs=1e-3)
    assert max(shares) < 0.3


@pytest.mark.parametrize("activation", [Activation("drelu"), Activation("fatrelu", 0.2)])
def test_an_ordinary_llama_may_have_their_gates(activation: Activation, tmp_path: Path) -> None:
    changes = {"hidden_act": activation.kind, "hidden_act_param": activation.threshold or None}
    directory = write("relu", tmp_path / "model", **changes)
    expected = activated(build("relu"), activation)
    with torch.no_grad():
        logits, found = (m(input_ids=flat_prompts()).logits for m in (expected, load_model(directory)))
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*does not use")
def test_eval_and_inspect_take_them(tmp_path: Path) -> None:
    directory, text = write("sparselm", tmp_path / "model"), write_text(tmp_path / "text.txt")
    assert evaluate(directory, text, seq_len=64, max_tokens=256).tokens == 4 * 63
    assert text_density(directory, text, max_tokens=512).mean < 0.3


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("sparselm", {"sparsity_gated_mlp": False}, "sparsity_gated_mlp"),
        ("sparselm", {"sparsity_baseline_run": True}, "sparsity_baseline_run"),
        ("prosparse", {"hidden_act_param": -1.0}, "hidden_act_param"),
        ("prosparse", {"hidden_act": "silu"}, "hidden_act"),
        ("bamboo", {"hidden_act": "silu"}, "hidden_act"),
    ],
)
def test_fields_that_are_none_of_theirs(
    kind: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(write(kind, tmp_path / "model", **changes))


def test_pruning_refuses_them_as_ever(tmp_path: Path) -> None:
    """It would calibrate with the class's own activation."""
    directory = write("sparselm", tmp_path / "model")
    with pytest.raises(CheckpointError, match="model_type 'llama_sparse_relu'"):
        load_config(directory)
    with pytest.raises(CheckpointError, match="model_type 'llama_sparse_relu'"):
        prune(directory, tmp_path / "out", PruneConfig(preset="magnitude"))
