"""A run that sets thresholds: read a text, count inputs, measure losses, write a directory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vllm_spense.evaluation import load_model, load_tokenizer
from vllm_spense.evaluation.density import Density, measure_density
from vllm_spense.evaluation.hidden import hidden_values, last_linears
from vllm_spense.evaluation.thresholds import thresholds_applied
from vllm_spense.format import Checkpoint, CheckpointError, CheckpointWriter
from vllm_spense.format.target import Target
from vllm_spense.format.twell_checkpoint import TwellCheckpoint
from vllm_spense.models.parts import UnsupportedModelError, decoder
from vllm_spense.network import language_head
from vllm_spense.pruning.source import source_directory
from vllm_spense.sources import check_windows
from vllm_spense.sparsify.allocation import thresholds_by_loss, uniform_thresholds
from vllm_spense.sparsify.config import SparsifyConfig
from vllm_spense.sparsify.losses import Losses
from vllm_spense.sparsify.magnitudes import Magnitudes
from vllm_spense.sparsify.output import Found, write
from vllm_spense.text import calibrate, find_sources, listed

Stage = Literal["inputs", "losses", "density"]
Progress = Callable[[Stage, int, int], None]
"""Gets what is measured now, and how many steps of how many are done."""


@dataclass(frozen=True)
class SparsifyReport:
    """What a finished run found: ``thresholds`` by module, the ``density`` they leave on the windows that
    losses were measured on, the ``loss`` there (KL divergence from the model itself, nats per token), and
    that of one share for all layers."""

    directory: Path
    config: SparsifyConfig
    thresholds: dict[str, float]
    density: Density
    loss: float
    uniform_loss: float
    seconds: float


def sparsify(
    model: str | Path, out: str | Path, config: SparsifyConfig, progress: Progress | None = None
) -> SparsifyReport:
    """Find thresholds for the inputs of each MLP's last linear and write ``model`` with them to ``out``.

    Thresholds are on ``act(gate) · up``: on the gate alone they cost far more (TEAL, arXiv 2408.14690, has
    one for each input of a layer). The weights are copied bit for bit. ``allocation="loss"`` is only taken
    where it loses less than one share everywhere.

    Raises :class:`~vllm_spense.format.CheckpointError` (a ``ValueError``) for a ``model`` that is damaged,
    quantised or a Spense checkpoint, :class:`~vllm_spense.models.parts.UnsupportedModelError` for one without
    known MLPs, ``ValueError`` for unusable text, ``FileExistsError`` for an ``out`` that is in use.
    """
    started = time.monotonic()
    inputs = [model, *listed(config.calibration)]
    Target(out, overwrite=config.overwrite, inputs=inputs).check()
    sources = find_sources(config.calibration)
    directory = source_directory(model)
    checkpoint = Checkpoint(directory)
    if checkpoint.quantization is not None:
        raise CheckpointError(
            "this is a Spense checkpoint, which has no form for thresholds",
            file=directory,
            fix="give the dense model that it was pruned from",
        )
    text = calibrate(
        sources,
        load_tokenizer(directory),
        config.num_samples,
        config.seq_len,
        config.seed,
        bos=config.bos,
        column=config.text_column,
    )
    check_windows(text.windows, directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def tell(stage: Stage, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)

    with CheckpointWriter(out, overwrite=config.overwrite, inputs=inputs, check=TwellCheckpoint) as writer:
        network = load_model(directory, device=device).requires_grad_(False)
        language_head(network)
        _check_names(network, checkpoint)
        windows = text.windows.to(device)
        seen = _magnitudes(network, windows, lambda done, total: tell("inputs", done, total))
        thresholds = uniform_thresholds(seen, config.sparsity)
        chosen = windows[: config.loss_samples]
        losses = Losses(network, chosen, directory)
        loss = uniform = losses.of(thresholds)
        if config.allocation == "loss":
            alone = losses.alone(thresholds, lambda done, total: tell("losses", done, total))
            found = thresholds_by_loss(seen, config.sparsity, alone)
            if (better := losses.of(found)) < loss:
                thresholds, loss = found, better
        with thresholds_applied(network, thresholds, directory):
            density = measure_density(network, chosen, lambda done, total: tell("density", done, total))
        write(writer, checkpoint, config, text.record, Found(thresholds, density, loss, uniform))
    seconds = time.monotonic() - started
    return SparsifyReport(Path(out), config, thresholds, density, loss, uniform, seconds)


def _check_names(network: nn.Module, checkpoint: Checkpoint) -> None:
    """The modules go by one name in the network and in the files, which is what serving looks for."""
    names = last_linears(network)
    if not names:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: {type(network).__name__} has no MLPs of plain linears (routed experts "
            "do not count), so there is nothing to skip"
        )
    for name in names:
        if f"{name}.weight" not in checkpoint.tensors:
            raise UnsupportedModelError(
                f"{checkpoint.directory}: {name} goes by another name in the files; text models alone are "
                "supported, no multimodal wrappers"
            )


@torch.inference_mode()
def _magnitudes(
    network: nn.Module, windows: torch.Tensor, progress: Callable[[int, int], None]
) -> dict[str, Magnitudes]:
    """Histograms of the inputs of each MLP's last linear, over all tokens of ``windows``."""
    seen = {name: Magnitudes() for name in last_linears(network)}

    def see(name: str, hidden: torch.Tensor) -> None:
        seen[name].see(hidden)

    layers: Any = decoder(network)
    with hidden_values(network, see):
        for done, window in enumerate(windows, start=1):
            layers(input_ids=window[None], use_cache=False)
            progress(done, len(windows))
    return seen
