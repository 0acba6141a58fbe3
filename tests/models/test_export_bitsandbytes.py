"""`spense export` of 4-bit directories of bitsandbytes: its bits, or a Spense checkpoint with its codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bitsandbytes_models import dequantised_model, quantise_model, quantised, write_layer
from tests.tiny import make_llama
from tests.tiny_families import make_family
from vllm_spense.format import Checkpoint, CheckpointError
from vllm_spense.format.bitsandbytes import open_checkpoint
from vllm_spense.models.export import ExportFormat, export
from vllm_spense.verification import verify

kinds = pytest.mark.parametrize("kind", ["nf4", "fp4"])


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose rows are whole blocks."""
    return make_llama(tmp_path_factory.mktemp("even") / "llama", hidden=192, inter=320)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_dense_weights_are_the_bits_of_bitsandbytes(family: str, nested: bool, tmp_path: Path) -> None:
    """Rows that end within a block, biases, tied embeddings, fused linears."""
    source = make_family(family, tmp_path / "dense")
    packed = quantise_model(source, tmp_path / "packed", bnb_4bit_use_double_quant=nested)
    state = load_file(export(packed, tmp_path / "bf16") / "model.safetensors")
    wide = load_file(export(packed, tmp_path / "fp32", format="float32") / "model.safetensors")
    dense = load_file(source / "model.safetensors")
    assert set(state) == set(wide) == set(dense)
    expected = {f"{name}.weight": weight for name, weight in dequantised_model(packed).items()}
    assert expected
    for name, weight in dense.items():
        found = expected.get(name, weight)
        assert torch.equal(state[name].view(torch.int16), found.view(torch.int16)), name
        if name in expected:
            assert wide[name].dtype == torch.float32
            assert torch.equal(wide[name].bfloat16(), found), name
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


@kinds
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_spense_checkpoint_with_the_same_values(
    kind: str, nested: bool, even: Path, tmp_path: Path
) -> None:
    packed = quantise_model(
        even, tmp_path / "packed", bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested
    )
    out = export(packed, tmp_path / "out", format="spense-dense")
    assert verify(out).hashes_checked
    one, other = open_checkpoint(packed), Checkpoint(out)
    config = other.require_spense()
    assert [codecs.name for codecs in config.all_codecs()] == [kind]
    assert json.loads((out / "config.json").read_text())["quantization_config"]["codec"] == kind
    assert len(config.modules) == 14
    for module in config.modules:
        assert torch.equal(one.module_weight(module), other.module_weight(module)), module
        assert torch.equal(one.load(f"{module}.bias"), other.load(f"{module}.bias"))
        assert not set(other.module_tensors(module)) - {
            "dense_weight",
            "dense_absmax",
            "weight_scale",
            "bias",
        }
    assert set(one.plain_tensors()) == set(other.plain_tensors())


def test_blocks_that_a_spense_checkpoint_lacks(tiny_bitsandbytes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"down_proj has blocks of 16 values.*export it as bfloat16"):
        export(tiny_bitsandbytes, tmp_path / "out", format="spense-dense")
    assert not (tmp_path / "out").exists()


def test_larger_blocks_are_cut(tmp_path: Path) -> None:
    packed = write_layer(tmp_path / "packed", quantised(torch.randn(48, 192), blocksize=128))
    out = export(packed, tmp_path / "out", format="spense-dense")
    one, other = open_checkpoint(packed), Checkpoint(out)
    assert torch.equal(one.module_weight("layer"), other.module_weight("layer"))


def test_a_table_that_a_spense_checkpoint_lacks(tmp_path: Path) -> None:
    tensors = quantised(torch.randn(48, 128)) | {"weight.quant_map": torch.linspace(-1, 0, 16)}
    packed = write_layer(tmp_path / "packed", tensors)
    with pytest.raises(ValueError, match=r"layer has a table of its own, .*: export it as bfloat16"):
        export(packed, tmp_path / "out", format="spense-dense")
    export(packed, tmp_path / "out")


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_formats_of_other_codecs(tiny_bitsandbytes: Path, tmp_path: Path, format: ExportFormat) -> None:
    with pytest.raises(ValueError, match="holds nf4 weights: export it as bfloat16"):
        export(tiny_bitsandbytes, tmp_path / "out", format=format)


def test_nothing_is_written_of_a_damaged_one(tiny_bitsandbytes: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "config.json").write_bytes((tiny_bitsandbytes / "config.json").read_bytes())
    tensors = load_file(tiny_bitsandbytes / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight.nested_absmax"
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        export(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
