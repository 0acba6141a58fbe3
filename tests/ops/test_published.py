"""What is read of config.json of activation-sparse models, and of their tensors' names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_spense.format.errors import CheckpointError
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.published import activation_sparse, plain_activation, renamed

SPARSELM: dict[str, Any] = {
    "model_type": "llama_sparse_relu",
    "hidden_act": "silu",
    "intermediate_size": 5632,
    "num_hidden_layers": 3,
    "sparsity_new_intermediate_size": 5632,
    "sparsity_gated_mlp": True,
    "sparsity_baseline_run": False,
}
PROSPARSE = {"model_type": "sparsellama", "hidden_act": "fatrelu", "intermediate_size": 11008}


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        (SPARSELM, Activation("relu")),
        (SPARSELM | {"hidden_act": "gelu"}, Activation("relu")),
        (PROSPARSE, Activation("fatrelu", 0.01)),
        (PROSPARSE | {"hidden_act_param": 0.05}, Activation("fatrelu", 0.05)),
        (PROSPARSE | {"hidden_act_param": 0}, Activation("fatrelu")),
        (PROSPARSE | {"hidden_act": "relu", "hidden_act_param": 0.05}, Activation("relu")),
        ({"model_type": "bamboo", "hidden_act": "relu", "intermediate_size": 14336}, Activation("drelu")),
        ({"model_type": "llama", "hidden_act": "relu", "intermediate_size": 8}, Activation("relu")),
        ({"model_type": "mistral", "hidden_act": "drelu", "intermediate_size": 8}, Activation("drelu")),
        ({"model_type": "llama", "hidden_act": "relu2", "intermediate_size": 65535}, Activation("relu2")),
    ],
)
def test_published_configs(config: dict[str, Any], activation: Activation) -> None:
    mlp = activation_sparse(config)
    assert (mlp.activation, mlp.neurons) == (activation, config["intermediate_size"])
    assert mlp.density == ()


def test_density_per_layer() -> None:
    assert activation_sparse(SPARSELM | {"sparsity_density": [0, 0.5, 1]}).density == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (SPARSELM, {"sparsity_gated_mlp": False}, "sparsity_gated_mlp is False, expected True"),
        (SPARSELM, {"sparsity_gated_mlp": 1}, "sparsity_gated_mlp is 1, expected True"),
        (SPARSELM, {"sparsity_baseline_run": True}, "sparsity_baseline_run is True, expected False"),
        (SPARSELM, {"sparsity_baseline_run": None}, "sparsity_baseline_run is None, expected False"),
        (SPARSELM, {"sparsity_new_intermediate_size": 8192}, "sparsity_new_intermediate_size is 8192"),
        (SPARSELM, {"intermediate_size": 65536, "sparsity_new_intermediate_size": None}, "from 1 to 65535"),
        (SPARSELM, {"intermediate_size": 0, "sparsity_new_intermediate_size": 0}, "intermediate_size is 0"),
        (SPARSELM, {"intermediate_size": True, "sparsity_new_intermediate_size": None}, "is True"),
        (SPARSELM, {"sparsity_density": [0.1]}, "a list of 3 shares"),
        (SPARSELM, {"sparsity_density": 0.1}, "a list of 3 shares"),
        (SPARSELM, {"sparsity_density": [0.1, 0.1, 1.5]}, "sparsity_density is"),
        (SPARSELM, {"sparsity_density": [0.1, 0.1, float("nan")]}, "sparsity_density is"),
        (SPARSELM, {"sparsity_density": [0.1, 0.1, "0"]}, "sparsity_density is"),
        (PROSPARSE, {"hidden_act_param": -0.01}, "hidden_act_param is -0.01"),
        (PROSPARSE, {"hidden_act_param": float("nan")}, "hidden_act_param is nan"),
        (PROSPARSE, {"hidden_act_param": float("inf")}, "hidden_act_param is inf"),
        (PROSPARSE, {"hidden_act_param": "0.01"}, "hidden_act_param is '0.01'"),
        (PROSPARSE, {"hidden_act_param": True}, "hidden_act_param is True"),
        (PROSPARSE, {"hidden_act": "silu"}, "hidden_act is 'silu', expected one of relu, relu2"),
        (PROSPARSE, {"hidden_act": None}, "hidden_act is None"),
        (PROSPARSE, {"hidden_act": ["relu"]}, "hidden_act is ['relu']"),
        (PROSPARSE, {"model_type": "qwen2"}, "model_type is 'qwen2'"),
        (PROSPARSE, {"model_type": "bamboo"}, "hidden_act is 'fatrelu', expected 'relu'"),
    ],
)
def test_unusable_configs(config: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        activation_sparse(config | change)
    assert words in str(caught.value)
    assert str(caught.value).startswith("file config.json: ")
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "opt", "activation_function": "relu"}, "relu"),
        ({"model_type": "nemotron", "hidden_act": "relu2"}, "relu2"),
        ({"model_type": "arcee", "hidden_act": "relu2"}, "relu2"),
    ],
)
def test_plain_mlps(config: dict[str, Any], kind: str) -> None:
    assert plain_activation(config) == Activation(kind)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama", "hidden_act": "silu"}, "activation 'silu' of llama leaves no zeros"),
        ({"model_type": "opt", "activation_function": "gelu"}, "spense recover --activation relu"),
        ({"model_type": "opt"}, "activation None of opt"),
        ({"model_type": "llama", "hidden_act": "relu"}, "the MLPs of llama have a gate"),
        ({"model_type": "qwen3", "hidden_act": "relu"}, "activation 'relu' of qwen3 leaves no zeros"),
    ],
)
def test_models_without_zeros(config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        plain_activation(config)


def test_names_of_the_training_code() -> None:
    """Gate and down are transposed there, up is not; what no model needs is dropped."""
    mlp = "model.layers.0.mlp"
    gate, up, down = torch.arange(6.0).view(3, 2), torch.arange(6.0).view(2, 3) + 10, torch.ones(2, 3)
    given = {
        f"{mlp}.gate_weight": gate,
        f"{mlp}.up_weight": up,
        f"{mlp}.down_weight": down,
        f"{mlp}.predictor.fc1.weight": gate,
        "tracker.steps": gate,
        "model.tracker.steps": gate,
        "metrics_accumulator.l0": gate,
        "model.layers.0.self_attn.rotary_emb.inv_freq": gate,
        "model.norm.weight": up,
    }
    found = dict(renamed(given.items()))
    assert found.keys() == {f"{mlp}.{n}_proj.weight" for n in ("gate", "up", "down")} | {"model.norm.weight"}
    assert torch.equal(found[f"{mlp}.gate_proj.weight"], gate.t())
    assert torch.equal(found[f"{mlp}.up_proj.weight"], up)
    assert torch.equal(found[f"{mlp}.down_proj.weight"], down.t())
