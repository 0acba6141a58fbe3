"""The files of a pruned model: packed layers, untouched tensors, config, provenance, model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_spense.format import CheckpointWriter, LinearFormat, ModuleSpec
from vllm_spense.format.codecs import codec
from vllm_spense.format.files import storable
from vllm_spense.format.schema import checkpoint_config
from vllm_spense.format.side_files import side_files
from vllm_spense.models.parts import DecoderLayer
from vllm_spense.pruning.card import CARD_NAME, model_card
from vllm_spense.pruning.choice.pilot import Verdict
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.fingerprint import versions
from vllm_spense.pruning.layer import PrunedLayer
from vllm_spense.pruning.resume import LayerRecord
from vllm_spense.pruning.run import Run
from vllm_spense.pruning.source import SourceModel
from vllm_spense.pruning.stages import stage
from vllm_spense.pruning.targets import LayerTargets, linears_of
from vllm_spense.text import TextRecord

REST_SHARD_BYTES = 1 << 30
"""Embeddings and head go through memory one by one; smaller tensors share a file."""


@dataclass(frozen=True)
class Written:
    """Facts about a finished checkpoint."""

    mlp_sparsity: float
    tensor_parallel_sizes: list[int]


@stage("round and pack")
def pack_layer(
    pruned: PrunedLayer, layer: DecoderLayer, source: SourceModel
) -> tuple[dict[str, torch.Tensor], dict[str, ModuleSpec]]:
    """All tensors of one decoder layer's file (packed linears and what stays as it is), and the linears."""
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, ModuleSpec] = {}
    linears = linears_of(layer)
    for name, layout in pruned.layouts.items():
        tensors |= {f"{name}.{short}": tensor.cpu() for short, tensor in pruned.tensors[name].items()}
        biased = linears[name].bias is not None
        if biased:
            bias, order = source.checkpoint.load(f"{name}.bias"), pruned.row_order.get(name)
            tensors[f"{name}.bias"] = (bias if order is None else bias[order]).contiguous()
        modules[name] = ModuleSpec.of(layout, biased)
    packed = {f"{name}.{short}" for name in modules for short in ("weight", "bias")}
    for name in sorted(source.checkpoint.tensors):
        if name.startswith(f"{layer.name}.") and name not in packed:
            tensors[name] = source.checkpoint.load(name)
    return tensors, modules


@torch.no_grad()
def restore_layer(
    targets: LayerTargets, modules: dict[str, ModuleSpec], shard: Path, config: PruneConfig
) -> None:
    """Put the packed linears of a finished layer back into it, as the pruner left them."""
    linears = linears_of(targets.layer)
    with safe_open(shard, framework="pt") as stream:
        for module, spec in modules.items():
            linear = LinearFormat(spec.layout(), targets.codecs(module, config), spec.bias)
            tensors = {short: stream.get_tensor(f"{module}.{short}") for short in linear.held()}
            linears[module].weight.copy_(linear.decode(tensors))
            if spec.bias:
                linears[module].bias.copy_(tensors["bias"])


def write_rest(
    writer: CheckpointWriter,
    run: Run,
    text: TextRecord | None,
    records: list[LayerRecord],
    verdict: Verdict | None = None,
) -> None:
    """Add to the finished layers everything else: embeddings, norms, head, and all files but weights."""
    source = run.source
    prefixes = tuple(f"{layer.name}." for layer in source.layers)
    for name in sorted(source.checkpoint.tensors):
        if not name.startswith(prefixes):
            writer.add(name, source.checkpoint.load(name))
    description, card = describe(run, text, records, verdict)
    writer.write_config(description)
    writer.copy_side_files(source.checkpoint.directory)
    writer.write_text(CARD_NAME, card)


def rehearse(run: Run, text: TextRecord | None) -> None:
    """Do what the end of a run does without its weights; ``ValueError`` for what could not be done then.

    Finds files beside the weights that cannot be read, and names or settings that config.json or the model
    card cannot hold.
    """
    layouts = [item for targets in run.targets for item in targets.layouts.items()]
    modules = {name: ModuleSpec.of(layout, bias=False) for name, layout in layouts}
    record = LayerRecord(modules, dict.fromkeys(modules, 0.0), {}, [], 0.0)
    description, card = describe(run, text, [record])
    json.dumps(description)
    storable(card).encode()
    side_files(run.source.checkpoint.directory)


