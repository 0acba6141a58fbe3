"""What every rank takes of bitsandbytes' weights: together exactly the whole, in any cut."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bitsandbytes_models import dequantised, quantised
from vllm_spense.format import CheckpointError
from vllm_spense.format.checkpoint import TensorInfo
from vllm_spense.ops.linear.reference import decoded

pytestmark = pytest.mark.usefixtures("vllm_process")
SAFETENSORS = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}


def config_of(files: dict[str, dict[str, torch.Tensor]]) -> Any:
    """Our configuration of a checkpoint with these modules."""
    from vllm_spense.serving.config import SpenseConfig

    config = SpenseConfig.from_config({"quant_method": "bitsandbytes", "load_in_4bit": True})
    config.read(
        {
            f"{module}.{name}": TensorInfo(Path("file"), SAFETENSORS[tensor.dtype], tuple(tensor.shape))
            for module, tensors in files.items()
            for name, tensor in tensors.items()
        }
    )
    return pickle.loads(pickle.dumps(config))  # as vLLM sends it to its workers


def make(
    files: dict[str, dict[str, torch.Tensor]],
    widths: list[int],
    columns: int,
    in_features: int,
    rank: int = 0,
    size: int = 1,
    load: bool = True,
) -> tuple[Any, Any]:
    """A rank's layer of these modules, and its method, which has loaded them."""
    from vllm_spense.serving.layers.bitsandbytes import BitsAndBytesLinearMethod

    config = config_of(files)
    modules = [config.modules.get(name) or config.plain[name] for name in files]
    method = BitsAndBytesLinearMethod("layer", modules, config.summary)
    layer = torch.nn.Module()
    layer.tp_rank, layer.tp_size = rank, size  # type: ignore[assignment]
    method.create_weights(layer, columns, widths, in_features, sum(widths) * size, torch.bfloat16)
    if load:
        fill(config, layer, files, len(widths))
    return method, layer


def fill(config: Any, layer: Any, files: dict[str, dict[str, torch.Tensor]], parts: int) -> None:
    """Every tensor to the parameter whose name vLLM's mapper gives, by its own loader."""
    parameters = dict(layer.named_parameters())
    mapper = config.get_checkpoint_weight_mapper()
    for index, (module, tensors) in enumerate(files.items()):
        shard = () if len(files) == 1 else ({0: "q", 1: "k", 2: "v"}[index] if parts == 3 else index,)
        renamed = mapper.apply((f"{module}.{name}", tensor) for name, tensor in tensors.items())
        for name, tensor in renamed:
            short = name.removeprefix(f"{module}.")
            if short != "bias":
                parameters[short].weight_loader(parameters[short], tensor, *shard)


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


