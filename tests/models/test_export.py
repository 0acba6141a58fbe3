"""`spense export`: the dense twin holds exactly the stored matrices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import HEAD_DIM, HEADS, KV_HEADS, make_spense
from tests.toy_codec import CUT_ANYWHERE
from vllm_spense.format import Checkpoint, CheckpointError
from vllm_spense.format.codecs import codec_names
from vllm_spense.format.manifest import check_manifest, write_manifest
from vllm_spense.format.validate import check_checkpoint
from vllm_spense.models.export import ExportFormat, export


@pytest.fixture(scope="module")
def exports(tiny_spense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    formats: tuple[ExportFormat, ...] = ("bfloat16", "float32", "fp8")
    return {f: export(tiny_spense, root / f, format=f) for f in formats}


def by_definition(tensors: dict[str, torch.Tensor], split: str, rows: int, cols: int) -> torch.Tensor:
    """Stored matrix times scale in fp32, by a loop over the groups of the compressed region."""
    dense = tensors["dense_weight"].float()
    if "sparse_values" not in tensors:
        return dense * tensors["weight_scale"][:, None]
    values, meta = tensors["sparse_values"].float().tolist(), tensors["sparse_meta"].tolist()
    sparse = torch.zeros(len(values), len(values[0]) * 2)
    for i, (row, row_meta) in enumerate(zip(values, meta, strict=True)):
        for group in range(len(row) // 2):
            nibble = row_meta[group // 2] >> 4 * (group % 2) & 15
            sparse[i, group * 4 + (nibble & 3)] = row[2 * group]
            sparse[i, group * 4 + (nibble >> 2)] = row[2 * group + 1]
    whole = torch.cat([sparse, dense], 0 if split == "output" else 1)
    assert whole.shape == (rows, cols)
    return whole * tensors["weight_scale"][:, None]


@pytest.mark.parametrize("format", ["bfloat16", "float32"])
def test_weights_equal_the_stored_matrices(
    tiny_spense: Path, exports: dict[str, Path], format: ExportFormat
) -> None:
    checkpoint = Checkpoint(tiny_spense)
    state = load_file(exports[format] / "model.safetensors")
    for module, spec in checkpoint.require_spense().modules.items():
        tensors = checkpoint.module_tensors(module)
        expected = by_definition(tensors, spec.split, spec.out_features, spec.in_features)
        assert torch.equal(state.pop(f"{module}.weight"), expected.to(getattr(torch, format))), module
        assert torch.equal(state.pop(f"{module}.bias"), tensors["bias"])
    for name, tensor in state.items():
        assert torch.equal(tensor, checkpoint.load(name)), name
    assert set(state) == set(checkpoint.plain_tensors())


def test_fp8_keeps_every_bit(tiny_spense: Path, exports: dict[str, Path]) -> None:
    checkpoint = Checkpoint(tiny_spense)
    state = load_file(exports["fp8"] / "model.safetensors")
    for module in checkpoint.require_spense().modules:
        weight, scale = checkpoint.linear(module).values(checkpoint.module_tensors(module))
        assert scale is not None
        stored = state[f"{module}.weight"]
        assert stored.dtype == torch.float8_e4m3fn
        assert torch.equal(stored.view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(state[f"{module}.weight_scale"], scale[:, None])


def test_directories_are_complete(tiny_spense: Path, exports: dict[str, Path]) -> None:
    source = json.loads((tiny_spense / "config.json").read_text())
    for format, directory in exports.items():
        check_manifest(directory)
        config = json.loads((directory / "config.json").read_text())
        quantization = config.pop("quantization_config", None)
        assert (quantization is None) == (format != "fp8")
        if format == "fp8":
            assert quantization["quant_method"] == "compressed-tensors"
            assert quantization["ignore"] == ["lm_head"]
        else:
            assert config["dtype"] == format
        changed = {k for k in config if config[k] != source.get(k)}
        assert changed <= {"dtype"}
        assert (directory / "generation_config.json").is_file()
        assert format in (directory / "README.md").read_text()


@pytest.mark.parametrize("codec", codec_names())
def test_every_codec(tiny_llama: Path, tmp_path: Path, codec: str) -> None:
    """Its checkpoint is sound, and exports what it decodes to."""
    sizes = (1, 2) if codec in CUT_ANYWHERE else (1,)
    checkpoint = Checkpoint(make_spense(tiny_llama, tmp_path / "spense", codec=codec, tp_sizes=sizes))
    check_checkpoint(checkpoint)
    assert checkpoint.require_spense().version == (1 if codec in ("fp8", "bf16") else 2)
    state = load_file(export(checkpoint.directory, tmp_path / "out", format="float32") / "model.safetensors")
    for module in checkpoint.require_spense().modules:
        assert torch.equal(state[f"{module}.weight"], checkpoint.module_weight(module)), module
    other: ExportFormat
    for other in ("fp8", "int8"):
        if codec != other:
            with pytest.raises(ValueError, match=f"holds {codec} weights: export it as bfloat16"):
                export(checkpoint.directory, tmp_path / other, format=other)


def test_int8_keeps_every_bit(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_spense(tiny_llama, tmp_path / "spense", codec="int8"))
    out = export(checkpoint.directory, tmp_path / "int8", format="int8")
    check_manifest(out)
    state = load_file(out / "model.safetensors")
    for module in checkpoint.require_spense().modules:
        weight, scale = checkpoint.linear(module).values(checkpoint.module_tensors(module))
        assert scale is not None
        assert state[f"{module}.weight"].dtype == torch.int8
        assert torch.equal(state[f"{module}.weight"], weight)
        assert torch.equal(state[f"{module}.weight_scale"], scale[:, None])
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "int-quantized")
    assert quantization["ignore"] == ["lm_head"]
    (group,) = quantization["config_groups"].values()
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    assert group["weights"] == common | {"strategy": "channel", "dynamic": False}
    assert group["input_activations"] == common | {"strategy": "token", "dynamic": True}


def test_no_block_of_a_dense_layer_has_the_scales_of_two(tiny_llama: Path, tmp_path: Path) -> None:
    """4 bits: 112 columns of the 2:4 region end in the middle of a block of 64; nothing is left behind."""
    spense = make_spense(tiny_llama, tmp_path / "spense", codec="nf4", tp_sizes=(1,))
    with pytest.raises(ValueError, match="down_proj: 112 columns of the 2:4 region are no multiple of 64"):
        export(spense, tmp_path / "out", format="spense-dense")
    assert [path.name for path in tmp_path.iterdir()] == ["spense"]


@pytest.mark.parametrize("codec", CUT_ANYWHERE)
def test_spense_dense_is_a_valid_checkpoint_with_the_same_bits(
    tiny_llama: Path, tmp_path: Path, codec: str
) -> None:
    source = Checkpoint(make_spense(tiny_llama, tmp_path / "spense", codec=codec))
    twin = Checkpoint(export(source.directory, tmp_path / "out", format="spense-dense"))
    check_checkpoint(twin)
    check_manifest(twin.directory)
    assert twin.require_spense().modules.keys() == source.require_spense().modules.keys()
    for module, spec in twin.require_spense().modules.items():
        assert spec.sparse == 0
        parts = [(c.linear(module).values(c.module_tensors(module))) for c in (twin, source)]
        for ours, theirs in zip(*parts, strict=True):
            assert ours is theirs is None or torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        assert torch.equal(twin.load(f"{module}.bias"), source.load(f"{module}.bias"))


def forward(state: dict[str, torch.Tensor], config: dict, ids: list[int]) -> torch.Tensor:
    """Llama's logits from plain tensors, written out."""
    eps, heads, kv = config["rms_norm_eps"], HEADS, KV_HEADS
    theta = config["rope_parameters"]["rope_theta"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * state[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        half = HEAD_DIM // 2
        angle = torch.arange(len(ids))[:, None] * theta ** (-torch.arange(half) / half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = state["model.embed_tokens.weight"][ids]
    causal = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q = rotate(linear(h, f"{layer}.self_attn.q_proj").view(len(ids), heads, HEAD_DIM))
        k = rotate(linear(h, f"{layer}.self_attn.k_proj").view(len(ids), kv, HEAD_DIM))
        v = linear(h, f"{layer}.self_attn.v_proj").view(len(ids), kv, HEAD_DIM)
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5 + causal
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(ids), -1)
        x = x + linear(mixed, f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = linear(h, f"{layer}.mlp.gate_proj"), linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(torch.nn.functional.silu(gate) * up, f"{layer}.mlp.down_proj")
    return norm(x, "model.norm") @ state["lm_head.weight"].T


def test_transformers_runs_the_float32_export(tiny_spense: Path, exports: dict[str, Path]) -> None:
    """Its logits equal those computed from the compressed tensors, not those of the unpruned model."""
    from transformers import AutoModelForCausalLM

    ids = [1, 17, 300, 4, 511, 42, 7, 99]
    model = AutoModelForCausalLM.from_pretrained(exports["float32"], dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    checkpoint = Checkpoint(tiny_spense)
    state = {name: checkpoint.load(name).float() for name in checkpoint.plain_tensors()}
    for module, spec in checkpoint.require_spense().modules.items():
        tensors = checkpoint.module_tensors(module)
        state[f"{module}.weight"] = by_definition(tensors, spec.split, spec.out_features, spec.in_features)
        state[f"{module}.bias"] = tensors["bias"].float()
    expected = forward(state, checkpoint.config, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    original = load_file(tiny_spense.parent / "llama" / "model.safetensors")
    unpruned = forward({n: t.float() for n, t in original.items()}, checkpoint.config, ids)
    assert (unpruned - expected).abs().max() > 0.5


def test_bfloat16_checkpoint(tiny_spense_bf16: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_spense_bf16)
    state = load_file(export(tiny_spense_bf16, tmp_path / "out") / "model.safetensors")
    for module in checkpoint.require_spense().modules:
        weight, scale = checkpoint.linear(module).values(checkpoint.module_tensors(module))
        assert scale is None
        assert torch.equal(state[f"{module}.weight"], weight)
    with pytest.raises(ValueError, match="holds bf16 weights: export it as bfloat16"):
        export(tiny_spense_bf16, tmp_path / "fp8", format="fp8")


def test_progress_overwrite_and_refusals(tiny_spense: Path, tiny_llama: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    export(tiny_spense, tmp_path / "out", progress=seen.append)
    assert seen == list(Checkpoint(tiny_spense).require_spense().modules)
    with pytest.raises(FileExistsError, match="not empty"):
        export(tiny_spense, tmp_path / "out")
    export(tiny_spense, tmp_path / "out", format="float32", overwrite=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="no quantization_config"):
        export(tiny_llama, tmp_path / "dense")


def test_a_damaged_source_leaves_no_export(tiny_spense: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tmp_path / "source"
    shutil.copytree(tiny_spense, source)
    state = load_file(source / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight_scale"][3] = float("nan")
    save_file(state, source / "model.safetensors")
    write_manifest(source)
    with pytest.raises(CheckpointError, match=r"down_proj, tensor weight_scale: .* at flat index 3"):
        export(source, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"source"}
