"""The training loop: AdamW on the loss of each step's fresh windows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from vllm_spense.evaluation.hidden import hidden_values
from vllm_spense.recovery.config import Objective, RecoveryConfig
from vllm_spense.recovery.penalty import L1Penalty
from vllm_spense.recovery.student import Student

BETAS = (0.9, 0.95)
"""A run is shorter than the thousand steps that AdamW's usual second moment remembers."""
MAX_NORM = 1.0
WARM_UP = 0.1
HELD_OUT = 4
"""Windows that are not learnt from."""


class RecoveryError(ValueError):
    """The training does not converge: a loss or a gradient is not finite, or the model got worse."""


@dataclass(frozen=True)
class RecoveryProgress:
    """State after 1-based ``step`` of ``steps``: its ``loss`` (nats per token), speed, seconds."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    elapsed: float
    remaining: float


def train(
    student: Student,
    teacher: nn.Module | None,
    windows: torch.Tensor,
    config: RecoveryConfig,
    progress: Callable[[RecoveryProgress], None] | None = None,
) -> list[float]:
    """Change the student's trainable parameters in place; returns the mean loss of each step.

    ``windows [steps * batch, seq_len]`` int64. Windows go through one by one, so that the logits of one
    are in memory, and their gradients add up. ``teacher``: None for objective ``tokens``. The penalty of
    ``config`` is part of what is descended, not of the losses.
    On CPUs equal arguments give equal parameters. Raises :class:`RecoveryError` naming the step.
    """
    device = student.parameters[0].device
    optimizer = torch.optim.AdamW(student.parameters, lr=0.0, betas=BETAS, weight_decay=0.0)
    started = time.monotonic()
    losses: list[float] = []
    l1 = L1Penalty()
    for step, batch in enumerate(windows.to(device).split(config.batch)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        optimizer.zero_grad()
        loss = 0.0
        for window in batch:
            with hidden_values(student.model, l1.see) if config.penalty else nullcontext():
                part = window_loss(student.model, teacher, window, config.objective) / len(batch)
            loss += float(part.detach())
            if config.penalty:
                part = part + config.penalty * l1.take() / len(batch)
            part.backward()
        norm = float(nn.utils.clip_grad_norm_(student.parameters, MAX_NORM))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise RecoveryError(
                f"step {step + 1} of {config.steps}: the loss is {loss}, its gradient's norm {norm}; nothing "
                f"was written. Try a --learning-rate below {config.learning_rate:g}"
            )
        optimizer.step()
        losses.append(loss)
        if progress is not None:
            elapsed = time.monotonic() - started
            done = step + 1
            speed = done * batch.numel() / elapsed
            remaining = elapsed / done * (config.steps - done)
            progress(RecoveryProgress(done, config.steps, loss, speed, elapsed, remaining))
    return losses


@torch.no_grad()
def held_out_loss(
    student: Student, teacher: nn.Module | None, windows: torch.Tensor, objective: Objective
) -> float:
    """Mean of :func:`window_loss` over ``windows [count, seq_len]``, nats per token; nothing is learnt."""
    device = student.parameters[0].device
    losses = [window_loss(student.model, teacher, window, objective) for window in windows.to(device)]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def held_out_penalty(student: Student, windows: torch.Tensor, config: RecoveryConfig) -> float:
    """What the penalty of ``config`` adds on ``windows [count, seq_len]``, nats."""
    l1 = L1Penalty()
    model: Any = student.model
    with hidden_values(model, l1.see):
        for window in windows.to(student.parameters[0].device):
            _logits(model, window)
    return config.penalty * float(l1.take())


def check_progress(before: float, after: float, config: RecoveryConfig) -> None:
    """:class:`RecoveryError` if the loss on held-out windows, with the penalty, rose."""
    if not after <= before:
        penalty = f" with its penalty (--l1 {config.penalty:g})" if config.penalty else ""
        raise RecoveryError(
            f"the loss{penalty} on {HELD_OUT} windows that were not learnt from rose from {before:.4f} to "
            f"{after:.4f} nats: the model would be worse, and nothing was written. Try a --learning-rate "
            f"below {config.learning_rate:g}, or more --steps"
        )


def learning_rate(step: int, config: RecoveryConfig) -> float:
    """Rate of the 0-based ``step``: linear up over the first tenth, then half a cosine down to zero."""
    warm_up = math.ceil(WARM_UP * config.steps)
    if step < warm_up:
        return config.learning_rate * (step + 1) / warm_up
    return config.learning_rate * (1 + math.cos(math.pi * (step - warm_up) / (config.steps - warm_up))) / 2


def window_loss(
    model: nn.Module, teacher: nn.Module | None, window: torch.Tensor, objective: Objective
) -> torch.Tensor:
    """Mean loss over the ``seq_len - 1`` next tokens of ``window [seq_len]``, with its graph.

    ``distill``: KL(teacher ‖ model); ``tokens``: cross entropy with the tokens that come; ``both``: the mean
    of the two. Only ``tokens`` needs no teacher.
    """
    logits = _logits(model, window)
    if objective == "tokens":
        return cross_entropy(logits, window[1:])
    assert teacher is not None
    with torch.no_grad():
        wanted = _logits(teacher, window).log_softmax(-1)
    distance = kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
    return distance if objective == "distill" else (distance + cross_entropy(logits, window[1:])) / 2


def _logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    """fp32 ``[seq_len - 1, vocabulary]``; matrices are multiplied in bf16 on GPUs, in fp32 on CPUs."""
    with torch.autocast(window.device.type, torch.bfloat16, enabled=window.is_cuda):
        return model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
