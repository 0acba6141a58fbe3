"""Registration, the picklable config, and which real vLLM layer gets which method. No engine is started."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_spense.format import (
    CheckpointError,
    Codecs,
    Layout,
    LinearFormat,
    ModuleSpec,
    codecs,
)
from vllm_spense.format.codecs import codec_names
from vllm_spense.format.layout import Split
from vllm_spense.format.online import prune_and_pack
from vllm_spense.format.schema import checkpoint_config
from vllm_spense.ops import quantize_per_token

HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM = 48, 96, 4, 2, 8
MLP, ATTN = "model.layers.0.mlp", "model.layers.0.self_attn"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYOUTS = {
    f"{MLP}.gate_proj": Layout("output", INTER, HIDDEN, 64),
    f"{MLP}.up_proj": Layout("output", INTER, HIDDEN, 64),
    f"{MLP}.down_proj": Layout("input", HIDDEN, INTER, 64),
    f"{ATTN}.q_proj": Layout("output", HEADS * HEAD_DIM, HIDDEN, 0),
    f"{ATTN}.k_proj": Layout("output", KV_HEADS * HEAD_DIM, HIDDEN, 0),
    f"{ATTN}.v_proj": Layout("output", KV_HEADS * HEAD_DIM, HIDDEN, 0),
    f"{ATTN}.o_proj": Layout("output", HIDDEN, HEADS * HEAD_DIM, 0),
}
BOUND = 2.0**-7  # bf16 output, and vLLM may sum in another order


def make_config(bias: bool = True, codec: str = "fp8", drop: str | None = None) -> Any:
    from vllm_spense.serving.config import SpenseConfig

    modules = {n: ModuleSpec.of(layout, bias) for n, layout in LAYOUTS.items() if n != drop}
    checkpoint = checkpoint_config(
        codecs.codec(codec),
        tensor_parallel_sizes=[1],
        ignore=["lm_head"],
        modules=modules,
        provenance={},
    )
    config = SpenseConfig.from_config(checkpoint.model_dump())
    config.packed_modules_mapping = PACKED
    return config


def make_layer(name: str, config: Any, bias: bool = True) -> Any:
    from vllm.model_executor.layers import linear

    options = {"bias": bias, "params_dtype": torch.bfloat16, "quant_config": config}
    if name == "gate_up_proj":
        return linear.MergedColumnParallelLinear(HIDDEN, [INTER] * 2, prefix=f"{MLP}.{name}", **options)
    if name == "down_proj":
        return linear.RowParallelLinear(INTER, HIDDEN, prefix=f"{MLP}.{name}", **options)
    if name == "qkv_proj":
        prefix = f"{ATTN}.{name}"
        return linear.QKVParallelLinear(HIDDEN, HEAD_DIM, HEADS, KV_HEADS, prefix=prefix, **options)
    return linear.RowParallelLinear(HEADS * HEAD_DIM, HIDDEN, prefix=f"{ATTN}.{name}", **options)


SHARDS: dict[str, list[tuple[str, tuple]]] = {
    "gate_up_proj": [(f"{MLP}.gate_proj", (0,)), (f"{MLP}.up_proj", (1,))],
    "down_proj": [(f"{MLP}.down_proj", ())],
    "qkv_proj": [(f"{ATTN}.{x}_proj", (x,)) for x in "qkv"],
    "o_proj": [(f"{ATTN}.o_proj", ())],
}


def stored(module: str, codec: str, bias: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    layout = LAYOUTS[module]
    generator = torch.Generator().manual_seed(seed + len(module))
    weight = torch.randn(layout.out_features, layout.in_features, generator=generator) * 0.2
    tensors = prune_and_pack(weight, layout, codec)
    if bias:
        tensors["bias"] = torch.randn(layout.out_features, generator=generator).bfloat16()
    return tensors


def load(layer: Any, name: str, codec: str, bias: bool, skip: str = "") -> torch.Tensor:
    """Load every shard through the parameters' own loaders; returns the dense ``[N, K + 1]`` with bias."""
    parameters = dict(layer.named_parameters())
    rows = []
    for module, shard in SHARDS[name]:
        tensors = stored(module, codec, bias)
        for short, tensor in tensors.items():
            if f"{module}.{short}" != skip:
                parameters[short].weight_loader(parameters[short], tensor, *shard)
        weight = LinearFormat(LAYOUTS[module], Codecs.of(codec)).decode(tensors)
        vector = tensors["bias"].float() if bias else torch.zeros(len(weight))
        rows.append(torch.cat([weight, vector[:, None]], dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.usefixtures("vllm_process")
def test_real_layers_compute_the_stored_matrix(name: str, bias: bool, codec: str) -> None:
    from vllm_spense.serving.layers.linear import SpenseLinearMethod

    layer = make_layer(name, make_config(bias, codec), bias)
    assert type(layer.quant_method) is SpenseLinearMethod
    dense = load(layer, name, codec, bias)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, 3, dense.shape[1] - 1, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    wide = x.float()
    dtype = Codecs.of(codec).activation_dtype
    if dtype is not None:
        q, scale = quantize_per_token(x.flatten(0, 1), dtype)
        wide = (q.float() * scale).view(x.shape)
    expected = wide @ dense[:, :-1].T + dense[:, -1]
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() / expected.norm() < BOUND


@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize("name", ["qkv_proj", "o_proj"])
@pytest.mark.usefixtures("vllm_process")
def test_attention_with_half_of_its_heads_in_24(
    name: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three parts with unlike numbers of 2:4 rows; of q, k and v it is checked that heads stay whole."""
    for short, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        layout = Layout("output", heads * HEAD_DIM, HIDDEN, heads * HEAD_DIM // 2)
        monkeypatch.setitem(LAYOUTS, f"{ATTN}.{short}_proj", layout)
    features = HEADS * HEAD_DIM
    monkeypatch.setitem(LAYOUTS, f"{ATTN}.o_proj", Layout("input", HIDDEN, features, features // 2))
    checked: list[int] = []
    monkeypatch.setattr("vllm_spense.serving.layers.linear.check_heads", lambda _, size: checked.append(size))
    test_real_layers_compute_the_stored_matrix(name, True, codec)
    assert checked == ([HEAD_DIM] if name == "qkv_proj" else [])


@pytest.mark.parametrize(
    "skip", [f"{MLP}.up_proj.sparse_meta", f"{MLP}.gate_proj.bias", f"{MLP}.up_proj.weight_scale"]
)
@pytest.mark.usefixtures("vllm_process")
def test_a_missing_shard_stops_the_load(skip: str) -> None:
    layer = make_layer("gate_up_proj", make_config())
    load(layer, "gate_up_proj", "fp8", True, skip=skip)
    module, _, tensor = skip.rpartition(".")
    with pytest.raises(
        CheckpointError, match=f"module {module}, tensor {tensor}: the tensor was never loaded"
    ):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.usefixtures("vllm_process")
def test_a_bad_value_stops_the_load() -> None:
    layer = make_layer("down_proj", make_config())
    load(layer, "down_proj", "fp8", True)
    layer.weight_scale.data[7] = 0.0
    with pytest.raises(
        CheckpointError, match="tensor weight_scale: a scale that is not finite and positive at"
    ):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.usefixtures("vllm_process")
def test_lora_finds_a_weight(name: str) -> None:
    layer = make_layer(name, make_config())
    load(layer, name, "fp8", True)
    layer.quant_method.process_weights_after_loading(layer)
    assert any(isinstance(getattr(layer, n, None), torch.Tensor) for n in ("weight", "weight_packed"))
    assert not any(p.requires_grad for p in layer.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize(
    ("backend", "codec"),
    [("", "fp8"), ("reference", "fp8"), ("vllm-fp8", "fp8"), ("", "bf16")],
    ids=str,
)
@pytest.mark.usefixtures("vllm_process")
def test_sleep_finds_every_tensor(
    name: str, backend: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sleep takes the memory of parameters and buffers away, waking (level 1) brings the bytes back.

    Nothing else holds weights: without them the output is 0.
    """
    if backend:
        monkeypatch.setenv("SPENSE_BACKEND", backend)
    layer = make_layer(name, make_config(codec=codec))
    dense = load(layer, name, codec, True)
    layer.quant_method.process_weights_after_loading(layer)
    if codec == "bf16" and not layer.weight.numel():
        pytest.skip(
            "vLLM's bf16 GEMM for CPUs with AVX-512 moves weights into memory of its own; CPUs do not sleep"
        )
    x = torch.randn(3, dense.shape[1] - 1, generator=torch.Generator().manual_seed(1)).bfloat16()
    awake, _ = layer(x)
    slept = [(tensor, tensor.clone()) for tensor in (*layer.parameters(), *layer.buffers())]
    for tensor, _ in slept:
        tensor.data.zero_()
    assert not layer(x)[0].any()
    for tensor, kept in slept:
        tensor.data.copy_(kept)
    assert torch.equal(layer(x)[0], awake)
    assert awake.any()


@pytest.mark.usefixtures("vllm_process")
def test_a_layer_that_is_not_listed_stays_unquantised() -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    layer = make_layer("o_proj", make_config(drop=f"{ATTN}.o_proj"))
    assert type(layer.quant_method) is UnquantizedLinearMethod


@pytest.mark.parametrize(
    ("name", "drop"), [("gate_up_proj", f"{MLP}.up_proj"), ("qkv_proj", f"{ATTN}.k_proj")]
)
@pytest.mark.usefixtures("vllm_process")
def test_a_fused_layer_must_be_listed_whole(name: str, drop: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{name}: vLLM fuses .*{drop}.*only some of them are listed"):
        make_layer(name, make_config(drop=drop))


@pytest.mark.usefixtures("vllm_process")
def test_values_that_are_keys() -> None:
    """Gemma 4's layers of full attention may have no v_proj: vLLM loads k_proj as keys and as values."""
    from transformers import Gemma4TextConfig

    config = make_config(bias=False, drop=f"{ATTN}.v_proj")
    config.maybe_update_config("org/name", Gemma4TextConfig(attention_k_eq_v=True))
    layer = make_layer("qkv_proj", config, bias=False)
    parameters = dict(layer.named_parameters())
    for module, shards in ((f"{ATTN}.q_proj", "q"), (f"{ATTN}.k_proj", "kv")):
        for shard in shards:
            for short, tensor in stored(module, "fp8", False).items():
                parameters[short].weight_loader(parameters[short], tensor, shard)
    layer.quant_method.process_weights_after_loading(layer)
    out = layer(torch.randn(3, HIDDEN).bfloat16())[0]
    _, k, v = out.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=1)
    assert torch.equal(k, v)
    assert k.abs().sum() > 0
    with pytest.raises(CheckpointError, match="only some of them are listed"):
        make_layer("qkv_proj", make_config(drop=f"{ATTN}.v_proj"))


@pytest.mark.usefixtures("vllm_process")
def test_extents_of_another_model_are_refused_when_the_layer_is_built() -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    with pytest.raises(
        CheckpointError, match=r"down_proj: quantization_config says \[48, 96\], the model .* \[48, 128\]"
    ):
        RowParallelLinear(128, HIDDEN, quant_config=make_config(), prefix=f"{MLP}.down_proj")


@pytest.mark.usefixtures("vllm_process")
def test_only_linear_layers_get_a_method() -> None:
    assert make_config().get_quant_method(torch.nn.LayerNorm(4), "model.norm") is None


@pytest.mark.parametrize(
    ("name", "split"),
    [("gate_up_proj", "output"), ("down_proj", "input"), ("qkv_proj", None), ("o_proj", None)],
)
@pytest.mark.usefixtures("vllm_process")
def test_load_time_mode_prunes_mlps_only(name: str, split: Split | None) -> None:
    from vllm_spense.serving.config import SpenseConfig
    from vllm_spense.serving.layers.online import SpenseOnlineLinearMethod

    method = make_layer(name, SpenseConfig()).quant_method
    assert type(method) is SpenseOnlineLinearMethod
    assert method.dense_ratio == (1.0 if split is None else 0.5)
    assert split is None or method.split == split


@pytest.mark.parametrize(
    ("prefix", "split"),
    [
        ("model.layers.0.mlp.fc1", "output"),
        ("model.layers.0.mlp.c_fc", "output"),
        ("model.layers.0.mlp.up_proj", "output"),
        ("model.layers.0.feed_forward.gate_up_proj", "output"),
        ("model.layers.0.fc2", "input"),
        ("model.layers.0.mlp.c_proj", "input"),
        ("model.layers.0.self_attn.out_proj", None),
        ("model.layers.0.linear_attn.in_proj_qkvz", None),
        ("model.layers.0.linear_attn.in_proj_ba", "unquantised"),
        ("model.layers.0.qkv_proj", "unquantised"),  # Falcon-H1's
        ("model.layers.0.mamba.in_proj", "unquantised"),
    ],
)
@pytest.mark.usefixtures("vllm_process")
def test_load_time_mode_by_the_name_of_a_layer(prefix: str, split: str | None) -> None:
    from transformers import FalconH1Config
    from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod

    from vllm_spense.serving.config import SpenseConfig

    config = SpenseConfig()
    if split == "unquantised" or "feed_forward" in prefix:
        config.maybe_update_config("org/name", FalconH1Config())
    layer = ColumnParallelLinear(HIDDEN, 16, bias=False, quant_config=config, prefix=prefix)
    if split == "unquantised":
        assert type(layer.quant_method) is UnquantizedLinearMethod
    else:
        assert layer.quant_method.dense_ratio == (1.0 if split is None else 0.5)
        assert split is None or layer.quant_method.split == split


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_a_layer_that_is_fused_on_disk(size: int) -> None:
    """Phi-3's qkv_proj: where ranks outnumber key/value heads, each holds a copy of one."""
    from vllm_spense.serving.layers.online import _rows

    assert _rows([96 // size] * 2, 192, size, "x") == [96, 96]
    heads, shared = 8, 2
    widths = [heads * 8 // size, *[max(1, shared // size) * 8] * 2]
    assert _rows(widths, (heads + 2 * shared) * 8, size, "x") == [64, 16, 16]
    with pytest.raises(CheckpointError, match=r"module x, tensor weight: the tensor on disk has 100 rows"):
        _rows([96 // size] * 2, 100, size, "x")


@pytest.mark.usefixtures("vllm_process")
def test_load_time_mode_leaves_routers_alone() -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    from vllm_spense.serving.config import SpenseConfig

    layer = ReplicatedLinear(HIDDEN, 8, quant_config=SpenseConfig(), prefix=f"{MLP}.gate")
    assert type(layer.quant_method) is UnquantizedLinearMethod


def captured(name: str, action: Callable[[], object]) -> str:
    """Messages of one logger; vLLM's loggers do not propagate, so caplog alone would miss them."""
    records: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger(name)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        action()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return "\n".join(records)


def test_load_time_mode_warns() -> None:
    from transformers import LlamaConfig

    from vllm_spense.serving.config import SpenseConfig

    def warning(architecture: str) -> str:
        config = SimpleNamespace(architectures=[architecture], get_text_config=lambda: LlamaConfig())
        return captured(
            "vllm_spense.serving.config", lambda: SpenseConfig().maybe_update_config("model", config)
        )

    assert "shows speed, NOT quality" in warning("LlamaForCausalLM")
    assert "Nothing is pruned" in warning("SparseLlamaForCausalLM")
    assert "NOT quality" not in warning("SparseLlamaForCausalLM")


@pytest.mark.usefixtures("vllm_process")
def test_the_start_up_log_counts_real_layers() -> None:
    config = make_config(drop=f"{ATTN}.o_proj")
    layers = {name: make_layer(name, config) for name in SHARDS}

    def finish() -> None:
        for name in ("gate_up_proj", "qkv_proj", "down_proj"):
            load(layers[name], name, "fp8", True)
            layers[name].quant_method.process_weights_after_loading(layers[name])

    block = captured("vllm.spense", finish)
    assert block.count("Spense:") == 1
    assert "3 linear layers: 2 hybrid (2:4 + dense), 1 all-dense FP8; 1 more left unquantized" in block
    assert "mean dense ratio of the hybrid MLP layers: 0.333" in block
    assert "back ends: cpu 3" in block


@pytest.mark.usefixtures("vllm_process")
def test_a_pipeline_stage_logs_the_layers_that_it_holds() -> None:
    """The config lists all modules of the model, vLLM creates only those of this stage."""
    layer = make_layer("down_proj", make_config())

    def finish() -> None:
        load(layer, "down_proj", "fp8", True)
        layer.quant_method.process_weights_after_loading(layer)

    assert "1 linear layers: 1 hybrid" in captured("vllm.spense", finish)


@pytest.mark.usefixtures("vllm_process")
def test_the_start_up_log_of_load_time_mode_and_none_of_a_reload() -> None:
    """vLLM processes these layers while it loads; a reload processes all of them again."""
    from vllm.model_executor.model_loader.reload import layerwise

    from vllm_spense.serving.config import SpenseConfig

    config = SpenseConfig()
    layers = {name: make_layer(name, config, bias=False) for name in ("gate_up_proj", "down_proj", "o_proj")}
    model = torch.nn.ModuleDict(layers)
    layerwise.record_metadata_for_reloading(model)

    def load_dense() -> None:
        for name, layer in layers.items():
            for module, shard in SHARDS[name]:
                layout = LAYOUTS[module]
                weight = torch.randn(layout.out_features, layout.in_features).bfloat16()
                layer.weight.weight_loader(layer.weight, weight, *shard)

    def reload() -> None:
        layerwise.initialize_layerwise_reload(model)
        load_dense()

    block = captured("vllm.spense", load_dense)
    assert block.count("Spense:") == 1
    assert "3 linear layers: 2 hybrid (2:4 + dense), 1 all-dense FP8; 0 more left unquantized" in block
    assert "mean dense ratio of the hybrid MLP layers: 0.500" in block
    before = layers["down_proj"].weight_packed.clone()
    assert captured("vllm.spense", reload) == ""
    assert not torch.equal(layers["down_proj"].weight_packed, before)


def test_config_crosses_process_borders() -> None:
    from vllm_spense.serving.config import SpenseConfig

    config = make_config()
    again = pickle.loads(pickle.dumps(config))
    assert again.checkpoint == config.checkpoint
    assert again.modules == config.modules
    assert again.packed_modules_mapping == PACKED
    assert pickle.loads(pickle.dumps(SpenseConfig())).checkpoint is None


def test_names_are_mapped_to_vllm() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = make_config()
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert set(config.modules) == {f"language_model.{name}" for name in LAYOUTS}
    assert config.shard_names("language_model.model.layers.0.mlp.gate_up_proj") == [
        f"language_model.{MLP}.gate_proj",
        f"language_model.{MLP}.up_proj",
    ]


def test_parts_of_a_layer_that_vllm_takes_for_fused_on_disk() -> None:
    """Phi-3 maps gate_up_proj and qkv_proj to themselves, but a Spense checkpoint holds their parts."""
    config = make_config()
    config.packed_modules_mapping = {"gate_up_proj": ["gate_up_proj"], "qkv_proj": ["qkv_proj"]}
    assert config.shard_names(f"{MLP}.gate_up_proj") == [f"{MLP}.gate_proj", f"{MLP}.up_proj"]
    assert config.shard_names(f"{MLP}.qkv_proj") == [f"{MLP}.qkv_proj"]  # plain tensors in a bf16 checkpoint


@pytest.mark.parametrize("version", [3, True, "1"])
def test_a_bad_config_is_refused(version: object) -> None:
    from vllm_spense.serving.config import SpenseConfig

    raw = make_config().checkpoint.model_dump() | {"version": version}
    with pytest.raises(CheckpointError, match=r"format version .* is not supported"):
        SpenseConfig.from_config(raw)


def test_a_hub_name_is_no_directory() -> None:
    """Nothing local to check: vLLM downloads it, and the values are checked after loading."""
    make_config().maybe_update_config("somebody/some-model")


def test_pickled_weights_are_refused(tmp_path: Path, tiny_spense: Path) -> None:
    shutil.copy(tiny_spense / "config.json", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    from vllm_spense.serving.config import SpenseConfig

    config = SpenseConfig.from_config(raw)
    config.maybe_update_config(str(tmp_path))  # nothing to load: --load-format dummy
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled weights are never loaded"):
        config.maybe_update_config(str(tmp_path))
