"""The files of a checkpoint with thresholds: the model's own, a config.json that says more, a model card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_spense.evaluation.density import Density
from vllm_spense.format import Checkpoint, CheckpointWriter
from vllm_spense.format.twell_config import TwellCheckpointConfig
from vllm_spense.pruning.card import CARD_NAME
from vllm_spense.pruning.fingerprint import versions
from vllm_spense.sources import base_model
from vllm_spense.sparsify.config import SparsifyConfig
from vllm_spense.text import TextRecord


@dataclass(frozen=True)
class Found:
    """``thresholds`` by module, their ``density``, ``loss`` and ``uniform_loss`` as
    :class:`~vllm_spense.sparsify.SparsifyReport` has them."""

    thresholds: dict[str, float]
    density: Density
    loss: float
    uniform_loss: float


def write(
    writer: CheckpointWriter, checkpoint: Checkpoint, config: SparsifyConfig, text: TextRecord, found: Found
) -> None:
    """All files: tensors bit for bit, and what config.json says beside."""
    for name in checkpoint.tensors:
        writer.add(name, checkpoint.load(name))
    settings = TwellCheckpointConfig(
        inputs=found.thresholds,
        density={name: round(layer.density, 4) for name, layer in found.density.layers.items()},
        provenance=base_model(checkpoint.directory).record() | _provenance(config, text, found),
    )
    writer.write_config(checkpoint.config | {"quantization_config": settings.model_dump(mode="json")})
    writer.copy_side_files(checkpoint.directory)
    writer.write_text(CARD_NAME, _card(checkpoint, config, text, found))


def _provenance(config: SparsifyConfig, text: TextRecord, found: Found) -> dict[str, Any]:
    return {
        "options": config.decisive(),
        "calibration": text.dump(),
        "divergence": found.loss,
        "divergence_uniform": found.uniform_loss,
        "versions": versions("vllm-spense", "torch", "transformers"),
    }


def _card(checkpoint: Checkpoint, config: SparsifyConfig, text: TextRecord, found: Found) -> str:
    base = base_model(checkpoint.directory)
    rows = "\n".join(
        f"| {name} | {found.thresholds[name]:.4g} | {layer.density:.1%} |"
        for name, layer in found.density.layers.items()
    )
    return f"""\
# {base.name}, with thresholds for the inputs of its MLPs' last linears

The weights are those of {base.name}, bit for bit. An input of a layer below whose absolute value is not above
the layer's threshold is taken as zero, and the layer skips that column of its weight.

| | |
|---|---|
| skipped | {1 - found.density.mean:.1%} of all inputs, on the windows that losses were measured on |
| cost there | {found.loss:.4f} nats per token (KL divergence from the model itself) |
| calibration | {config.num_samples} windows of {config.seq_len} tokens of {text.names} \
(SHA-256 {text.sha256[:16]}…), seed {config.seed} |

| layer | threshold | inputs left |
|---|---|---|
{rows}

Serve it with `vllm serve DIR` where vllm-spense is installed; measure it on your own text with
`spense eval DIR --text FILE`. The licence of the base model applies.
"""
