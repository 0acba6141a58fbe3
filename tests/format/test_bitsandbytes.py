"""4-bit checkpoints of bitsandbytes: every bit of a weight is what bitsandbytes itself decodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bitsandbytes_models import dequantised, dequantised_model, quantise_model, quantised, write_layer
from tests.tiny_families import make_family
from vllm_spense.format import Checkpoint
from vllm_spense.format.bitsandbytes import BitsAndBytesCheckpoint, QuantState, open_checkpoint
from vllm_spense.format.codecs import FP4, NF4
from vllm_spense.format.validate import check_checkpoint

kinds = pytest.mark.parametrize("kind", ["nf4", "fp4"])
absmax = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
SHAPES = {"whole blocks": (48, 128), "blocks over row ends": (48, 80), "half a block at the end": (7, 208)}


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Zeros with their sign, too."""
    bits = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return left.dtype == right.dtype and torch.equal(left.view(bits), right.view(bits))


def read_layer(directory: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(directory)
    check_checkpoint(checkpoint)
    return checkpoint.module_weight("layer")


@kinds
@absmax
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_bit(kind: str, nested: bool, block: int, shape: tuple[int, int], tmp_path: Path) -> None:
    tensors = quantised(weight_of(shape), kind, nested, block)
    expected = dequantised(tensors)
    assert expected.dtype == torch.bfloat16
    assert same_bits(read_layer(write_layer(tmp_path / "d", tensors)).bfloat16(), expected)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@absmax
def test_every_bit_of_models_in_other_dtypes(
    kind: str, dtype: torch.dtype, nested: bool, tmp_path: Path
) -> None:
    tensors = quantised(weight_of((48, 80), dtype), kind, nested)
    found = read_layer(write_layer(tmp_path / "d", tensors))
    assert same_bits(found.to(dtype), dequantised(tensors))


@absmax
@pytest.mark.parametrize("storage", [torch.int8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_in_other_dtypes(storage: torch.dtype, nested: bool, tmp_path: Path) -> None:
    """``bnb_4bit_quant_storage``: FSDP shards tensors of one dtype."""
    tensors = quantised(weight_of((48, 80)), "nf4", nested, storage=storage)
    assert tensors["weight"].dtype == storage
    found = read_layer(write_layer(tmp_path / "d", tensors))
    assert same_bits(found.bfloat16(), dequantised(tensors))


def test_blocks_run_over_row_ends() -> None:
    """What the other tests hold the files against is the slow definition, and near the weight."""
    weight = weight_of((48, 80), torch.float32)
    tensors = quantised(weight, "nf4", nested=False)
    expected = dequantised(tensors)
    codes = tensors["weight"].view(-1)
    codes = torch.stack((codes >> 4, codes & 15), 1).view(-1)
    scales = tensors["weight.absmax"].repeat_interleave(64)
    slow = tensors["weight.quant_map"][codes.int()] * scales
    assert same_bits(slow.view(48, 80), expected)
    assert (expected - weight).abs().mean() < 0.1


def test_the_usual_tables_are_ours(tmp_path: Path) -> None:
    for kind, codec in (("nf4", NF4), ("fp4", FP4)):
        write_layer(tmp_path / kind, quantised(weight_of((48, 128)), kind))
        assert open_checkpoint(tmp_path / kind).linear("layer").codecs.single is codec


@kinds
def test_a_table_of_its_own(kind: str, tmp_path: Path) -> None:
    """Each code stands for what the file says, by the slow definition."""
    tensors = quantised(weight_of((48, 80), torch.float32), kind, nested=False)
    table = torch.linspace(-0.9375, 0.9375, 16)
    table[3] = 0
    found = read_layer(write_layer(tmp_path / "d", tensors | {"weight.quant_map": table})).view(-1)
    codes, scales = tensors["weight"].view(-1).tolist(), tensors["weight.absmax"].tolist()
    for place in range(0, len(found), 7):
        code = codes[place // 2] >> 4 if place % 2 == 0 else codes[place // 2] & 15
        assert float(found[place]) == float(table[code] * torch.tensor(scales[place // 64]))
    assert open_checkpoint(tmp_path / "d").linear("layer").codecs.single is not NF4


@pytest.mark.parametrize(
    ("block", "columns", "kept"), [(64, 128, 64), (128, 128, 64), (128, 80, 16), (64, 208, 16), (32, 96, 32)]
)
def test_blocks_that_are_kept(block: int, columns: int, kept: int) -> None:
    """The largest that neither a block nor a row of theirs ends within."""
    state = QuantState(quant_type="nf4", blocksize=block, dtype="bfloat16", shape=[4, columns])
    assert state.kept_block == kept
    assert state.codec() is NF4.variant(kept)


@kinds
@absmax
def test_a_model(kind: str, nested: bool, tiny_llama: Path, tmp_path: Path) -> None:
    """With biases, and K of 144 and 208: multiples of 16 and not of 64."""
    out = quantise_model(
        tiny_llama, tmp_path / "out", bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested
    )
    checkpoint, expected = open_checkpoint(out), dequantised_model(out)
    check_checkpoint(checkpoint)
    assert isinstance(checkpoint, BitsAndBytesCheckpoint)
    assert set(checkpoint.require_spense().modules) == set(expected)
    assert len(expected) == 14
    dense = load_file(tiny_llama / "model.safetensors")
    for module, weight in expected.items():
        assert same_bits(checkpoint.module_weight(module).bfloat16(), weight), module
        assert (weight - dense[f"{module}.weight"]).float().norm() < 0.2 * weight.float().norm()
        assert torch.equal(checkpoint.module_tensors(module)["bias"], dense[f"{module}.bias"])
    others = {name for name in dense if name.rpartition(".")[0] not in expected}
    assert set(checkpoint.plain_tensors()) == others
    for name in others:
        assert torch.equal(checkpoint.load(name), dense[name])


def test_modules_that_stay_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    skip = ["lm_head", "model.layers.1.mlp"]
    out = quantise_model(tiny_llama, tmp_path / "out", llm_int8_skip_modules=skip)
    checkpoint = open_checkpoint(out)
    check_checkpoint(checkpoint)
    modules = checkpoint.require_spense().modules
    assert len(modules) == 11
    assert not [name for name in modules if name.startswith("model.layers.1.mlp")]
    assert "model.layers.1.mlp.up_proj.weight" in set(checkpoint.plain_tensors())


@pytest.mark.parametrize("family", ["qwen2", "phi3", "opt"])
def test_families(family: str, tmp_path: Path) -> None:
    """Tied embeddings, linears that are fused on disk, no GLU."""
    out = quantise_model(make_family(family, tmp_path / "dense"), tmp_path / "out", bnb_4bit_quant_type="fp4")
    checkpoint = open_checkpoint(out)
    check_checkpoint(checkpoint)
    for module, weight in dequantised_model(out).items():
        assert same_bits(checkpoint.module_weight(module).bfloat16(), weight), module


def test_shards(tiny_bitsandbytes: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_bitsandbytes / "model.safetensors")
    names, where = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):  # a weight and what lies beside it in several files
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        where |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_bytes((tiny_bitsandbytes / "config.json").read_bytes())
    one, other = open_checkpoint(tiny_bitsandbytes), open_checkpoint(tmp_path)
    check_checkpoint(other)
    for module in one.require_spense().modules:
        assert torch.equal(one.module_weight(module), other.module_weight(module))


def test_other_directories_open_as_before(tiny_llama: Path, tiny_spense: Path) -> None:
    for directory in (tiny_llama, tiny_spense):
        assert type(open_checkpoint(directory)) is Checkpoint
