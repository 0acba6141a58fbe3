"""The registry, what every codec promises, and version 2: a codec for each module and region."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import LINEARS, SPARSE, layout_of
from vllm_spense.evaluation import load_model
from vllm_spense.format import Checkpoint, CheckpointError, CheckpointWriter, Codecs, Layout, LinearFormat
from vllm_spense.format.codecs import FP8, codec, codec_names, register
from vllm_spense.format.codecs.bf16 import Bf16
from vllm_spense.format.manifest import write_manifest
from vllm_spense.format.schema import CodecModuleSpec, RegionCodecs, parse_config
from vllm_spense.format.sparse24 import magnitude_mask
from vllm_spense.format.validate import check_checkpoint
from vllm_spense.models.export import export

every_codec = pytest.mark.parametrize("name", codec_names())
CODECS: dict[str, Any] = {
    "gate_proj": "toy-int8",
    "up_proj": "toy-int8",
    "down_proj": {"sparse": "fp8", "dense": "bf16"},
}
"""By the last part of a module's name; all others are FP8."""


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="there is a codec 'bf16' already"):
        register(Bf16())
    assert register(FP8) is FP8
    with pytest.raises(ValueError, match=r"unknown codec 'nf5' \(known: fp8, bf16"):
        codec("nf5")


@every_codec
def test_there_is_one_of_each(name: str) -> None:
    """Codecs are compared by identity, in other processes, too."""
    assert pickle.loads(pickle.dumps(codec(name))) is codec(name)
    assert pickle.loads(pickle.dumps(Codecs.of(name))) == Codecs.of(name)


@every_codec
def test_what_is_legal_is_finite(name: str) -> None:
    """Every pattern of bits that a stored value can have is one that a kernel may see, or is found."""
    linear = LinearFormat(Layout("output", 1, 8, 0), Codecs.of(name))
    values = linear.tensors()["dense_weight"]
    (rows, columns), dtype = values.shape, values.dtypes[0]
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    others = {n: torch.ones(s.shape, dtype=s.dtypes[0]) for n, s in linear.held().items()}
    legal = torch.zeros(rows, columns, dtype=bits)
    assert linear.illegal("dense_weight", legal.view(dtype)) is None
    info = torch.iinfo(bits)
    for pattern in range(info.min, info.max + 1):
        legal[0, 3] = pattern
        stored = legal.view(dtype)
        found = linear.illegal("dense_weight", stored)
        if found is not None:
            assert found[0] == 3
        else:
            assert torch.isfinite(linear.decode(others | {"dense_weight": stored})).all(), pattern


@pytest.mark.parametrize(("sparse", "dense"), [("fp8", "bf16"), ("bf16", "fp8"), ("bf16", "toy-int8")])
@pytest.mark.parametrize("rows", [0, 3, 5])
def test_each_region_is_checked_by_its_codec(sparse: str, dense: str, rows: int) -> None:
    """Also where a layer has one region alone, whose companions have no prefix then."""
    linear = LinearFormat(Layout("output", 5, 8, rows), Codecs(codec(sparse), codec(dense)))
    weight = torch.ones(5, 8)
    weight[:, ::2] = 0
    for name, tensor in linear.encode(weight).items():
        assert linear.illegal(name, tensor) is None, name
        if name.endswith("scale"):
            assert linear.illegal(name, tensor * 0) == (0, "a scale that is not finite and positive")
        elif tensor.dtype == torch.bfloat16:
            assert linear.illegal(name, tensor * float("nan")) == (0, "NaN or infinity")


@every_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_are_finite_and_positive(name: str, bad: float) -> None:
    linear = LinearFormat(Layout("output", 5, 8, 0), Codecs.of(name))
    for companion in codec(name).companions:
        stored = linear.tensors()[companion]
        if stored.dtypes[0] == torch.float32:
            tensor = torch.ones(stored.shape)
            assert linear.illegal(companion, tensor) is None
            tensor[3] = bad
            assert linear.illegal(companion, tensor) == (3, "a scale that is not finite and positive")


