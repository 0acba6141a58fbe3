"""The table in docs/models.md, from what is tested.

usage: python -m tools.model_table   (writes the table into the document)

``test_vllm_families.py`` and ``test_vllm_wrappers.py`` serve the models, ``test_families.py`` and
``test_wrappers.py`` prune them.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common.markdown import fill, table
from benchmarks.common.results import ROOT

DOCUMENT = ROOT / "docs" / "models.md"


@dataclass(frozen=True)
class Family:
    """A line of the table."""

    title: str
    mlp: str = "GLU"
    note: str = ""


FAMILIES = {
    "llama": Family("Llama", note="SmolLM, too; trained SmolLM2 in the tests"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2, Qwen2.5"),
    "qwen3": Family("Qwen3"),
    "seed_oss": Family("Seed-OSS"),
    "cwm": Family("CWM"),
    "ministral": Family("Ministral"),
    "ministral3": Family("Ministral 3"),
    "granite": Family("Granite"),
    "granite_swa": Family("Granite, sliding window"),
    "hyperclovax": Family("HyperCLOVA X"),
    "smollm3": Family("SmolLM3"),
    "olmo": Family("OLMo", note="norms without weights"),
    "olmo2": Family("OLMo 2", note="norms behind attention and MLP"),
    "olmo3": Family("OLMo 3", note="norms behind attention and MLP"),
    "exaone4": Family("EXAONE 4", note="norms behind attention and MLP"),
    "cohere": Family("Cohere, Command R", note="attention and MLP side by side"),
    "cohere2": Family("Cohere 2, Command R7B", note="attention and MLP side by side"),
    "stablelm": Family("StableLM", note="without parallel residual, which vLLM does not have"),
    "helium": Family("Helium"),
    "ernie4_5": Family("ERNIE 4.5 (dense)", note="without biases, which vLLM does not have"),
    "hunyuan_v1_dense": Family("Hunyuan (dense)"),
    "nanochat": Family("nanochat", "plain"),
    "arcee": Family("Arcee (AFM)", "plain"),
    "jais2": Family("Jais 2", "plain"),
    "gemma": Family("Gemma", "GLU, GELU"),
    "vaultgemma": Family("VaultGemma", "GLU, GELU"),
    "gemma2": Family("Gemma 2", "GLU, GELU"),
    "gemma3_text": Family("Gemma 3 (text)", "GLU, GELU"),
    "gemma4_text": Family(
        "Gemma 4 (text): E2B, E4B", "GLU, GELU", "what mixes the inputs per layer stays in bf16"
    ),
    "gemma4_moe": Family(
        "Gemma 4 (text): 31B, 26B-A4B", "GLU, GELU", "keys that are values; routed experts stay dense"
    ),
    "qwen3_5_text": Family(
        "Qwen3.5, Qwen3.6 (text, dense)",
        note="linear attention in FP8, its small gates in bf16; vLLM needs torchvision",
    ),
    "falcon_h1": Family("Falcon-H1", note="attention and state space stay in bf16"),
    "apertus": Family("Apertus", "plain", "xIELU"),
    "glm4": Family("GLM-4-0414", "GLU, fused on disk", "split when pruned, fused again by `spense export`"),
    "phi3": Family("Phi-3", "GLU, fused on disk", "split when pruned, fused again by `spense export`"),
    "phi": Family("Phi", "plain", "fc1 is split by outputs, fc2 by inputs"),
    "starcoder2": Family("Starcoder2", "plain"),
    "nemotron": Family("Nemotron", "plain"),
    "opt": Family("OPT", "plain"),
    "qwen2_moe": Family("Qwen2-MoE", note="shared experts and ordinary MLPs; routed experts stay dense"),
    "qwen3_moe": Family("Qwen3-MoE", note="ordinary MLPs; routed experts stay dense"),
}
"""By the name that transformers and ``tiny_families.py`` give them."""

WRAPPERS = {
    "paligemma": Family("PaliGemma (multimodal)", "GLU, GELU"),
    "gemma3": Family("Gemma 3 from 4B (multimodal)", "GLU, GELU"),
    "mistral3": Family("Mistral 3, Mistral Small 3.1 (multimodal)"),
    "qwen2_5_vl": Family("Qwen2.5-VL (multimodal)"),
    "qwen3_vl": Family("Qwen3-VL (multimodal, dense)"),
    "qwen3_5": Family("Qwen3.5, Qwen3.6 (multimodal, dense)"),
    "gemma4": Family("Gemma 4 (multimodal)", "GLU, GELU"),
}
"""By ``model_type``; ``test_vllm_wrappers.py`` asks each for text and with an image in the prompt."""

POOLING = {
    "embedding": Family("Embedding models (Qwen3)", note="with and without the prefix `model.` in the files"),
    "base": Family("Architectures without a head (Qwen3)", note="`--preset spensegpt+`"),
    "classifier": Family("Sequence classifiers (Qwen3)", note="`--preset spensegpt+`"),
    "reranker": Family("Rerankers (Qwen3)", note="a causal model, served as a classifier"),
}
"""Models that are served with `--runner pooling`."""


def models() -> str:
    """Markdown."""
    lines = []
    for kind, family in (FAMILIES | WRAPPERS | POOLING).items():
        note = "text backbone; served with images" if kind in WRAPPERS else family.note
        lines.append([family.title, family.mlp, "✓", "✓", note])
    return table(["family", "MLP", "`spense prune`", "vLLM", "notes"], lines)


def main() -> None:
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), "models", models()))


if __name__ == "__main__":
    main()
