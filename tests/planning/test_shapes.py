"""Which shapes are read from config.json, layouts and presets, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import HEAD_DIM, HIDDEN, INTER, KV_HEADS, LAYERS, SPARSE, VOCAB, make_spense
from vllm_spense.format import CheckpointError, Layout
from vllm_spense.models.presets import PRESETS
from vllm_spense.planning.shapes import Experts, ModelShape, read_model

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
MOE = {"model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


def model(directory: Path, **change: Any) -> Path:
    """A directory with nothing but a config.json; a value of ``...`` removes the key."""
    config = {key: value for key, value in (LLAMA | change).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def specs(shape: ModelShape, kind: str, size: int = 1) -> list[tuple]:
    return [
        (x.spec.out_features, x.spec.in_features, x.spec.sparse_sizes, x.spec.dense_sizes, x.count)
        for x in shape.rank(size)
        if x.kind == kind
    ]


def test_a_dense_directory(tmp_path: Path) -> None:
    shape = read_model(model(tmp_path), 0.25)
    assert (shape.layers, shape.hidden, shape.head_size, shape.tied) == (3, 512, 64, False)
    assert specs(shape, "attention") == [
        (768, 512, (0, 0, 0), (512, 128, 128), 3),
        (512, 512, (0,), (512,), 3),
    ]
    assert specs(shape, "mlp") == [
        (2048, 512, (768, 768), (256, 256), 3),
        (512, 1024, (768,), (256,), 3),
    ]
    assert shape.mlp_dense_ratio() == 0.25


def test_half_is_dense_unless_asked_otherwise(tmp_path: Path) -> None:
    assert read_model(model(tmp_path)).mlp_dense_ratio() == 0.5


def test_each_rank_has_its_part(tmp_path: Path) -> None:
    shape = read_model(model(tmp_path), 0.5)
    assert specs(shape, "mlp", 2) == [(1024, 512, (256, 256), (256, 256), 3), (512, 512, (256,), (256,), 3)]
    assert specs(shape, "attention", 2) == [
        (384, 512, (0, 0, 0), (256, 64, 64), 3),
        (512, 256, (0,), (512,), 3),
    ]
    with pytest.raises(ValueError, match="--tp 4 does not divide the 8 query and 2 key/value heads"):
        shape.rank(4)


def test_an_intermediate_size_that_cannot_be_cut(tmp_path: Path) -> None:
    shape = read_model(model(tmp_path, intermediate_size=1001))
    with pytest.raises(ValueError, match=r"--tp 2 does not fit .*1001 dense output features"):
        shape.rank(2)


def test_presets_in_any_case() -> None:
    for name in PRESETS:
        assert read_model(name.upper()).name == name
    qwen = read_model("qwen3-32b", 0.5)
    assert specs(qwen, "mlp")[0] == (51200, 5120, (12800, 12800), (12800, 12800), 64)
    assert specs(qwen, "mlp")[1] == (5120, 25600, (12800,), (12800,), 64)
    assert specs(qwen, "attention")[0][:2] == (10240, 5120)


def test_a_checkpoint_has_its_own_layouts(tiny_spense: Path) -> None:
    shape = read_model(tiny_spense)
    dense = INTER - SPARSE
    assert sorted(specs(shape, "mlp")) == [
        (HIDDEN, INTER, (SPARSE,), (dense,), LAYERS),
        (2 * INTER, HIDDEN, (SPARSE, SPARSE), (dense, dense), LAYERS),
    ]
    assert sorted(x[:2] for x in specs(shape, "attention")) == [(144, 128), (256, 144)]
    assert (shape.kv_heads, shape.head_size, shape.vocabulary) == (KV_HEADS, HEAD_DIM, VOCAB)
    assert shape.mlp_dense_ratio() == pytest.approx(dense / INTER)
    assert (HIDDEN, INTER // 2, (SPARSE // 2,), (dense // 2,), LAYERS) in specs(shape, "mlp", 2)
    o = next(x for x in shape.linears if x.parts == (Layout("output", 144, 128, 0),))
    assert o.axis == "input"  # an output split by its layout, but vLLM cuts its columns
    with pytest.raises(ValueError, match=r"allows tensor parallel sizes \[1, 2\], not 4"):
        shape.rank(4)
    with pytest.raises(ValueError, match="leave --dense-ratio out"):
        read_model(tiny_spense, 0.5)


def test_layers_that_differ_stay_apart(tiny_spense: Path, tmp_path: Path) -> None:
    """A budget over layers may leave one MLP dense: then down is an output split that is cut by columns."""
    config = json.loads((tiny_spense / "config.json").read_text())
    for name, spec in config["quantization_config"]["modules"].items():
        if ".1.mlp." in name:
            spec |= {"split": "output", "sparse": 0, "dense": spec["out_features"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_model(tmp_path)
    assert {x[2:] for x in specs(shape, "mlp")} == {
        ((SPARSE, SPARSE), (INTER - SPARSE,) * 2, 1),
        ((SPARSE,), (INTER - SPARSE,), 1),
        ((0, 0), (INTER, INTER), 1),
        ((0,), (HIDDEN,), 1),
    }
    assert (HIDDEN, INTER // 2, (0,), (HIDDEN,), 1) in specs(shape, "mlp", 2)
    assert shape.mlp_dense_ratio() == pytest.approx((1 - SPARSE / INTER + 1) / 2)


def test_a_plain_mlp_has_one_inner_linear(tmp_path: Path) -> None:
    shape = read_model(model(tmp_path, model_type="opt", intermediate_size=..., ffn_dim=2048), 0.0)
    assert specs(shape, "mlp") == [(2048, 512, (2048,), (0,), 3), (512, 2048, (2048,), (0,), 3)]


def test_sliding_windows(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read_model(model(tmp_path, layer_types=kinds, sliding_window=128)).windows == (128, None, 128)
    assert read_model(model(tmp_path, sliding_window=128)).windows == (None,) * 3


def test_routed_experts_count_as_dense_and_it_says_so(tmp_path: Path) -> None:
    shape = read_model(model(tmp_path, **MOE, shared_expert_intermediate_size=256, mlp_only_layers=[0]))
    assert shape.experts == Experts(2, 8, 2, 96)
    assert [x[4] for x in specs(shape, "mlp")] == [1, 1, 2, 2]
    assert specs(shape, "mlp")[2][:2] == (512, 512)
    assert "8 routed experts in 2 layers count as dense bf16, in both models" in shape.notes
    without = read_model(model(tmp_path, **MOE | {"model_type": "qwen3_moe"}))
    assert specs(without, "mlp") == []
    assert without.mlp_dense_ratio() == 1


def test_the_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    raw = {"model_type": "mistral3", "text_config": LLAMA, "hidden_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shape = read_model(tmp_path)
    assert shape.hidden == 512
    assert "only the text model" in shape.notes[0]


def test_another_quantisation_is_refused_as_prune_does(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"already quantised \(gptq\)\. Fix: prune the original"):
        read_model(model(tmp_path, quantization_config={"quant_method": "gptq"}))


GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
}
"""As published: heads, vocabulary and layer types are the class's defaults."""


