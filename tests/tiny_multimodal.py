"""A tiny random PaliGemma, whose language model vLLM finds below a prefix, as a Spense checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB

OLD, NEW = "language_model.model.", "model.language_model."
"""How transformers named the language model's tensors on disk before 4.52, and names them since."""


def make_paligemma(out: Path, *, prefix: str = OLD) -> Path:
    """A random bf16 model with tied embeddings, the names below ``prefix``."""
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = GemmaConfig(
        hidden_size=128,
        intermediate_size=208,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        **tokens,
    )
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=text.hidden_size,
        vision_use_head=False,
    )
    config = PaliGemmaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=VOCAB - 1,
        projection_dim=text.hidden_size,
        hidden_size=text.hidden_size,
        **tokens,
    )
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 2.5 * parameter.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(out)
    if prefix != OLD:
        state = load_file(out / "model.safetensors")
        named = {renamed(name): tensor for name, tensor in state.items()}
        save_file(named, out / "model.safetensors", metadata={"format": "pt"})
    return out


def renamed(name: str) -> str:
    """An old name as it is written now."""
    return NEW + name.removeprefix(OLD) if name.startswith(OLD) else f"model.{name}"
