"""The layers that the kernel benchmark measures, in which order, and what bounds their speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_spense.devices import H200
from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.format.online import online_layout
from vllm_spense.models.presets import PRESETS
from vllm_spense.ops import LinearSpec, extension
from vllm_spense.ops.linear.configs import KernelConfig, candidates, estimate

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192, 32768)
DECODE = 64
RATIOS = (0.5, 0.25, 0.0)

ASKED = (KernelConfig("sm90", 128, 256, 2, True), KernelConfig("sm90", 128, 128, 2, True))
"""Timed in every row of prefill."""


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int

    def layers(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Split, rows of each fused shard and columns of every kind of linear layer."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "gate_up": ("output", (self.intermediate, self.intermediate), self.hidden),
            "down": ("input", (self.hidden,), self.intermediate),
            "qkv": ("output", (q, kv, kv), self.hidden),
            "o": ("output", (self.hidden,), q),
        }


MODELS = tuple(
    Model(
        name,
        shape["hidden_size"],
        shape["intermediate_size"],
        shape["num_attention_heads"],
        shape["num_key_value_heads"],
        shape["head_dim"],
    )
    for name, shape in PRESETS.items()
)
SMOLLM2_135M = Model("SmolLM2-135M", 576, 1536, 9, 3, 64)
LLAMA_1B = Model("Llama-3.2-1B", 2048, 8192, 32, 8, 64)
"""Small enough for CPUs."""
LAYERS = ("gate_up", "down", "qkv", "o")


@dataclass(frozen=True)
class Row:
    """One line of the results: a layer of a model at one dense ratio and number of tokens."""

    model: str
    layer: str
    ratio: float
    tokens: int
    spec: LinearSpec

    @property
    def key(self) -> str:
        return f"{self.model}/{self.layer}/{self.ratio:g}/{self.tokens}"


def layer_spec(model: Model, layer: str, ratio: float) -> LinearSpec:
    """The layer with the last ``ratio`` of each shard's split axis dense."""
    split, shards, columns = model.layers()[layer]
    parts = [online_layout(split, rows, columns, ratio) for rows in shards]  # type: ignore[arg-type]
    return LinearSpec(
        *(split, sum(shards), columns),
        *(tuple(p.sparse for p in parts), tuple(p.dense for p in parts), UNIFORM_FP8),
    )


def rows() -> list[Row]:
    """Every row, most wanted first: the MLP of Qwen3-32B at decode, then its prefill, then the rest."""
    everything = [
        Row(model.name, layer, ratio, tokens, layer_spec(model, layer, ratio))
        for model in MODELS
        for layer in LAYERS
        for ratio in RATIOS
        for tokens in TOKENS
    ]
    return sorted(everything, key=_priority)


def _priority(row: Row) -> tuple:
    """Sort key. Rows of one layer and ratio stay together: making weights costs more than timing them."""
    first, mlp = row.model == MODELS[0].name, row.layer in ("gate_up", "down")
    pruned, decode, huge = row.ratio > 0, row.tokens <= DECODE, row.tokens > 8192
    if first and mlp and pruned and not huge:
        rank = 0 if decode else 1
    elif mlp and pruned and not huge:
        rank = 2 if row.model == MODELS[1].name else 4
    elif mlp and not huge:
        rank = 3 if first else 5
    else:
        rank = 7 if huge else 6
    order = [m.name for m in MODELS].index(row.model), RATIOS.index(row.ratio), LAYERS.index(row.layer)
    return rank, *order, row.tokens


def core_rows() -> list[Row]:
    """The rows that decide, most wanted first: decode of the MLP of Qwen3-32B, then whether 2:4 speeds up
    prefill at all (gate_up all 2:4, all dense and half), then down and dense ratio 0.25."""

    def some(layers: tuple[str, ...], ratios: tuple[float, ...], tokens: tuple[int, ...]) -> list[Row]:
        model = MODELS[0]
        return [
            Row(model.name, layer, ratio, count, layer_spec(model, layer, ratio))
            for layer in layers
            for ratio in ratios
            for count in tokens
        ]

    mlp, decode, prefill = ("gate_up", "down"), (1, 16, 32, 64), (2048, 8192)
    return [
        *some(mlp, (0.5,), decode),
        *some(("gate_up",), (0.0, 1.0, 0.5), prefill),
        *some(("down",), (0.5,), prefill),
        *some(mlp, (0.25,), decode + prefill),
    ]


def layer_specs(core: bool = False) -> Iterator[LinearSpec]:
    """Every layer once, in the order of :func:`rows`; ``core``: the MLP of the first model, pruned."""
    found = (row for row in rows() if row.tokens == 1)
    if core:
        found = (r for r in core_rows() if r.tokens == 1 and 0 < r.ratio < 1)
    yield from dict.fromkeys(row.spec for row in found)


def configs(
    row: Row,
    capability: tuple[int, int] = H200.capability,
    processors: int = H200.processors,
    cutlass: bool = False,
    all_up_to: int = 128,
    best: int = 3,
) -> list[KernelConfig]:
    """Configurations worth timing: all for few tokens, else those with the lowest estimate, and two that show
    what 2:4 brings where x comes from shared memory."""
    legal = candidates(row.spec, row.tokens, capability, cutlass)
    if row.tokens <= all_up_to:
        return legal
    ordered = sorted(legal, key=lambda c: (estimate(row.spec, row.tokens, c, processors), c))
    # The estimate does not know CUTLASS well.
    others = [c for c in ordered[best:] if c.kernel != "sm90" or (c in ASKED and row.tokens >= 2048)]
    return ordered[:best] + others


@dataclass(frozen=True)
class Work:
    """Bytes that one call must move (inputs and outputs once) and operations it must do (2:4 skips half)."""

    bytes: float
    operations: float

    def bound(self, bandwidth: float, peak: float | None) -> tuple[float, str]:
        """The roofline in µs, and what sets it."""
        memory = self.bytes / bandwidth * 1e6
        compute = self.operations / peak * 1e6 if peak else 0.0
        return max(memory, compute), "memory" if memory >= compute else "compute"


def spense_work(spec: LinearSpec, tokens: int) -> Work:
    (sparse_rows, sparse_columns), (dense_rows, dense_columns) = spec.sparse_shape, spec.dense_shape
    weights = sparse_rows * sparse_columns / 2 + dense_rows * dense_columns
    return Work(spec.weight_bytes + _activation_bytes(spec, tokens), 2 * tokens * weights)


def dense_work(spec: LinearSpec, tokens: int) -> Work:
    weights = spec.out_features * spec.in_features
    return Work(weights + _activation_bytes(spec, tokens), 2 * tokens * weights)


def _activation_bytes(spec: LinearSpec, tokens: int) -> float:
    """FP8 x, bf16 y and both scales."""
    return tokens * (spec.in_features + 2 * spec.out_features + 4) + 4 * spec.out_features


@dataclass(frozen=True)
class Device:
    """What the plan depends on; an H200 where there is no GPU."""

    name: str = H200.device
    capability: tuple[int, int] = H200.capability
    processors: int = H200.processors
    cutlass: bool = False

    @classmethod
    def here(cls) -> Device:
        if not torch.cuda.is_available():
            return cls(cutlass=bool(extension.cutlass_capabilities()))
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        return cls(
            properties.name,
            capability,
            properties.multi_processor_count,
            capability in extension.cutlass_capabilities(),
        )
