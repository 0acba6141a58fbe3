"""What a pruned SmolLM2 costs: stored bytes of its linear layers, and a predicted decode time.

Bytes are counted in the FP8 Spense format, whatever the measured checkpoint stores. The decode time is
:func:`vllm_spense.ops.kernel_config.estimate` on an H200: bytes, operations and how tiles fall on the
multiprocessors, from data sheets, **not measured**. SmolLM2's own layers are so small that the launch of a
kernel would be most of it, so each layer is enlarged to its shape in Qwen3-32B first, with the same share of
2:4 rows or columns. Neither figure knows norms, embeddings, the head and attention between its projections.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vllm_spense.devices import H200
from vllm_spense.format import Checkpoint, Layout
from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.models.families import fused_with
from vllm_spense.models.presets import PRESETS
from vllm_spense.ops.kernel_config import candidates, estimate
from vllm_spense.ops.spec import LinearSpec

TOKENS = 8  # one decode step of a small batch: the narrowest tile
ALIGNMENT = 64
MODEL = PRESETS["Qwen3-32B"]
HIDDEN, INTERMEDIATE = MODEL["hidden_size"], MODEL["intermediate_size"]
QUERIES, KEYS = (MODEL[f"num_{kind}_heads"] * MODEL["head_dim"] for kind in ("attention", "key_value"))
SHAPES = {
    "q_proj": (QUERIES, HIDDEN),
    "k_proj": (KEYS, HIDDEN),
    "v_proj": (KEYS, HIDDEN),
    "o_proj": (HIDDEN, QUERIES),
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
FUSED = tuple(dict.fromkeys(fused_with(name) for name in SHAPES))


@dataclass(frozen=True)
class Cost:
    """``mlp_sparsity``: share of zeros in the MLP weights; ``weight_bytes`` of all linear layers, scales
    included; ``decode_seconds`` of all of them, for 8 tokens."""

    mlp_sparsity: float
    weight_bytes: int
    decode_seconds: float


def cost(directory: Path) -> Cost:
    """Of a dense or Spense checkpoint of a Llama-like model; reads headers only."""
    layouts = linear_layouts(directory)
    mlp = [layout for name, layout in layouts.items() if ".mlp." in name]
    zeros = sum(layout.sparse_shape[0] * layout.sparse_shape[1] / 2 for layout in mlp)
    weights = sum(layout.out_features * layout.in_features for layout in mlp)
    stored = sum(LinearSpec.of([x], UNIFORM_FP8).weight_bytes + 4 * x.out_features for x in layouts.values())
    return Cost(zeros / weights, stored, decode_seconds(layouts))


def linear_layouts(directory: Path) -> dict[str, Layout]:
    """Layout of every linear layer, by module; those that the checkpoint stores plainly are dense."""
    checkpoint = Checkpoint(directory)
    packed = {} if checkpoint.quantization is None else checkpoint.require_spense().modules
    layouts = {name: spec.layout() for name, spec in packed.items()}
    for name, info in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.rpartition(".")[2] in SHAPES and module not in layouts:
            rows, columns = info.shape
            layouts[module] = Layout("output", rows, columns, 0)
    return layouts


def decode_seconds(layouts: dict[str, Layout]) -> float:
    """Predicted seconds of all linear layers, enlarged, in one decode step."""
    owners: dict[str, dict[str, Layout]] = defaultdict(dict)  # "model.layers.3": {"q_proj": …, …}
    for name, layout in layouts.items():
        owner, _, short = name.rsplit(".", 2)
        owners[owner][short] = enlarged(short, layout)
    return sum(
        _seconds(LinearSpec.of([linears[short] for short in group], UNIFORM_FP8))
        for linears in owners.values()
        for group in FUSED
    )


def enlarged(short: str, layout: Layout) -> Layout:
    """The layer of this name in Qwen3-32B, with the same share of 2:4 rows or columns."""
    out_features, in_features = SHAPES[short]
    extent = out_features if layout.split == "output" else in_features
    sparse = round(layout.sparse / layout.extent * extent / ALIGNMENT) * ALIGNMENT
    return Layout(layout.split, out_features, in_features, sparse)


@lru_cache
def _seconds(spec: LinearSpec) -> float:
    configs = candidates(spec, TOKENS, H200.capability, cutlass=False)
    return min(estimate(spec, TOKENS, config, H200.processors) for config in configs)