@pytest.fixture(scope="module")
def mixed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in version 2: its modules have codecs of their own, down one for each region."""
    out = tmp_path_factory.mktemp("mixed") / "spense"
    modules = {}
    with CheckpointWriter(out) as writer:
        state = load_file(tiny_llama / "model.safetensors")
        for name, tensor in state.items():
            module, _, kind = name.rpartition(".")
            last = module.rpartition(".")[2]
            if last not in LINEARS:
                writer.add(name, tensor)
            elif kind == "weight":
                layout = layout_of(module, tuple(tensor.shape), SPARSE)
                weight = tensor.float()
                rows, columns = layout.sparse_shape
                if layout.sparse:
                    weight[:rows, :columns] *= magnitude_mask(weight[:rows, :columns].abs())
                linear = LinearFormat(layout, Codecs.of(CODECS.get(last, "fp8")), bias=True)
                for short, stored in linear.encode(weight, state[f"{module}.bias"]).items():
                    writer.add(f"{module}.{short}", stored)
                spec = CodecModuleSpec.of(layout, True).model_dump()
                modules[module] = spec | ({"codec": CODECS[last]} if last in CODECS else {})
        raw = {
            "quant_method": "spense",
            "version": 2,
            "codec": "fp8",
            "tensor_parallel_sizes": [1, 2],
            "ignore": ["lm_head"],
            "modules": modules,
        }
        config = json.loads((tiny_llama / "config.json").read_text())
        writer.write_config(config | {"quantization_config": raw})
        writer.copy_side_files(tiny_llama)
    return out


def test_a_codec_for_each_module_and_region(mixed: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(mixed)
    check_checkpoint(checkpoint)
    config = checkpoint.require_spense()
    assert parse_config(config.model_dump()) == config
    found = {name.rpartition(".")[2]: checkpoint.linear(name).codecs.name for name in config.modules}
    assert found["down_proj"] == "fp8+bf16"
    assert found["gate_proj"] == "toy-int8"
    assert found["q_proj"] == "fp8"
    down = "model.layers.1.mlp.down_proj"
    tensors = checkpoint.module_tensors(down)
    assert set(tensors) == {"sparse_values", "sparse_meta", "sparse_weight_scale", "dense_weight", "bias"}
    dense = checkpoint.module_weight(down)[:, SPARSE:]
    original = load_file(mixed / "model.safetensors")
    assert torch.equal(dense, original[f"{down}.dense_weight"].float())
    exported = load_file(export(mixed, tmp_path / "dense", format="float32") / "model.safetensors")
    for name in config.modules:
        assert torch.equal(exported[f"{name}.weight"], checkpoint.module_weight(name))


def test_it_is_evaluated_as_what_it_exports(mixed: Path, tmp_path: Path) -> None:
    export(mixed, tmp_path / "dense", format="float32")
    ids = torch.tensor([[1, 17, 300, 4, 511, 42, 7, 99]])
    with torch.no_grad():
        ours = load_model(mixed, activations="none")(ids).logits
        dense = load_model(tmp_path / "dense")(ids).logits
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_said_of_it(mixed: Path, tmp_path: Path) -> None:
    import transformers

    with pytest.raises(ValueError, match="down_proj holds fp8\\+bf16 weights, as no dense layer can"):
        export(mixed, tmp_path / "twin", format="spense-dense")
    with pytest.raises(ValueError, match=r"holds fp8, fp8\+bf16, toy-int8 weights: export it as bfloat16"):
        export(mixed, tmp_path / "fp8", format="fp8")
    with pytest.raises(CheckpointError, match=r"the layers have several codecs .*spense export"):
        transformers.AutoModelForCausalLM.from_pretrained(mixed)


@pytest.mark.parametrize("lost", ["sparse_weight_scale", "sparse_meta", "dense_weight"])
def test_a_lost_tensor_is_named(mixed: Path, tmp_path: Path, lost: str) -> None:
    directory = tmp_path / "broken"
    directory.mkdir()
    state = load_file(mixed / "model.safetensors")
    del state[f"model.layers.0.mlp.down_proj.{lost}"]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_bytes((mixed / "config.json").read_bytes())
    write_manifest(directory)
    with pytest.raises(CheckpointError, match=f"down_proj, tensor {lost}: the tensor is missing"):
        check_checkpoint(Checkpoint(directory))


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        ("nf5", r"modules\.a\.codec.*unknown codec 'nf5' \(this release knows fp8, bf16"),
        ({"sparse": "fp8"}, r"modules\.a\.codec.*dense: Field required"),
        ({"sparse": "fp8", "dense": "fp8", "bias": "fp8"}, "Extra inputs are not permitted"),
        (1, r"modules\.a\.codec"),
    ],
)
def test_codecs_that_no_one_knows(codecs: object, message: str) -> None:
    spec = {"split": "output", "out_features": 8, "in_features": 8, "sparse": 4, "dense": 4, "codec": codecs}
    raw = {"quant_method": "spense", "version": 2, "codec": "fp8", "tensor_parallel_sizes": [1]}
    with pytest.raises(CheckpointError, match=message):
        parse_config(raw | {"modules": {"a": spec}})


def test_version_1_has_no_codecs_of_its_own() -> None:
    spec = {"split": "output", "out_features": 8, "in_features": 8, "sparse": 4, "dense": 4, "codec": "fp8"}
    raw = {
        "quant_method": "spense",
        "version": 1,
        "weight_dtype": "float8_e4m3fn",
        "activation_scheme": "dynamic_per_token",
        "tensor_parallel_sizes": [1],
        "modules": {"a": spec},
    }
    with pytest.raises(CheckpointError, match=r"modules\.a\.codec: Extra inputs are not permitted"):
        parse_config(raw)
    assert RegionCodecs(sparse="fp8", dense="bf16").model_dump() == {"sparse": "fp8", "dense": "bf16"}
