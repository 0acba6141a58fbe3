"""The shapes that decide a model's speed: from config.json, a Spense checkpoint's layouts, or a preset.

Weights are never opened. Routed experts of MoE models count as dense bf16, as they are served.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from vllm_spense.format.checkpoint import CONFIG_NAME
from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.layout import Axis, Layout
from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.format.online import online_layout
from vllm_spense.format.schema import MAX_FEATURES, AnyCheckpointConfig, parse_config
from vllm_spense.models.families import FAMILIES, ROW_PARALLEL, family_of, fused_with, in_attention
from vllm_spense.models.presets import PRESETS
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.sources import check_source, load_config

Kind = Literal["mlp", "attention"]

_OTHER_ATTENTION = dict.fromkeys(
    ("kv_lora_rank", "ssm_state_size", "mamba_d_state"), "this model's attention keeps no ordinary KV cache"
)
_OTHER_ATTENTION |= dict.fromkeys(
    ("linear_num_value_heads", "conv_L_cache"), "layers of linear attention or convolutions keep no KV cache"
)
_OTHER_ATTENTION |= dict.fromkeys(
    ("global_head_dim", "num_kv_shared_layers"), "this model's layers differ in heads and share KV caches"
)
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MAX_LAYERS = 4096


@dataclass(frozen=True)
class Linear:
    """Modules that vLLM runs as one linear layer, and in how many layers of the model it occurs.

    ``axis`` is what tensor parallelism splits.
    """

    kind: Kind
    parts: tuple[Layout, ...]
    axis: Axis
    count: int


@dataclass(frozen=True)
class RankLinear:
    """A :class:`Linear` as one tensor-parallel rank runs it."""

    kind: Kind
    spec: LinearSpec
    count: int


@dataclass(frozen=True)
class Experts:
    """Routed experts: ``count`` per layer in ``layers`` layers, ``active`` of them per token."""

    layers: int
    count: int
    active: int
    intermediate: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder by its sizes. ``windows``: tokens that attention reads back, per layer; None is all.

    ``dense_ratio``: what the MLPs are split by when a rank loads them (``online_layout``); None where
    ``linears`` have a checkpoint's own layouts.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    windows: tuple[int | None, ...]
    linears: tuple[Linear, ...]
    dense_ratio: float | None
    tensor_parallel_sizes: tuple[int, ...] | None = None
    experts: Experts | None = None
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.windows)

    def rank(self, size: int) -> list[RankLinear]:
        """What one of ``size`` tensor-parallel ranks runs; ``ValueError`` where vLLM cannot split so."""
        allowed = self.tensor_parallel_sizes
        if allowed is not None and size not in allowed:
            raise ValueError(f"the checkpoint allows tensor parallel sizes {list(allowed)}, not {size}")
        if self.heads % size or self.kv_heads % size:
            raise ValueError(
                f"--tp {size} does not divide the {self.heads} query and {self.kv_heads} key/value heads of "
                f"{self.name}"
            )
        found = []
        for linear in self.linears:
            try:
                parts = [part.shard(linear.axis, size) for part in linear.parts]
            except ValueError as error:
                raise ValueError(f"--tp {size} does not fit {self.name}: {error}") from None
            if linear.kind == "mlp" and self.dense_ratio is not None:
                ratio = self.dense_ratio  # as load-time mode does it: each rank splits its own slice
                parts = [online_layout(linear.axis, p.out_features, p.in_features, ratio) for p in parts]
            found.append(RankLinear(linear.kind, LinearSpec.of(parts, UNIFORM_FP8), linear.count))
        return found

    def mlp_dense_ratio(self) -> float:
        """Share of the MLP weights that lie in dense regions."""
        specs = [(x.spec, x.count) for x in self.rank(1) if x.kind == "mlp"]
        weights = sum(s.out_features * s.in_features * count for s, count in specs)
        dense = sum(s.dense_shape[0] * s.dense_shape[1] * count for s, count in specs)
        return dense / weights if weights else 1.0


def read_model(model: str | Path, dense_ratio: float | None = None) -> ModelShape:
    """Shapes of a dense or Spense directory, or of one of :data:`PRESETS`.

    ``dense_ratio`` (default 0.5) is for models that are not pruned yet; a Spense checkpoint has its own
    layouts. Raises :class:`CheckpointError` naming file, key and fix, or ``ValueError``.
    """
    if dense_ratio is not None and not 0 <= dense_ratio <= 1:
        raise ValueError(f"dense_ratio must lie in 0..1, not {dense_ratio}")
    preset = next((name for name in PRESETS if name.lower() == str(model).lower()), None)
    if not Path(model).is_dir() and preset is not None:
        return _shape(preset, PRESETS[preset], f"preset {preset}", dense_ratio)
    if not Path(model).exists():
        raise CheckpointError(
            "no such directory, and no preset",
            file=model,
            fix=f"give a directory with a config.json, or one of {', '.join(PRESETS)}",
        )
    raw = check_source(model)
    return _shape(str(model), _with_defaults(raw, Path(model)), Path(model) / CONFIG_NAME, dense_ratio)


def _with_defaults(raw: dict[str, Any], directory: Path) -> dict[str, Any]:
    """``raw`` (config.json) and what its class adds to it, for published files leave such keys out.

    Without transformers, and where its class refuses the file, ``raw`` stands for itself.
    """
    if find_spec("transformers") is None:
        return raw
    try:
        config = load_config(directory).get_text_config()
    except CheckpointError:
        return raw
    text = config.to_dict() | {name: getattr(config, name) for name in config.attribute_map}
    inside = raw.get("text_config")
    if not isinstance(inside, dict):
        return text | raw
    return raw | {"text_config": text | inside}


def _shape(name: str, raw: Mapping[str, Any], file: object, dense_ratio: float | None) -> ModelShape:
    config, notes = raw, []
    if isinstance(raw.get("text_config"), dict):
        config = raw["text_config"]
        notes.append("multimodal: only the text model is counted")
    for key, what in _OTHER_ATTENTION.items():
        if config.get(key):
            raise CheckpointError(
                f"{key} is set: {what}",
                file=file,
                fix="only models with multi-head or grouped-query attention can be predicted",
            )
    layers = _count(config, "num_hidden_layers", file, limit=_MAX_LAYERS)
    hidden, heads = _count(config, "hidden_size", file), _count(config, "num_attention_heads", file)
    kv_heads = _count(config, "num_key_value_heads", file, default=heads)
    if heads % kv_heads or (config.get("head_dim") is None and hidden % heads):
        raise CheckpointError(
            f"hidden_size {hidden}, num_attention_heads {heads} and num_key_value_heads {kv_heads} do not "
            "divide one another",
            file=file,
            fix="get an intact config.json",
        )
    head_size = _count(config, "head_dim", file, default=hidden // heads)
    experts = _experts(config, layers, file)
    if experts is not None:
        notes.append(
            f"{experts.count} routed experts in {experts.layers} layers count as dense bf16, in both models"
        )
    quantization = _quantization(raw, file)
    if quantization is not None:
        if dense_ratio is not None:
            raise ValueError(f"{name} is a Spense checkpoint: its layouts decide, leave --dense-ratio out")
        linears = _linears_of(quantization, layers, file)
    else:
        linears = _dense_linears(
            config, *(hidden, heads, kv_heads, head_size, layers), experts=experts, file=file
        )
        dense_ratio = 0.5 if dense_ratio is None else dense_ratio
    return ModelShape(
        name=name,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=_count(config, "vocab_size", file),
        tied=config.get("tie_word_embeddings", False) is True,
        windows=_windows(config, layers, file),
        linears=linears,
        dense_ratio=None if quantization else dense_ratio,
        tensor_parallel_sizes=tuple(quantization.tensor_parallel_sizes) if quantization else None,
        experts=experts,
        notes=tuple(notes),
    )


def _count(
    config: Mapping[str, Any], key: str, file: object, default: int | None = None, limit: int = MAX_FEATURES
) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 1 <= value <= limit:
        state = "is missing" if key not in config else f"is {value!r}"
        raise CheckpointError(
            f"{key} {state}, expected an integer from 1 to {limit}",
            file=file,
            fix="give the directory of a decoder model with a whole config.json",
        )
    return value


def _quantization(raw: Mapping[str, Any], file: object) -> AnyCheckpointConfig | None:
    found = raw.get("quantization_config")
    if found is None:
        return None
    quantization = parse_config(found, file)
    if quantization.codecs != UNIFORM_FP8:
        raise CheckpointError(
            f"GPUs have no kernels for {quantization.codecs.title} weights: there is no gain to predict",
            file=file,
            fix="prune with `--weight-dtype fp8`, or give the dense model's directory",
        )
    return quantization


def _windows(config: Mapping[str, Any], layers: int, file: object) -> tuple[int | None, ...]:
    kinds = config.get("layer_types")
    if kinds is None:
        return (None,) * layers
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise CheckpointError(
            f"layer_types must name one of {', '.join(known)} for each of the {layers} layers",
            file=file,
            fix="models with other kinds of layers cannot be predicted",
        )
    if "sliding_attention" not in kinds:
        return (None,) * layers
    window = _count(config, "sliding_window", file)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _experts(config: Mapping[str, Any], layers: int, file: object) -> Experts | None:
    keys = [key for key in _EXPERT_KEYS if config.get(key)]
    if not keys:
        return None
    kind = config.get("model_type")
    if not family_of(kind).routed:
        known = sorted(name for name, found in FAMILIES.items() if found.routed)
        raise CheckpointError(
            f"{keys[0]} is set, but the experts of model_type {kind!r} are not known",
            file=file,
            fix=f"mixtures of experts that can be predicted: {', '.join(known)}",
        )
    step, without = _count(config, "decoder_sparse_step", file, default=1), config.get("mlp_only_layers")
    skipped = without if isinstance(without, list) else []
    mixed = sum((i + 1) % step == 0 and i not in skipped for i in range(layers))
    count = _count(config, keys[0], file)
    active = _count(config, "num_experts_per_tok", file, limit=count)
    return Experts(mixed, count, active, _count(config, "moe_intermediate_size", file)) if mixed else None


def _dense_linears(
    config: Mapping[str, Any], *sizes: int, experts: Experts | None, file: object
) -> tuple[Linear, ...]:
    hidden, heads, kv_heads, head_size, layers = sizes
    q, kv = heads * head_size, kv_heads * head_size

    def dense(kind: Kind, rows: tuple[int, ...], columns: int, axis: Axis, count: int) -> Linear:
        return Linear(kind, tuple(Layout("output", n, columns, 0) for n in rows), axis, count)

    linears = [
        dense("attention", (q, kv, kv), hidden, "output", layers),
        dense("attention", (hidden,), q, "input", layers),
    ]
    inner = 2 if family_of(config.get("model_type")).gated else 1
    mixed = experts.layers if experts is not None else 0
    mlps = []
    if layers > mixed:
        key = "ffn_dim" if "intermediate_size" not in config and "ffn_dim" in config else "intermediate_size"
        mlps.append((_count(config, key, file), layers - mixed))
    if mixed and config.get("shared_expert_intermediate_size"):
        mlps.append((_count(config, "shared_expert_intermediate_size", file), mixed))
    for intermediate, count in mlps:
        linears.append(dense("mlp", (intermediate,) * inner, hidden, "output", count))
        linears.append(dense("mlp", (hidden,), intermediate, "input", count))
    return tuple(linears)


def _linears_of(quantization: AnyCheckpointConfig, layers: int, file: object) -> tuple[Linear, ...]:
    """The checkpoint's modules as vLLM fuses them; equal layers become one :class:`Linear`."""
    counts: Counter[tuple[Kind, tuple[Layout, ...], Axis]] = Counter()
    seen: dict[Kind, set[int]] = {"mlp": set(), "attention": set()}
    for name, spec in quantization.modules.items():
        parent, _, last = name.rpartition(".")
        number = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if number is None:
            continue
        kind: Kind = "attention" if in_attention(parent) else "mlp"
        seen[kind].add(int(number[1]))
        present = [part for part in fused_with(last) if f"{parent}.{part}" in quantization.modules]
        if last != present[0]:
            continue
        layouts = tuple(quantization.modules[f"{parent}.{part}"].layout() for part in present)
        axis: Axis = "input" if last in ROW_PARALLEL else "output"
        counts[kind, layouts, spec.split if spec.sparse else axis] += 1
    if seen["attention"] != set(range(layers)):
        raise CheckpointError(
            f"num_hidden_layers is {layers}, but quantization_config.modules lists the attention of "
            f"{len(seen['attention'])} layers",
            file=file,
            fix="make the checkpoint again with `spense prune`, or download it again",
        )
    return tuple(Linear(kind, parts, axis, count) for (kind, parts, axis), count in counts.items())
