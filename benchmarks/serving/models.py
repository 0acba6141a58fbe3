"""Configurations of the models that the serving benchmarks run with random weights, Spense and dense.

A directory with nothing but config.json is enough for vLLM's `--load-format dummy`: the plugin fills Spense
layers with legal metadata and random values on the device, so no weight file of a 32B model is ever written.

A variant is a name: one of the dense ones below, or a dense ratio for Spense in FP8 (``0.5``), with a codec
behind it for another one (``0.5-int8``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.kernels.shapes import MODELS as SHAPES
from benchmarks.kernels.shapes import Model as Shape
from vllm_spense.format import Layout, ModuleSpec
from vllm_spense.format.codecs import FP8, Codec, codec
from vllm_spense.format.linear import Codecs
from vllm_spense.format.online import online_layout
from vllm_spense.format.schema import AnyCheckpointConfig, checkpoint_config
from vllm_spense.models.export import w8a8_config
from vllm_spense.models.presets import PRESETS
from vllm_spense.ops import LinearSpec

DENSE = "dense"
"""The variant that Spense is compared with: dense FP8 in vLLM's own kernels."""
BF16, INT8, FP8_BLOCKS = "bf16", "dense-int8", "dense-fp8-blocks"
"""Other dense ones: bf16; INT8 with a scale per channel, per token for activations; FP8 weights with a scale
per 128 x 128, which vLLM has kernels for on CPUs with AMX."""
BITS = {BF16: 16, DENSE: 8, INT8: 8, FP8_BLOCKS: 8}


@dataclass(frozen=True)
class ServedModel:
    """A decoder-only model: shapes of its linear layers and what else config.json needs."""

    shape: Shape
    layers: int
    vocab: int
    architecture: str = "LlamaForCausalLM"
    model_type: str = "llama"
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.shape.name

    def modules(self, ratio: float) -> dict[str, Layout]:
        """Layout of every linear layer by module name; attention is dense, ``ratio`` of each MLP."""
        s = self.shape
        queries, keys = s.heads * s.head_size, s.kv_heads * s.head_size
        attention = {
            "q_proj": Layout("output", queries, s.hidden, 0),
            "k_proj": Layout("output", keys, s.hidden, 0),
            "v_proj": Layout("output", keys, s.hidden, 0),
            "o_proj": Layout("output", s.hidden, queries, 0),
        }
        mlp = {
            "gate_proj": online_layout("output", s.intermediate, s.hidden, ratio),
            "up_proj": online_layout("output", s.intermediate, s.hidden, ratio),
            "down_proj": online_layout("input", s.hidden, s.intermediate, ratio),
        }
        return {
            f"model.layers.{i}.{owner}.{name}": layout
            for i in range(self.layers)
            for owner, layouts in (("self_attn", attention), ("mlp", mlp))
            for name, layout in layouts.items()
        }

    def config(self, variant: str) -> dict[str, Any]:
        """config.json of a variant."""
        s = self.shape
        quantization = dense_quantization(variant) if variant in BITS else self._spense(variant)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": s.hidden,
            "intermediate_size": s.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv_heads,
            "head_dim": s.head_size,
            "hidden_act": "silu",
            "vocab_size": self.vocab,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
            **({"quantization_config": quantization} if quantization else {}),
        } | self.more

    def _spense(self, variant: str) -> dict[str, Any]:
        codec, ratio = spense(variant)
        return self.quantization(ratio, codec).model_dump()

    def quantization(self, ratio: float, codec: Codec = FP8) -> AnyCheckpointConfig:
        biased = {f"{x}_proj" for x in "qkv"} if self.more.get("attention_bias") else set()
        return checkpoint_config(
            codec,
            tensor_parallel_sizes=[1],
            ignore=["lm_head"],
            modules={
                name: ModuleSpec.of(layout, name.rpartition(".")[2] in biased)
                for name, layout in self.modules(ratio).items()
            },
            provenance={},
        )

    def linear_bytes(self, variant: str) -> int:
        """Bytes of all linear layers as stored, scales left out."""
        if variant in BITS:
            values = sum(layout.out_features * layout.in_features for layout in self.modules(1.0).values())
            return values * BITS[variant] // 8
        codec, ratio = spense(variant)
        codecs, layouts = Codecs(codec, codec), self.modules(ratio).values()
        return sum(LinearSpec.of([layout], codecs).weight_bytes for layout in layouts)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of keys and values in bf16."""
        return 4 * self.layers * self.shape.kv_heads * self.shape.head_size * tokens

    def cut(self, layers: int) -> ServedModel:
        """The same with its first ``layers`` alone, under a name that says so."""
        if not 1 <= layers <= self.layers:
            raise ValueError(f"{self.name} has {self.layers} layers, not {layers}")
        if layers == self.layers:
            return self
        return replace(self, layers=layers, shape=replace(self.shape, name=f"{self.name}-{layers}-layers"))

    def write(self, out: Path, variant: str) -> Path:
        """A directory that vLLM can start on with dummy weights; returns ``out``."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(self.config(variant)))
        return out


def spense(variant: str) -> tuple[Codec, float]:
    """Codec and dense ratio of a Spense variant; ``ValueError`` if it is none, or the codec is unknown."""
    ratio, _, name = variant.partition("-")
    return codec(name or FP8.name), float(ratio)


def dense_quantization(variant: str) -> dict[str, Any] | None:
    """``quantization_config`` of a dense variant, None for bf16."""
    if variant == BF16:
        return None
    if variant == FP8_BLOCKS:
        method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        return method | {"modules_to_not_convert": ["lm_head"]}
    return w8a8_config(codec("int8") if variant == INT8 else FP8, ["lm_head"])


def served(name: str, *architecture: Any, **more: Any) -> ServedModel:
    """One of the models that ``spense plan`` and the kernel benchmark know."""
    shape, preset = next(s for s in SHAPES if s.name == name), PRESETS[name]
    return ServedModel(shape, preset["num_hidden_layers"], preset["vocab_size"], *architecture, **more)


TINY = Shape("tiny", 256, 512, 4, 2, head_size=64)
SEED = {"rope_theta": 1e7, "attention_bias": True, "attention_out_bias": False}
MODELS = {
    model.name: model
    for model in (
        served("Qwen3-32B", "Qwen3ForCausalLM", "qwen3", {"rope_theta": 1e6}),
        served("Seed-OSS-36B", "SeedOssForCausalLM", "seed_oss", SEED),
        served("Llama-3.1-8B", more={"rope_theta": 5e5}),
        ServedModel(TINY, 2, 49152),
    )
}
"""``tiny`` is for machines without a GPU: the same code, numbers without a meaning (SmolLM2's vocabulary)."""
