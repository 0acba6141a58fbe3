"""A tiny Gemma 4 text model: inputs per layer, keys and values shared between layers, two forms of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import VOCAB
from tests.tiny_text import add_tokenizer

GEMMA4: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,  # the last layer reads what the second one wrote
    "sliding_window": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def gemma4(**changes: Any) -> torch.nn.Module:
    """A random fp32 model with weights large enough that every layer and every input moves the tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma4_text", **(GEMMA4 | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_gemma4(out: Path, **changes: Any) -> Path:
    """The same in bf16, saved with a tokenizer."""
    gemma4(**changes).to(torch.bfloat16).save_pretrained(out)
    return add_tokenizer(out)
