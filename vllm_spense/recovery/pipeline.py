"""A recovery run: load a pruned checkpoint, train its kept weights, write it again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_spense.evaluation import load_model, load_tokenizer
from vllm_spense.format import Checkpoint, CheckpointError
from vllm_spense.format.writer import check_target
from vllm_spense.pruning.calibration import read_calibration, sample_windows, tokenize
from vllm_spense.pruning.source import source_directory
from vllm_spense.recovery.config import RecoveryConfig
from vllm_spense.recovery.output import write
from vllm_spense.recovery.student import load_student
from vllm_spense.recovery.training import RecoveryProgress, train

_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "ffn_dim",
)


@dataclass(frozen=True)
class RecoveryReport:
    """What a finished run did. ``losses``: of every step, nats per token, before that step's change."""

    directory: Path
    config: RecoveryConfig
    losses: list[float]
    seconds: float


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
    trained in fp32 and rounded to the stored dtype at the end; an FP8 checkpoint's rounding of
    activations is left out. Both models and AdamW's state are in memory. ``out`` is complete and checked,
    or not there at all. On CPUs equal inputs and options give equal bytes.

    Raises :class:`~vllm_spense.format.CheckpointError` (a ``ValueError``) for a ``directory`` that is no
    Spense checkpoint or damaged, ``ValueError`` for a ``dense`` model that does not fit and for unusable
    text, ``FileExistsError`` for an ``out`` that is in use,
    :class:`~vllm_spense.recovery.training.RecoveryError` (a ``ValueError``) for a loss that is not finite.
    """
    started = time.monotonic()
    check_target(Path(out).absolute(), config.overwrite)
    checkpoint = Checkpoint(directory)
    checkpoint.require_spense()
    original = None if config.objective == "tokens" else _original(checkpoint, dense)
    text = read_calibration(config.calibration)
    ids = tokenize(load_tokenizer(directory), text.text)
    windows = sample_windows(ids, config.steps * config.batch, config.seq_len, config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = load_student(checkpoint, config.train, device)
    teacher = None if original is None else load_model(original, device=device).requires_grad_(False)
    losses = train(student, teacher, windows, config, progress)
    write(checkpoint, out, student, config, text)
    return RecoveryReport(Path(out), config, losses, time.monotonic() - started)


def _original(checkpoint: Checkpoint, dense: str | Path | None) -> Path:
    """The dense model's directory, after a look at whether it can be what ``checkpoint`` was made from."""
    if dense is None:
        raise ValueError(
            "objective 'distill' learns from the dense model: give it (--dense MODEL), or choose "
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
    for key in _ARCHITECTURE:
        mine, its = checkpoint.config.get(key), original.config.get(key)
        if mine != its:
            raise ValueError(
                f"{dense} is not the model that {checkpoint.directory} was pruned from: its {key} is {its}, "
                f"the checkpoint's {mine}"
            )
    return directory
