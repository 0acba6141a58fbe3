"""A model whose layers come and go computes what the ordinary model does, and broken files are named."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_gemma4 import gemma4
from vllm_spense.format import CheckpointError
from vllm_spense.models.parts import decoder
from vllm_spense.pruning import PruneConfig
from vllm_spense.pruning.activations import LayerInputs, on_disk
from vllm_spense.pruning.layer import LayerPruner
from vllm_spense.pruning.source import SourceModel

CPU = torch.device("cpu")
KINDS = ["llama", "qwen3", "gemma3_text", "phi3", "llama3-rope", "diffllama", "gemma4_text"]
"""DiffLlama makes parameters outside of the meta device; Gemma 4 has buffers that the files hold."""
WINDOWS = torch.arange(48).view(2, 24)


def save_model(kind: str, out: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind == "gemma4_text":
        model = gemma4().to(dtype)
        for layer in model.model.layers:
            layer.layer_scalar.fill_(0.5)
        model.save_pretrained(out)
        return out
    options: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "pad_token_id": 0,
        "sliding_window": 6,
    }
    if kind == "gemma3_text":
        options["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    if kind == "llama3-rope":  # frequencies that the default formula does not give
        kind = "llama"
        options["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    model.to(dtype).save_pretrained(out)
    return out


def ordinary(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def streamed_logits(source: SourceModel) -> torch.Tensor:
    with source.resident(*source.embedding()):
        inputs = LayerInputs(source.network, WINDOWS, CPU, dtype=source.dtype)
    for index, layer in enumerate(source.layers):
        with source.resident(layer.module):
            inputs.advance(index, layer.module)
        assert all(p.is_meta for p in source.network.parameters())
    network = source.network
    with source.resident(decoder(network).norm, network.lm_head):
        return torch.cat([network.lm_head(decoder(network).norm(x[None])) for x in inputs.hidden])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_streamed_logits_are_the_ordinary_models(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = save_model(kind, tmp_path / "model")
    model = ordinary(directory, dtype)
    expected = torch.cat([model(window[None], use_cache=False).logits for window in WINDOWS])
    got = streamed_logits(SourceModel(directory, CPU, dtype))
    if kind == "phi3":  # its fused linears run as their parts, in GEMMs of other shapes
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_that_no_file_holds_have_their_values(kind: str, tmp_path: Path) -> None:
    directory = save_model(kind, tmp_path / "model")
    source = SourceModel(directory, CPU)
    expected = dict(ordinary(directory, torch.float32).named_buffers())
    found = {k: v for k, v in source.network.named_buffers() if k not in source.checkpoint.tensors}
    expected = {k: v for k, v in expected.items() if k not in source.checkpoint.tensors}
    assert found.keys() == expected.keys()
    assert len(found) >= 2
    for name, buffer in found.items():
        assert torch.equal(buffer, expected[name]), name
        assert buffer.dtype == expected[name].dtype


def test_compute_dtype(tmp_path: Path) -> None:
    directory = save_model("llama", tmp_path / "model")
    assert SourceModel(directory, CPU).dtype == torch.float32
    cuda = SourceModel(directory, torch.device("meta"))  # any device but the CPU
    assert cuda.dtype == torch.bfloat16


@torch.no_grad()
def test_a_layer_is_gone_after_its_turn(tmp_path: Path) -> None:
    source = SourceModel(save_model("llama", tmp_path / "model"), CPU)
    linear = source.layers[1].mlp.down
    with source.resident(source.layers[1].module):
        assert not linear.weight.is_meta
        assert source.layers[0].mlp.down.weight.is_meta
        first = linear.weight.clone()
        gone = weakref.ref(linear.weight)
        linear.weight.zero_()
    gc.collect()
    assert gone() is None
    with source.resident(source.layers[1].module):
        assert torch.equal(linear.weight, first), "the file is as it was"


@torch.no_grad()
def test_cached_arguments_do_not_hold_the_model(tmp_path: Path) -> None:
    source = SourceModel(save_model("gemma3_text", tmp_path / "model"), CPU)
    with source.resident(*source.embedding()):
        embedding = weakref.ref(decoder(source.network).embed_tokens.weight)
        inputs = LayerInputs(source.network, WINDOWS, CPU)
    network = weakref.ref(source.network)
    del source
    gc.collect()
    assert embedding() is None
    assert network() is None
    assert inputs.hidden.dtype == torch.bfloat16


@pytest.mark.parametrize("disk", [False, True])
@torch.no_grad()
def test_two_streams_share_the_arguments_and_nothing_else(disk: bool, tmp_path: Path) -> None:
    source = SourceModel(save_model("gemma3_text", tmp_path / "model"), CPU)
    allocate = {"allocate": on_disk(tmp_path)} if disk else {}
    with source.resident(*source.embedding()):
        dense = LayerInputs(source.network, WINDOWS, CPU, **allocate)
    before = dense.hidden.clone()
    pruned = dense.fork()
    with source.resident(source.layers[0].module):
        pruned.advance(0, source.layers[0].module)
    assert torch.equal(dense.hidden, before)
    assert not torch.equal(pruned.hidden, before)
    assert pruned._arguments is dense._arguments
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@torch.no_grad()
def test_bf16_layers_are_pruned_as_fp32_ones(tmp_path: Path) -> None:
    """As on a GPU: the layer runs in bf16, statistics and solver in fp32."""
    directory = save_model("llama", tmp_path / "model")
    windows = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(0))  # 6 tokens a column
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        source = SourceModel(directory, CPU, dtype)
        with source.resident(*source.embedding()):
            inputs = LayerInputs(source.network, windows, CPU)
        config = PruneConfig(calibration="x", dense_ratio=0.5, alignment=8)
        with source.resident(source.layers[0].module):
            results.append(LayerPruner(config, inputs).prune(0, source.layers[0]))
            assert source.layers[0].mlp.down.weight.dtype == dtype
    wide, narrow = results
    for name, loss in wide.losses.items():
        assert narrow.losses[name] == pytest.approx(loss, rel=0.02)
    assert {w.dtype for w in narrow.weights.values()} == {torch.float32}


def edited(directory: Path, edit) -> Path:
    state = load_file(directory / "model.safetensors")
    edit(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop(NORM), f"{NORM}.*missing.*Fix"),
        (lambda s: s.update({UP: s[UP][:-1].contiguous()}), rf"{UP}: shape \[63, 32\].*needs \[64, 32\]"),
        (
            lambda s: s.update({UP: s[UP].to(torch.float8_e4m3fn)}),
            f"{UP}: dtype F8_E4M3, expected one of BF16",
        ),
    ],
)
def test_bad_tensors_are_named_before_any_is_read(edit, message: str, tmp_path: Path) -> None:
    directory = edited(save_model("llama", tmp_path / "model"), edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        SourceModel(directory, CPU)
    assert str(directory) in str(caught.value)


def test_a_tied_head_comes_from_the_embedding(tmp_path: Path) -> None:
    source = SourceModel(save_model("gemma3_text", tmp_path / "model"), CPU)
    assert "lm_head.weight" not in source.checkpoint.tensors
    with source.resident(source.network.lm_head):
        expected = source.checkpoint.load("model.embed_tokens.weight").float()
        assert torch.equal(source.network.lm_head.weight, expected)
