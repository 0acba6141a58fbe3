"""Shapes of known models, for looks and measurements without their files."""

from __future__ import annotations

from typing import Any


def _preset(layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


PRESETS = {
    "Qwen3-32B": _preset(64, 5120, 25600, 64, 151936),
    "Seed-OSS-36B": _preset(64, 5120, 27648, 80, 155136),
    "Llama-3.1-8B": _preset(32, 4096, 14336, 32, 128256),
    "Llama-3.1-70B": _preset(80, 8192, 28672, 64, 128256),
}
"""What config.json of these models says of their shapes, by name."""
