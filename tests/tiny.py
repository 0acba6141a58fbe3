"""Tiny real checkpoints for tests: a random Llama, its Spense version and its dense twins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_spense.format import (
    CheckpointWriter,
    Codecs,
    Layout,
    LinearFormat,
    ModuleSpec,
    codecs,
)
from vllm_spense.format.manifest import write_manifest
from vllm_spense.format.online import prune_and_pack
from vllm_spense.format.schema import checkpoint_config
from vllm_spense.models.export import export

HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 144, 208, 4, 2, 32, 2, 512
SPARSE = 112  # of 208: 56 columns per rank at TP 2, still a multiple of 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_llama(
    out: Path,
    *,
    bias: bool = True,
    seed: int = 0,
    hidden: int = HIDDEN,
    inter: int = INTER,
    layers: int = LAYERS,
) -> Path:
    """A random Llama with an untied head and weights large enough that every layer moves the tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 2.5 * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.to(torch.bfloat16).save_pretrained(out)
    return out


def unpacked(tensors: Mapping[str, torch.Tensor], layout: Layout, codec: str = "fp8") -> torch.Tensor:
    """The stored matrix ``[N, K]`` with zeros written out, in the stored dtype (scale not applied)."""
    found, _ = LinearFormat(layout, Codecs.of(codec)).values(tensors)
    return found


def layout_of(module: str, shape: tuple[int, int], sparse: int) -> Layout:
    n, k = shape
    last = module.rpartition(".")[2]
    if last in ("gate_proj", "up_proj"):
        return Layout("output", n, k, sparse)
    if last == "down_proj":
        return Layout("input", n, k, sparse)
    return Layout("output", n, k, 0)


def make_spense(
    source: Path,
    out: Path,
    *,
    sparse: int = SPARSE,
    codec: str = "fp8",
    tp_sizes: tuple[int, ...] = (1, 2),
) -> Path:
    """Magnitude-prune ``source`` into a Spense checkpoint, straight through the format package."""
    state = load_file(source / "model.safetensors")
    modules = {}
    with CheckpointWriter(out) as writer:
        for name, tensor in state.items():
            module, _, kind = name.rpartition(".")
            if module.rpartition(".")[2] not in LINEARS:
                writer.add(name, tensor)
            elif kind == "weight":
                layout = layout_of(module, tuple(tensor.shape), sparse)
                bias = state.get(f"{module}.bias")
                packed = prune_and_pack(tensor, layout, codec)
                if bias is not None:
                    packed["bias"] = bias
                for short, value in packed.items():
                    writer.add(f"{module}.{short}", value)
                modules[module] = ModuleSpec.of(layout, bias is not None)
        quantization = checkpoint_config(
            codecs.codec(codec),
            tensor_parallel_sizes=list(tp_sizes),
            ignore=["lm_head"],
            modules=modules,
            provenance={},
        )
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = quantization.model_dump()
        writer.write_config(config)
        writer.copy_side_files(source)
    return out


def dense_twin(spense: Path, out: Path, tp: int) -> Path:
    """`spense export --format spense-dense`, with MLPs reordered so that plain slices are a rank's own.

    At tensor-parallel size ``tp`` a rank of the Spense checkpoint holds S_r, then D_r; the twin's
    intermediate dimension is reordered to S0 D0 S1 D1 …, which leaves every MLP's function unchanged.
    """
    export(spense, out, format="spense-dense")
    state = load_file(out / "model.safetensors")
    for module, raw in json.loads((spense / "config.json").read_text())["quantization_config"][
        "modules"
    ].items():
        layout = ModuleSpec(**raw).layout()
        if not layout.sparse:
            continue
        s, d = torch.arange(layout.sparse), torch.arange(layout.sparse, layout.extent)
        order = torch.cat([part for pair in zip(s.chunk(tp), d.chunk(tp), strict=True) for part in pair])
        bits = state[f"{module}.dense_weight"].view(torch.uint8)
        bits = bits[order] if layout.split == "output" else bits[:, order]
        state[f"{module}.dense_weight"] = bits.contiguous().view(torch.float8_e4m3fn)
        for name in ("weight_scale", "bias"):
            if layout.split == "output" and f"{module}.{name}" in state:
                state[f"{module}.{name}"] = state[f"{module}.{name}"][order].contiguous()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    write_manifest(out)
    return out