def describe(
    run: Run, text: TextRecord | None, records: list[LayerRecord], verdict: Verdict | None = None
) -> tuple[dict[str, Any], str]:
    """config.json and the model card of a checkpoint with these layers."""
    source, config = run.source, run.config
    written = facts(run, records)
    modules, losses = merged(records)
    provenance = _provenance(run, text, records)
    if verdict is not None:
        provenance["allocation"] = verdict.record()
    quantization = checkpoint_config(
        codec(config.weight_dtype),
        own={name: config.codecs for targets in run.targets for name in targets.pruned},
        tensor_parallel_sizes=written.tensor_parallel_sizes,
        ignore=_ignored(source, modules),
        modules=modules,
        provenance=provenance,
    )
    dumped = quantization.model_dump(mode="json")
    sizes = written.tensor_parallel_sizes
    card = model_card(run.base, config, written.mlp_sparsity, sizes, losses, provenance)
    return source.checkpoint.config | {"quantization_config": dumped}, card


def facts(run: Run, records: list[LayerRecord]) -> Written:
    """Sparsity of the MLPs and the tensor-parallel sizes that can be promised."""
    modules, losses = merged(records)
    attentions = [targets.attention for targets in run.targets if targets.attention is not None]
    aside = {name for attention in attentions for name in attention.linears}
    layouts = [modules[name].layout() for name in losses if name not in aside]
    weights = sum(layout.out_features * layout.in_features for layout in layouts)
    zeros = sum(layout.sparse_shape[0] * layout.sparse_shape[1] // 2 for layout in layouts)
    heads = [n for a in attentions for n in (a.groups - a.dense, a.dense)]
    owners = {name: targets for targets in run.targets for name in targets.layouts}
    linears = [
        LinearFormat(spec.layout(), owners[name].codecs(name, run.config)) for name, spec in modules.items()
    ]
    sizes = tensor_parallel_sizes(linears, heads, run.config.max_tp)
    return Written(zeros / weights if weights else 0.0, sizes)


def merged(records: list[LayerRecord]) -> tuple[dict[str, ModuleSpec], dict[str, float]]:
    """Modules and losses of all layers."""
    modules: dict[str, ModuleSpec] = {}
    losses: dict[str, float] = {}
    for record in records:
        modules |= record.modules
        losses |= record.losses
    return modules, losses


def tensor_parallel_sizes(linears: list[LinearFormat], heads: list[int], max_tp: int) -> list[int]:
    """Powers of two up to ``max_tp`` into which every layer with a 2:4 region can be cut.

    ``heads``: key/value heads in the regions of pruned attention. A rank takes whole ones from each region,
    for its parts of q, k, v and o must belong together.
    """
    hybrid = [linear for linear in linears if linear.layout.sparse]

    def fits(size: int) -> bool:
        cut = all(linear.shardable(linear.layout.split, size) for linear in hybrid)
        return cut and not any(count % size for count in heads)

    sizes = [1]
    while sizes[-1] * 2 <= max_tp and fits(sizes[-1] * 2):
        sizes.append(sizes[-1] * 2)
    return sizes


def _ignored(source: SourceModel, modules: dict[str, ModuleSpec]) -> list[str]:
    """Modules with a matrix that stay as they are: the head, and what bf16 checkpoints do not prune."""
    weights = (n for n, info in source.checkpoint.tensors.items() if len(info.shape) == 2)
    names = {n.removesuffix(".weight") for n in weights if n.endswith(".weight")}
    embeddings = {n for n in names if "embed" in n}
    return sorted((names | {"lm_head"}) - embeddings - set(modules))


def _provenance(run: Run, text: TextRecord | None, records: list[LayerRecord]) -> dict[str, Any]:
    _, losses = merged(records)
    damping: dict[str, float] = {}
    for record in records:
        damping |= record.damping
    return {
        **run.base.record(),
        "options": run.config.decisive(),
        "calibration": None if text is None else text.dump(),
        "versions": versions("vllm-spense", "torch", "transformers"),
        "losses": {name: float(f"{loss:.6g}") for name, loss in losses.items()},
        "raised_damping": damping,
        "joint_left_out": [name for record in records for name in record.left_out],
    }
