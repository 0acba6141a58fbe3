"""README's table of models: those that ``test_vllm_families.py`` serves and ``test_families.py`` prunes.

usage: python tests/serving/model_table.py   (writes the table into README)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
TABLE = ("<!-- models:begin -->", "<!-- models:end -->")


@dataclass(frozen=True)
class Family:
    """A line of the table. ``pruned``: by ``spense prune``; all are served."""

    title: str
    mlp: str = "GLU"
    note: str = ""
    pruned: bool = True


FAMILIES = {
    "llama": Family("Llama", note="SmolLM, too; trained SmolLM2 in the tests"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2, Qwen2.5"),
    "qwen3": Family("Qwen3"),
    "seed_oss": Family("Seed-OSS"),
    "gemma2": Family("Gemma 2", "GLU, GELU"),
    "gemma3_text": Family("Gemma 3 (text)", "GLU, GELU"),
    "phi3": Family("Phi-3", "GLU, fused on disk", "split when pruned, fused again by `spense export`"),
    "phi": Family("Phi", "plain", "fc1 is split by outputs, fc2 by inputs"),
    "starcoder2": Family("Starcoder2", "plain"),
    "nemotron": Family("Nemotron", "plain"),
    "opt": Family("OPT", "plain"),
    "qwen2_moe": Family("Qwen2-MoE", note="shared experts and ordinary MLPs; routed experts stay dense"),
    "qwen3_moe": Family("Qwen3-MoE", note="ordinary MLPs; routed experts stay dense"),
    "paligemma": Family("PaliGemma (multimodal)", "GLU, GELU", "text backbone; asked for text only", False),
}
"""By the name that transformers and ``tiny_families.py`` give them."""


def table() -> str:
    """Markdown."""
    lines = ["| family | MLP | `spense prune` | vLLM | notes |", "|---|---|---|---|---|"]
    for family in FAMILIES.values():
        pruned = "✓" if family.pruned else "–"
        lines.append(f"| {family.title} | {family.mlp} | {pruned} | ✓ | {family.note} |")
    return "\n".join(lines)


def main() -> None:
    before, after = TABLE
    text = README.read_text()
    if before not in text or after not in text:
        sys.exit(f"{README} lacks {before} and {after}")
    head, tail = text.split(before)[0], text.split(after)[1]
    README.write_text(f"{head}{before}\n{table()}\n{after}{tail}")


if __name__ == "__main__":
    main()