def test_the_class_fills_in_what_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_3_4B))
    shape = read_model(tmp_path)
    assert (shape.heads, shape.kv_heads, shape.head_size, shape.vocabulary) == (8, 4, 256, 262208)
    assert shape.tied
    assert shape.windows[:7] == (1024, 1024, 1024, 1024, 1024, None, 1024)
    assert specs(shape, "mlp")[0][:2] == (2 * 10240, 2560)
    plain = read_model(model(tmp_path, num_attention_heads=..., num_key_value_heads=..., vocab_size=...))
    assert (plain.heads, plain.vocabulary) == (32, 32000)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": ..., "model_type": "newest"}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0, expected an integer from 1"),
        ({"hidden_size": "512"}, "hidden_size is '512'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"num_key_value_heads": 3}, "do not divide one another"),
        ({"hidden_size": 500}, "do not divide one another"),
        ({"layer_types": ["full_attention"]}, "layer_types must name"),
        ({"layer_types": ["mamba"] * 3}, "layer_types must name"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is missing"),
        ({"kv_lora_rank": 512}, "kv_lora_rank is set"),
        ({"linear_num_value_heads": 32}, "linear_num_value_heads is set: layers of linear attention"),
        ({"num_kv_shared_layers": 20}, "num_kv_shared_layers is set: this model's layers differ"),
        ({"num_local_experts": 8, "model_type": "mixtral"}, "the experts of model_type 'mixtral'"),
        (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, expected an integer from 1 to 8"),
        ({"quantization_config": []}, "quantization_config is '[]'"),
        ({"quantization_config": {"quant_method": "spense", "version": 3}}, "format version 3"),
    ],
)
def test_what_config_json_may_not_say(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_model(model(tmp_path, **change))
    assert words in str(error.value)
    assert "config.json" in str(error.value)
    assert "Fix: " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_lacks_layers(tiny_spense: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_spense / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS + 1}))
    with pytest.raises(CheckpointError, match="lists the attention of 2 layers"):
        read_model(tmp_path)


@pytest.mark.parametrize(("codec", "title"), [("bf16", "bf16"), ("int8", "INT8")])
def test_checkpoints_without_kernels_gain_nothing(
    codec: str, title: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"GPUs have no kernels for {title} weights"):
        read_model(make_spense(tiny_llama, tmp_path / "spense", codec=codec))


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such directory, and no preset. Fix: .*Seed-OSS-36B"):
        read_model("Qwen9")
    with pytest.raises(CheckpointError, match="the directory is empty"):
        read_model(tmp_path)
    with pytest.raises(ValueError, match="dense_ratio must lie in"):
        read_model("Qwen3-32B", 1.5)
