"""The tables of families and presets agree with transformers, with vLLM, and with each other."""

from __future__ import annotations

import pytest

from vllm_spense.models.families import (
    FAMILIES,
    FUSED,
    MLP_SPLITS,
    ROW_PARALLEL,
    family_of,
    fused_with,
    in_attention,
    stays_as_stored,
)
from vllm_spense.models.presets import PRESETS


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_go_by_names_that_transformers_knows(kind: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert kind in CONFIG_MAPPING


@pytest.mark.parametrize(
    ("module", "cls", "kind"),
    [
        ("llama", "LlamaForCausalLM", "llama"),
        ("qwen3", "Qwen3ForCausalLM", "qwen3"),
        ("phi3", "Phi3ForCausalLM", "phi3"),
        ("glm4", "Glm4ForCausalLM", "glm4"),
    ],
)
def test_vllm_fuses_what_the_table_says(module: str, cls: str, kind: str) -> None:
    """A model that is fused on disk maps the fused linear to itself; any other to its parts."""
    pytest.importorskip("vllm")
    from importlib import import_module

    model = getattr(import_module(f"vllm.model_executor.models.{module}"), cls)
    mapping = model.packed_modules_mapping
    assert {"qkv_proj", "gate_up_proj"} <= set(mapping)
    for fused in FUSED:
        on_disk = tuple(mapping[fused]) == (fused,)
        assert tuple(mapping[fused]) in ((fused,), FUSED[fused])
        if on_disk:
            assert fused in family_of(kind).fused


def test_a_family_that_is_not_listed_is_like_llama() -> None:
    assert family_of("llama") == family_of(None) == family_of("of next year")
    assert family_of("llama").gated
    assert family_of("llama").fused == ()
    assert not family_of("opt").gated


def test_layers_by_the_names_of_their_parts() -> None:
    assert fused_with("k_proj") == ("q_proj", "k_proj", "v_proj")
    assert fused_with("up_proj") == ("gate_proj", "up_proj")
    assert fused_with("o_proj") == ("o_proj",)


def test_tensor_parallelism_cuts_the_inputs_of_what_is_split_by_inputs() -> None:
    assert {name for name, split in MLP_SPLITS.items() if split == "input"} <= ROW_PARALLEL
    assert ROW_PARALLEL - set(MLP_SPLITS) == {"o_proj", "out_proj", "dense"}
    assert not ROW_PARALLEL & {part for parts in FUSED.values() for part in parts}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.0.self_attn.q_proj", True),
        ("layers.3.linear_attn.in_proj_qkv", True),
        ("model.layers.0.mlp.down_proj", False),
        ("model.layers.0.fc1", False),
    ],
)
def test_what_lies_in_attention(name: str, found: bool) -> None:
    assert in_attention(name) is found


def test_what_stays_as_it_is_stored() -> None:
    """By name in every family; in Falcon-H1 all but the MLP, fused or not."""
    assert stays_as_stored("model.layers.0.mlp.router.proj", "llama")
    assert stays_as_stored("model.visual.blocks.0.attn.qkv", "llama")
    assert not stays_as_stored("model.layers.0.self_attn.q_proj", "llama")
    assert stays_as_stored("model.layers.0.self_attn.q_proj", "falcon_h1")
    assert not stays_as_stored("model.layers.0.feed_forward.gate_up_proj", "falcon_h1")
    assert not stays_as_stored("model.layers.0.feed_forward.down_proj", "falcon_h1")


@pytest.mark.parametrize("shape", PRESETS.values(), ids=list(PRESETS))
def test_heads_of_a_preset_divide(shape: dict[str, int]) -> None:
    assert shape["num_attention_heads"] % shape["num_key_value_heads"] == 0
    assert shape["hidden_size"] % 128 == shape["intermediate_size"] % 128 == 0
