"""Prune a Hugging Face model layer by layer and write it as a Spense checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_spense.format import Checkpoint, CheckpointWriter
from vllm_spense.format.validate import check_checkpoint
from vllm_spense.format.writer import check_target
from vllm_spense.pruning.activations import LayerInputs
from vllm_spense.pruning.adapters import DecoderLayer, decoder, decoder_layers
from vllm_spense.pruning.calibration import (
    CalibrationText,
    read_calibration,
    sample_windows,
    tokenize,
)
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.layer import LayerPruner, PrunedLayer
from vllm_spense.pruning.output import OutputBuilder


@dataclass(frozen=True)
class PruneProgress:
    """State after one layer: 1-based ``layer`` of ``layers``, losses per MLP module, seconds."""

    layer: int
    layers: int
    losses: dict[str, float]
    elapsed: float
    remaining: float


@dataclass(frozen=True)
class PruneReport:
    """What a finished run did. ``mlp_sparsity`` is the part of the MLP's weights that is zero.

    ``losses`` by module name; ``damping``: modules whose Hessian needed more than the configured
    damping, with the value used; ``tensor_parallel_sizes`` that the checkpoint promises.
    """

    directory: Path
    config: PruneConfig
    layers: int
    mlp_sparsity: float
    losses: dict[str, float]
    damping: dict[str, float]
    tensor_parallel_sizes: list[int]
    seconds: float


@dataclass
class _Totals:
    losses: dict[str, float] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def prune(
    model: str | Path,
    out: str | Path,
    config: PruneConfig,
    progress: Callable[[PruneProgress], None] | None = None,
) -> PruneReport:
    """Prune ``model`` (a local directory, or a hub name where there is network) into ``out``.

    The method is SpenseGPT (arXiv 2606.10445), true-sequential: down is calibrated behind the pruned
    gate and up, every layer behind the pruned and rounded layers before it. Arithmetic is fp32, on
    the GPU if there is one, one layer at a time. Equal inputs, seed and machine give bit-identical
    directories. ``out`` is complete and checked, or not there at all.

    Raises :class:`~vllm_spense.format.CheckpointError` (a ``ValueError``) for unusable source files,
    :class:`~vllm_spense.pruning.adapters.UnsupportedModelError` (a ``ValueError``) for other
    architectures, ``ValueError`` for calibration text and sizes that do not fit, ``FileExistsError``
    for an ``out`` that is in use, :class:`~vllm_spense.pruning.solvers.SolverError` for a Hessian that
    cannot be factored.
    """
    started = time.monotonic()
    check_target(Path(out).absolute(), config.overwrite)
    text = None if config.calibration is None else read_calibration(config.calibration)
    directory = source_directory(model)
    source = open_source(directory)
    network = load_source(directory)
    layers = decoder_layers(network)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # H loses its small eigenvalues in TF32
    inputs = _calibrate(network, directory, text, config, device)

    totals = _Totals()
    with CheckpointWriter(out, overwrite=config.overwrite) as writer:
        builder = OutputBuilder(writer, source, config)
        pruner = LayerPruner(config, inputs)
        layers_started = time.monotonic()
        for index, layer in enumerate(layers):
            pruned = _prune_layer(pruner, index, layer, device)
            builder.add_layer(pruned)
            totals.losses |= pruned.losses
            totals.damping |= pruned.damping
            if progress is not None:
                spent = time.monotonic() - layers_started
                left = spent / (index + 1) * (len(layers) - index - 1)
                progress(
                    PruneProgress(index + 1, len(layers), pruned.losses, time.monotonic() - started, left)
                )
        name = str(model) if not Path(model).exists() else directory.name
        written = builder.finish(name, text, totals.losses, totals.damping)
    check_checkpoint(Checkpoint(out))
    return PruneReport(
        directory=Path(out),
        config=config,
        layers=len(layers),
        mlp_sparsity=written.mlp_sparsity,
        losses=totals.losses,
        damping=totals.damping,
        tensor_parallel_sizes=written.tensor_parallel_sizes,
        seconds=time.monotonic() - started,
    )


def source_directory(model: str | Path) -> Path:
    """The local directory of ``model``; a hub name is downloaded (safetensors and text files only)."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise ValueError(f"{model}: no such model directory")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:
        raise ValueError(
            f"{model}: neither a local directory nor a model that can be downloaded ({error})"
        ) from None


def open_source(directory: Path) -> Checkpoint:
    """The source's files, refused when they are no plain dense safetensors checkpoint."""
    checkpoint = Checkpoint(directory)
    if checkpoint.quantization is not None:
        raise ValueError(f"{directory} is a Spense checkpoint already; prune the dense model instead")
    return checkpoint


def load_source(directory: Path) -> nn.Module:
    """The transformers model on the CPU in its stored dtype, without any code from the directory."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return network.eval()


def _calibrate(
    network: nn.Module,
    directory: Path,
    text: CalibrationText | None,
    config: PruneConfig,
    device: torch.device,
) -> LayerInputs | None:
    if text is None:
        return None
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    ids = tokenize(tokenizer, text.text)
    windows = sample_windows(ids, config.num_samples, config.seq_len, config.seed)
    for name, child in decoder(network).named_children():
        if name != "layers":  # embeddings and rotary tables; each layer gets its turn later
            child.float().to(device)
    return LayerInputs(network, windows, device)


def _prune_layer(pruner: LayerPruner, index: int, layer: DecoderLayer, device: torch.device) -> PrunedLayer:
    layer.module.float().to(device)
    pruned = pruner.prune(index, layer)
    layer.module.to("meta")  # frees it: the packed weights are with the writer
    return pruned
