"""A random Llama-like Spense checkpoint of a wanted size, for measurements where weights do not matter."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.kernels.shapes import Model as Shape
from benchmarks.serving.models import ServedModel
from vllm_spense.format import CheckpointWriter
from vllm_spense.ops.random_weights import fill_random

SHAPE = Shape("random", 2048, 8192, 16, 4, 128)
VOCAB = 32000
SHARD_BYTES = 1 << 28
"""`spense prune` writes one file per layer, about as large as this."""


def write_random(out: Path, gigabytes: float, ratio: float = 0.5) -> Path:
    """Decoder layers with ``gigabytes`` (10⁹ bytes) of linear weights in dense FP8; returns ``out``."""
    layers = max(1, round(gigabytes * 1e9 / ServedModel(SHAPE, 1, VOCAB).linear_bytes("dense")))
    model = ServedModel(SHAPE, layers, VOCAB)
    plain = {"model.embed_tokens": (VOCAB, SHAPE.hidden), "lm_head": (VOCAB, SHAPE.hidden)}
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(layers) for n in ("input", "post_attention")]
    with CheckpointWriter(out, max_shard_bytes=SHARD_BYTES) as writer:
        quantization = model.quantization(ratio)
        for seed, module in enumerate(quantization.modules):
            held = quantization.linear(module).held().items()
            tensors = {name: torch.empty(stored.shape, dtype=stored.dtypes[0]) for name, stored in held}
            fill_random(tensors, None, seed)
            for name, tensor in tensors.items():
                writer.add(f"{module}.{name}", tensor)
        for name, shape in plain.items():
            writer.add(f"{name}.weight", torch.randn(shape, dtype=torch.bfloat16))
        for name in [*norms, "model.norm"]:
            writer.add(f"{name}.weight", torch.ones(SHAPE.hidden, dtype=torch.bfloat16))
        writer.write_config(model.config(str(ratio)))
    return out
