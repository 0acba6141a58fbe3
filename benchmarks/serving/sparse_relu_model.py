"""A Llama with ReLU gates of a given shape and a planted density: random weights, on disk.

Channel 0 of the hidden state is a constant: every embedding holds it, and no layer writes to it. Each gate
reads it with one negative weight, all others with random ones, so that a gate's value is a normal one less a
constant: independent of its neighbours and of other tokens, which is the worst case for several tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.kernels.shapes import Model as Shape

CONSTANT = 8.0
"""Channel 0 of the hidden state, where others have a variance of one."""
WRITTEN = 1e-3
"""Scale of what layers add to the hidden state: little, so that it keeps its size."""


def config(shape: Shape, layers: int, vocab: int) -> dict[str, Any]:
    """config.json as SparseLM's: it says SiLU, and its own code forces ReLU (arXiv 2603.23198)."""
    return {
        "architectures": ["SparseLlamaForCausalLM"],
        "model_type": "llama_sparse_relu",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
        "sparsity_gated_mlp": True,
        "sparsity_baseline_run": False,
        "sparsity_l1_coeff": 2e-5,
        "sparsity_new_intermediate_size": shape.intermediate,
        "sparsity_mlp_execution_logic": "training",
    }


def tensors(
    shape: Shape, layers: int, vocab: int, density: float, seed: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """The weights, a file at a time, bf16; ``density``: share of the gates that are open, between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    wide = shape.hidden
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size

    def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).bfloat16()

    embedding = normal(vocab, wide, 1.0)
    embedding[:, 0] = CONSTANT
    norm = torch.ones(wide, dtype=torch.bfloat16)
    yield {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    closing = NormalDist().inv_cdf(1 - density) * math.sqrt((wide - 1) / wide) / CONSTANT
    for layer in range(layers):
        down, out = normal(wide, shape.intermediate, WRITTEN), normal(wide, queries, WRITTEN)
        down[0], out[0] = 0, 0
        gate = normal(shape.intermediate, wide, wide**-0.5)
        gate[:, 0] = -closing
        prefix = f"model.layers.{layer}."
        yield {
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": normal(shape.intermediate, wide, wide**-0.5),
            f"{prefix}mlp.down_proj.weight": down,
            f"{prefix}self_attn.q_proj.weight": normal(queries, wide, wide**-0.5),
            f"{prefix}self_attn.k_proj.weight": normal(keys, wide, wide**-0.5),
            f"{prefix}self_attn.v_proj.weight": normal(keys, wide, wide**-0.5),
            f"{prefix}self_attn.o_proj.weight": out,
            f"{prefix}input_layernorm.weight": norm.clone(),
            f"{prefix}post_attention_layernorm.weight": norm.clone(),
        }


def write(out: Path, shape: Shape, layers: int, vocab: int, density: float) -> Path:
    """A checkpoint directory of one file per layer; returns ``out``."""
    out.mkdir(parents=True)
    where: dict[str, str] = {}
    for number, part in enumerate(tensors(shape, layers, vocab, density)):
        file = f"model-{number:05d}.safetensors"
        save_file(part, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (out / "config.json").write_text(json.dumps(config(shape, layers, vocab)))
    return out
