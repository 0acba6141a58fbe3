"""Layers run one at a time must give what the whole model gives, for every supported architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_gemma4 import gemma4
from vllm_spense.models.parts import decoder, decoder_layers
from vllm_spense.pruning.activations import LayerInputs, on_disk
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.layer import LayerPruner

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"]
ARCHITECTURES += ["gemma4_text"]
"""Gemma 4: arguments that differ between windows, and layers that read what others wrote."""


def tiny_model(kind: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind == "gemma4_text":
        return gemma4()
    options: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "pad_token_id": 0,
        "sliding_window": 6,  # shorter than the sample, so that the mask matters where it is used
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(("replay", "dense", "keep"), [(False, 0, True), (True, 0, True), (True, 32, False)])
@torch.no_grad()
def test_layer_by_layer_equals_the_whole_model(kind: str, replay: bool, dense: int, keep: bool) -> None:
    model = tiny_model(kind)
    windows = torch.arange(48).view(2, 24)
    inputs = LayerInputs(model, windows, torch.device("cpu"), dtype=torch.float32)
    before = inputs.hidden.clone()
    for index, layer in enumerate(decoder_layers(model)):
        if replay:  # as the pruner does it, with nothing pruned
            pruner = LayerPruner(PruneConfig(preset="spensegpt+", calibration="x"), inputs)
            seen = pruner._observe(index, layer, layer.mlp, dense)
            _, kept = pruner._observe_down(index, layer, layer.mlp, seen)
            assert (seen.down_squares is not None) == (dense == 32)
            pruner._advance(index, layer, layer.mlp, seen, kept if keep else [])
        else:
            inputs.advance(index, layer.module)
    base = decoder(model)
    whole = base(input_ids=windows, use_cache=False).last_hidden_state
    torch.testing.assert_close(base.norm(inputs.hidden), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, inputs.hidden)


@pytest.mark.parametrize("disk", [False, True])
@torch.no_grad()
def test_what_layers_share_belongs_to_a_window_and_a_stream(disk: bool, tmp_path: Path) -> None:
    """The third layer reads keys and values that the second one made, and both streams make their own."""
    model, windows = gemma4(), torch.arange(3, 75).view(3, 24)
    expected = decoder(model)(input_ids=windows, use_cache=False).last_hidden_state
    allocate = {"allocate": on_disk(tmp_path)} if disk else {}
    dense = LayerInputs(model, windows, torch.device("cpu"), dtype=torch.float32, **allocate)
    pruned = dense.fork()
    for index, layer in enumerate(decoder_layers(model)):
        dense.advance(index, layer.module)
        for parameter in layer.module.parameters():
            parameter.mul_(0.5)
        pruned.advance(index, layer.module)
    changed = decoder(model)(input_ids=windows, use_cache=False).last_hidden_state
    norm = decoder(model).norm
    for inputs, wanted in ((dense, expected), (pruned, changed)):
        torch.testing.assert_close(norm(inputs.hidden), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, changed, rtol=0.1, atol=0.1)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_equal_arguments_are_kept_once() -> None:
    """Masks and rotary embeddings of long windows are large; per-layer inputs differ."""
    inputs = LayerInputs(gemma4(), torch.arange(3, 75).view(3, 24), torch.device("cpu"))
    first, second = ([inputs.call(window, layer) for window in range(3)] for layer in (0, 1))
    for calls in (first, second):
        rotary = {x.data_ptr() for call in calls for x in call.kwargs["position_embeddings"]}
        assert len(rotary) == 2
        assert len({call.args[0].data_ptr() for call in calls}) == 3
    assert len({call.kwargs["attention_mask"].data_ptr() for call in first}) == 1


def test_discovery_names_the_parts() -> None:
    layer = decoder_layers(tiny_model("qwen3"))[1]
    assert list(layer.mlp.inner) == [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up")]
    assert layer.mlp.down_name == "model.layers.1.mlp.down_proj"
    names = {f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"}
    assert set(layer.dense) == names
