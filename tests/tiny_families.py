"""One tiny random checkpoint of each supported model family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import VOCAB
from tests.tiny_text import add_tokenizer

INTER, SHARED, EXPERTS = 208, 176, 4
_COMMON: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": INTER,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA4: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "global_head_dim": 32,
}
_MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [0]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "seed_oss": {"attention_bias": True, "attention_out_bias": False},
    "granite": {
        "attention_bias": True,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "olmo": {"head_dim": None, "clip_qkv": 4.0},
    "olmo2": {"head_dim": None},
    "olmo3": {"head_dim": None, "sliding_window": 16, "layer_types": HYBRID},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "exaone4": {"sliding_window": 16, "layer_types": HYBRID},
    "cohere": {"tie_word_embeddings": True, "head_dim": None, "use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {
        "tie_word_embeddings": True,  # vLLM takes no other head
        "sliding_window": 16,
        "layer_types": HYBRID,
        "logit_scale": 0.5,
    },
    "stablelm": {"head_dim": None, "use_qkv_bias": True},
    "ministral": {"sliding_window": 16, "layer_types": HYBRID},
    "ministral3": {},
    "helium": {},
    "ernie4_5": {},
    "arcee": {"hidden_act": "relu2", "mlp_bias": True},
    "granite_swa": {"sliding_window": 16},
    "hunyuan_v1_dense": {},
    "hyperclovax": {},
    "jais2": {},
    "cwm": {"sliding_window": 16},
    "vaultgemma": {"sliding_window": 16},
    "nanochat": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 24},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 24},
    "gemma4_text": {
        **GEMMA4,
        "num_kv_shared_layers": 1,  # the last layer reads what the second one wrote
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
    },
    "gemma4_moe": {
        **GEMMA4,
        "model_type": "gemma4_text",
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "qwen3_5_text": {
        "tie_word_embeddings": True,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 128,  # what vLLM has on CPUs
        "linear_value_head_dim": 128,
    },
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "mlp_multipliers": [0.7, 2.0],
        "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9],
        "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 0.8,
        "ssm_out_multiplier": 0.7,
        "embedding_multiplier": 0.5,
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.9,
    },
    "glm4": {},
    "apertus": {},
    "phi3": {"sliding_window": 16},
    "phi": {"head_dim": None, "partial_rotary_factor": 0.5, "qk_layernorm": True},
    "starcoder2": {"head_dim": None, "use_bias": True, "sliding_window": 16},
    "nemotron": {"hidden_act": "relu2", "mlp_bias": True},
    "opt": {"head_dim": None, "num_key_value_heads": None, "ffn_dim": INTER, "word_embed_proj_dim": 64},
    "qwen2_moe": {"head_dim": None, "shared_expert_intermediate_size": SHARED, **_MOE},
    "qwen3_moe": _MOE,
}
MODULES = {
    "phi": ("mlp.fc1", "mlp.fc2"),
    "starcoder2": ("mlp.c_fc", "mlp.c_proj"),
    "nemotron": ("mlp.up_proj", "mlp.down_proj"),
    "opt": ("fc1", "fc2"),
    "arcee": ("mlp.up_proj", "mlp.down_proj"),
    "apertus": ("mlp.up_proj", "mlp.down_proj"),
    "falcon_h1": ("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
    "jais2": ("mlp.up_proj", "mlp.down_proj"),
    "nanochat": ("mlp.fc1", "mlp.fc2"),
}
"""Inner linears, then down, below a layer; all others are :data:`GLU`."""

GLU = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def pruned_modules(kind: str) -> list[list[str]]:
    """Names of each MLP that must be pruned: inner linears, then down."""
    layers = "model.decoder.layers" if kind == "opt" else "model.layers"
    found = []
    for i in range(_COMMON["num_hidden_layers"]):
        names = [f"{layers}.{i}.{short}" for short in MODULES.get(kind, GLU)]
        if i > 0 and kind == "qwen2_moe":
            names = [name.replace("mlp.", "mlp.shared_expert.") for name in names]
        if i == 0 or kind != "qwen3_moe":
            found.append(names)
    return found


def make_family(kind: str, out: Path, **changes: Any) -> Path:
    """A random bf16 model of ``kind`` with weights large enough that every layer moves the tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {k: v for k, v in (_COMMON | FAMILIES[kind] | changes).items() if v is not None}
    model_type = options.pop("model_type", kind)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(out)
    return byte_tokenizer(out) if kind == "qwen2" else add_tokenizer(out)


def byte_tokenizer(out: Path) -> Path:
    """One token per byte, in the class that transformers insists on for Qwen2."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}
    Qwen2Tokenizer(vocab=vocab, merges=[]).save_pretrained(out)
    return out
