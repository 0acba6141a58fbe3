"""What attention as a target refuses: sizes that do not fit, and attention that tells heads apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny_families import make_family
from vllm_spense.models.parts import UnsupportedModelError, decoder_layers
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.pruning.choice.attention import target
from vllm_spense.pruning.plan import plan

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "pad_token_id": 0,
}
MAGNITUDE = PruneConfig(method="magnitude", selection="spensegpt", targets="mlp+attention")


def test_attention_keeps_the_share_of_the_mlps_unless_told_otherwise() -> None:
    def ratio(**options) -> float:
        return PruneConfig(calibration="text", dense_ratio=0.25, **options).attention_ratio

    assert ratio() == 1
    assert ratio(targets="mlp+attention") == 0.25
    assert ratio(targets="mlp+attention", attention_dense_ratio=0) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magnitude", "selection": "spensegpt+"}, "needs calibration text"),
        ({"method": "magnitude", "selection": "fisher", "dense_ratio": 1}, "needs calibration text"),
        ({"method": "wanda", "attention_dense_ratio": 0}, "needs calibration text"),
        ({"targets": "mlp", "calibration": "x"}, r"attention_dense_ratio needs targets 'mlp\+attention'"),
    ],
)
def test_options_that_contradict_each_other(changes: dict, message: str) -> None:
    options = {"targets": "mlp+attention", "dense_ratio": 1, "attention_dense_ratio": 0.5}
    with pytest.raises(ValueError, match=message):
        PruneConfig(**(options | changes))


@pytest.mark.parametrize(
    ("ratio", "changes", "message"),
    [
        (0.9, {}, "of 4 key/value heads, a dense ratio of 0.9 leaves none to prune"),
        (0.5, {"num_key_value_heads": 1}, "of 1 key/value heads.*choose a lower --attention-dense-ratio"),
        (
            0.5,
            {"head_dim": 12, "num_attention_heads": 2, "num_key_value_heads": 2},
            "self_attn: .*multiple of 8",
        ),
    ],
)
def test_sizes_that_do_not_fit(
    ratio: float, changes: dict, message: str, text_file: Path, tmp_path: Path
) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    source = make_family("llama", tmp_path / "in", **(sizes | changes))
    attention = {"targets": "mlp+attention", "attention_dense_ratio": ratio}
    config = PruneConfig(calibration=str(text_file), seq_len=64, **attention)
    with pytest.raises(ValueError, match=message):
        prune(source, tmp_path / "out", config, lambda _: pytest.fail("it was noticed too late"))
    with pytest.raises(ValueError, match=message):
        plan(source, config)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("olmo2", {}, r"q_norm.weight \[64\] may tell heads apart"),
        ("cohere", {"use_qk_norm": True}, r"q_norm.weight \[4, 16\] may tell heads apart"),
        ("stablelm", {"qk_layernorm": True}, r"q_layernorm.norms.0.weight \[16\] may tell heads apart"),
        ("afmoe", {"num_dense_layers": 1, "layer_types": ["full_attention"]}, "gate_proj.weight.* apart"),
        ("diffllama", {}, "lambda_q1.* may tell heads apart"),
        ("falcon_h1", {}, "vLLM serves this model's attention as it is stored only"),
        ("gemma4_text", {"attention_k_eq_v": True}, "it has no plain linears q_proj, k_proj, v_proj"),
        ("minicpm3", {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8}, "it has no plain linears q_proj"),
        ("qwen3_5_text", {}, "linear attention keeps a state per head"),
    ],
)
def test_attention_that_tells_heads_apart_is_refused(kind: str, changes: dict, message: str) -> None:
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(COMMON | changes)))
    layer = decoder_layers(network)[0]
    with pytest.raises(UnsupportedModelError, match=f"_attn cannot be pruned: {message}"):
        target(layer, MAGNITUDE)
    assert target(layer, MAGNITUDE.model_copy(update={"targets": "mlp"})) is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: setattr(a, "sinks", nn.Parameter(torch.zeros(16))), r"sinks \[16\] may tell heads apart"),
        (lambda a: a.register_buffer("slopes", torch.zeros(4)), "the buffer slopes may tell heads apart"),
        (
            lambda a: setattr(a, "q_proj", nn.Linear(64, 128)),
            "its sizes are not those of plain heads: q has 128",
        ),
        (lambda a: setattr(a, "v_proj", nn.Linear(64, 64)), "its sizes are not those of plain heads"),
        (lambda a: setattr(a, "head_dim", 24), "its sizes are not those of plain heads"),
        (lambda a: delattr(a, "o_proj"), "it has no plain linears q_proj, k_proj, v_proj and o_proj"),
    ],
)
def test_what_must_not_stand_in_an_attention_block(spoil, message: str) -> None:
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **(COMMON | {"head_dim": 16})))
    assert target(decoder_layers(network)[0], MAGNITUDE) is not None
    spoil(network.model.layers[0].self_attn)
    with pytest.raises(UnsupportedModelError, match=message):
        target(decoder_layers(network)[0], MAGNITUDE)
