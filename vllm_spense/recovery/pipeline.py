"""A recovery run: load a pruned checkpoint, or a Llama that gets ReLU gates, train it, write it again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_spense.evaluation import load_model, load_tokenizer
from vllm_spense.evaluation.density import Density, measure_density
from vllm_spense.format import Checkpoint, CheckpointError, CheckpointWriter
from vllm_spense.format.target import Target
from vllm_spense.format.validate import check_checkpoint
from vllm_spense.pruning.source import source_directory
from vllm_spense.pruning.warnings import warn_about_overlap
from vllm_spense.recovery.config import RecoveryConfig
from vllm_spense.recovery.gates import check_gates
from vllm_spense.recovery.output import write_density, write_rest, write_weights
from vllm_spense.recovery.student import load_student
from vllm_spense.recovery.training import (
    HELD_OUT,
    RecoveryProgress,
    check_progress,
    held_out_loss,
    held_out_penalty,
    train,
)
from vllm_spense.sources import check_windows
from vllm_spense.text import calibrate, find_sources, listed


@dataclass(frozen=True)
class RecoveryReport:
    """What a finished run did. ``losses``: of every step, nats per token, before that step's change.
    ``held_out``: before and after the run, on windows that were not learnt from; with ReLU gates ``density``
    is the share of hidden values that are not zero there, before and after, else None."""

    directory: Path
    config: RecoveryConfig
    losses: list[float]
    held_out: tuple[float, float]
    seconds: float
    density: tuple[float, float] | None = None


def recover(
    directory: str | Path,
    out: str | Path,
    config: RecoveryConfig,
    dense: str | Path | None = None,
    progress: Callable[[RecoveryProgress], None] | None = None,
) -> RecoveryReport:
    """Train the kept weights of the Spense checkpoint ``directory`` and write the result to ``out``.

    ``dense``: the model it was pruned from (a local directory, or a hub name where there is network);
    objective ``tokens`` needs none. The 2:4 zeros, modules and layouts stay as they are. Everything is
    trained in fp32, without rounding of activations, and rounded to the stored dtype at the end. Both models
    and AdamW's state are in memory. ``out`` is complete and checked, or not there at all. On CPUs equal
    inputs and options give equal bytes.

    With ``activation="relu"`` the gates are ReLU before the first step, hidden values are penalised, and
    ``directory`` may be a dense Llama, which is its own ``dense`` where none is given. What must not rise is
    loss and penalty of the model that has ReLU gates and is not trained yet.

    Raises :class:`~vllm_spense.format.CheckpointError` (a ``ValueError``) for a ``directory`` that is no
    Spense checkpoint or damaged, ``ValueError`` for a ``dense`` model that does not fit and for unusable
    text, ``FileExistsError`` for an ``out`` that is in use,
    :class:`~vllm_spense.recovery.training.RecoveryError` (a ``ValueError``) for a loss that is not finite, or
    that rises on windows that are not learnt from.
    """
    started = time.monotonic()
    inputs = [directory, *listed(config.calibration), *([] if dense is None else [dense])]
    Target(out, overwrite=config.overwrite, inputs=inputs).check()
    checkpoint = Checkpoint(directory)
    if config.activation is None:
        checkpoint.require_spense()
    else:
        check_gates(checkpoint)
        if dense is None and checkpoint.quantization is None and checkpoint.config["hidden_act"] != "relu":
            dense = directory
    original = None if config.objective == "tokens" else _original(dense)
    text = calibrate(
        find_sources(config.calibration),
        load_tokenizer(directory),
        config.steps * config.batch + HELD_OUT,
        config.seq_len,
        config.seed,
        bos=config.bos,
        column=config.text_column,
    )
    warn_about_overlap(text)
    check_windows(text.windows, checkpoint.directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def check(written: Path) -> None:
        if (found := Checkpoint(written)).quantization is not None:
            check_checkpoint(found)

    with CheckpointWriter(out, overwrite=config.overwrite, inputs=inputs, check=check) as writer:
        write_rest(writer, checkpoint, config, text.record)  # before the work: it fails then, if it does
        relu = config.activation == "relu"
        student = load_student(checkpoint, config.train, device, relu=relu)
        teacher = None if original is None else _teacher(original, student.model, checkpoint)
        learnt, held_out = text.windows[:-HELD_OUT], text.windows[-HELD_OUT:]

        def density() -> Density:
            return measure_density(student.model, held_out.to(device))

        def penalty() -> float:
            return held_out_penalty(student, held_out, config) if config.penalty else 0.0

        used = density().mean if relu else None
        before, costs = held_out_loss(student, teacher, held_out, config.objective), penalty()
        losses = train(student, teacher, learnt, config, progress)
        after = held_out_loss(student, teacher, held_out, config.objective)
        check_progress(before + costs, after + penalty(), config)
        densities = None
        if used is not None:
            left = density()
            densities = used, left.mean
            shares = [round(layer.density, 4) for layer in left.layers.values()]
            write_density(writer, checkpoint, config, text.record, shares)
        write_weights(writer, checkpoint, student, config)
    return RecoveryReport(Path(out), config, losses, (before, after), time.monotonic() - started, densities)


def _original(dense: str | Path | None) -> Path:
    """The dense model's directory."""
    if dense is None:
        raise ValueError(
            "objectives 'both' and 'distill' learn from the dense model: give it (--dense MODEL), or choose "
            "--objective tokens"
        )
    directory = source_directory(dense)
    try:
        original = Checkpoint(directory)
    except CheckpointError as error:
        error.add_note("This is the model that --dense names")
        raise
    if original.quantization is not None:
        raise ValueError(f"{dense} is a Spense checkpoint itself; --dense takes the unpruned model")
    return directory


def _teacher(directory: Path, student: Any, checkpoint: Checkpoint) -> nn.Module:
    """The dense model. Nothing changes embeddings, so other ones are another model's."""
    mine = student.get_input_embeddings().weight
    teacher: Any = load_model(directory, device=mine.device).requires_grad_(False)
    if not torch.equal(mine, teacher.get_input_embeddings().weight):
        raise ValueError(f"{checkpoint.directory} was not pruned from {directory}: their embeddings differ")
    return teacher
