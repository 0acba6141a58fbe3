"""Config classes of published models that transformers knows only by code in their repositories.

None of that code is run: fields that the parent lacks are kept as they are, and read by
:mod:`vllm_spense.ops.mlp.published`.
"""

from __future__ import annotations

from transformers import AutoConfig, LlamaConfig, MistralConfig


class SparseReluLlamaConfig(LlamaConfig):
    """SparseLM (SakanaAI/SparseLM0.5B to 2B)."""

    model_type = "llama_sparse_relu"


class SparseLlamaConfig(LlamaConfig):
    """ProSparse (SparseLLM/prosparse-llama-2-7b and -13b)."""

    model_type = "sparsellama"


class BambooConfig(MistralConfig):
    """Bamboo and TurboSparse-Mistral (PowerInfer)."""

    model_type = "bamboo"


CONFIGS = (SparseReluLlamaConfig, SparseLlamaConfig, BambooConfig)


def register_configs() -> None:
    """Make ``AutoConfig`` know them; a class that somebody has registered already stays."""
    for ours in CONFIGS:
        try:
            AutoConfig.register(ours.model_type, ours)
        except ValueError:  # transformers, or another plugin, has one
            continue