kinds = pytest.mark.parametrize(
    ("quant_type", "nested"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
)


@kinds
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("in_features", [128, 144, 200, 20])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_the_ranks_have_the_whole(
    axis: str, size: int, in_features: int, blocksize: int, quant_type: str, nested: bool
) -> None:
    """Rows that begin within a block, and columns that do, too: bit by bit what bitsandbytes makes of it."""
    tensors = quantised(random(24, in_features), quant_type, nested, blocksize)
    whole = dequantised(tensors)
    columns = in_features // size if axis == "input" else in_features
    if columns % 2:
        with pytest.raises(CheckpointError, match="two share a byte"):
            make({"one": tensors}, [24], columns, in_features, 0, size)
        return
    parts = []
    for rank in range(size):
        width = 24 // size if axis == "output" else 24
        method, layer = make({"one": tensors}, [width], columns, in_features, rank, size)
        spec, found = method.collect(layer)
        parts.append(decoded(spec, found).bfloat16())
    assert torch.equal(torch.cat(parts, 0 if axis == "output" else 1), whole)


@pytest.mark.parametrize("fused_in_file", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_layers_with_copied_heads(size: int, fused_in_file: bool) -> None:
    """q, k and v of 8 and 2 heads of 16: at four ranks, two have the same key head."""
    rows = {"q": 128, "k": 32, "v": 32}
    weights = {name: random(count, 96, seed) for seed, (name, count) in enumerate(rows.items())}
    files = {name: quantised(weight) for name, weight in weights.items()}
    whole = {name: dequantised(tensors) for name, tensors in files.items()}
    if fused_in_file:
        files = {"qkv": quantised(torch.cat(list(weights.values())))}
        whole = dict(zip(rows, dequantised(files["qkv"]).split([128, 32, 32]), strict=True))
    heads = max(1, 2 // size)
    for rank in range(size):
        widths = [128 // size, 16 * heads, 16 * heads]
        method, layer = make(files, widths, 96, 96, rank, size)
        copy = rank * (2 // heads) // size
        expected = [
            whole["q"][rank * widths[0] : (rank + 1) * widths[0]],
            *(whole[name][copy * widths[1] : (copy + 1) * widths[1]] for name in "kv"),
        ]
        assert torch.equal(decoded(*method.collect(layer)).bfloat16(), torch.cat(expected))


def test_a_layer_with_plain_modules_among_its_own() -> None:
    """unsloth's dynamic checkpoints leave single modules in bf16: such a layer is decoded as a whole."""
    files = {
        "q": quantised(random(32, 64)),
        "k": {"weight": random(16, 64, 1)},
        "v": quantised(random(16, 64, 2)),
    }
    whole = [dequantised(files["q"]), files["k"]["weight"], dequantised(files["v"])]
    for rank in range(2):
        method, layer = make(files, [16, 8, 8], 64, 64, rank, 2)
        spec, tensors = method.collect(layer)
        expected = torch.cat([part.chunk(2)[rank] for part in whole])
        assert torch.equal(decoded(spec, tensors).bfloat16(), expected)


def test_a_table_of_its_own_is_used() -> None:
    tensors = quantised(random(16, 64), nested=False)
    tensors["weight.quant_map"] = tensors["weight.quant_map"] * 0.5
    method, layer = make({"one": tensors}, [16], 64, 64)
    spec, found = method.collect(layer)
    usual = decoded(*_usual(tensors))
    assert torch.equal(decoded(spec, found), usual * 0.5)


def _usual(tensors: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    method, layer = make(
        {"one": tensors | {"weight.quant_map": tensors["weight.quant_map"] * 2}}, [16], 64, 64
    )
    return method.collect(layer)


def test_what_never_came_and_what_does_not_fit() -> None:
    tensors = quantised(random(16, 64))
    for missing in tensors:
        config = config_of({"one": tensors})
        method, layer = make({"one": tensors}, [16], 64, 64, load=False)
        fill(config, layer, {"one": {n: t for n, t in tensors.items() if n != missing}}, 1)
        with pytest.raises(CheckpointError, match="never loaded"):
            method.collect(layer)
    with pytest.raises(CheckpointError, match=r"16 rows of 64 columns, a rank takes 12"):
        make({"one": tensors}, [12], 64, 64)
    with pytest.raises(CheckpointError, match="no rows of 60 codes"):
        make({"one": tensors}, [16], 60, 60)
    method, layer = make({"one": tensors}, [32], 32, 32)
    with pytest.raises(CheckpointError, match=r"its state says shape \[16, 64\]"):
        method.collect(layer)
    two = {"a": quantised(random(16, 64)), "b": quantised(random(16, 64), nested=False)}
    with pytest.raises(CheckpointError, match="with and without nested absmax"):
        make(two, [16, 16], 64, 64)
    mixed = {"a": quantised(random(16, 64)), "b": quantised(random(16, 64), "fp4")}
    method, layer = make(mixed, [16, 16], 64, 64)
    with pytest.raises(CheckpointError, match="different quant_maps"):
        method.collect(layer)


def test_only_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of({"lm_head": quantised(random(16, 64)), "experts.0.w1": quantised(random(16, 64))})

    class FakeMoE(torch.nn.Module):
        """Named as vLLM's."""

    assert config.get_quant_method(torch.nn.Module(), "norm") is None
    for layer, prefix in ((torch.nn.Embedding(2, 2), "lm_head"), (FakeMoE(), "experts")):
        with pytest.raises(CheckpointError, match="is not supported"):
            config.get_quant_method(layer, prefix)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"load_in_8bit": True}, "8-bit bitsandbytes"),
        ({}, "neither 4 nor 8 bits"),
        ({"load_in_4bit": [1]}, "cannot be used"),
    ],
)
def test_what_is_not_4_bits_is_refused(config: dict[str, Any], problem: str) -> None:
    from vllm_spense.serving.config import SpenseConfig

    with pytest.raises(CheckpointError, match=problem):
        SpenseConfig.from_config({"quant_method": "bitsandbytes", **config})


def test_foreign_models_are_not_taken_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spense.serving import compat
    from vllm_spense.serving.config import SpenseConfig

    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    take = SpenseConfig.override_quantization_method
    monkeypatch.setattr(compat, "quantization_methods", lambda: ["fp8", "spense"])
    assert take(bnb, None) == take(bnb, "spense") == "spense"
    assert take(bnb, "fp8") is None
    assert take({"quant_method": "gptq"}, "spense") is None
    monkeypatch.setattr(compat, "quantization_methods", lambda: ["fp8", "spense", "bitsandbytes"])
    assert take(bnb, None) is None, "whoever registered it serves it"
    assert take(bnb, "spense") == "spense"
