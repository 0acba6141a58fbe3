"""Linears that take small inputs as zero, in a transformers model: the definition of what serving skips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.twell_config import RESPARSIFY


def dropped(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """``x`` with zeros where ``|x| <= threshold``; NaN is no small input."""
    return x.masked_fill(x.abs() <= threshold, 0)


def apply_thresholds(model: nn.Module, thresholds: Mapping[str, float], file: Path) -> list[RemovableHandle]:
    """From now on the modules of ``model`` that ``thresholds`` names drop small inputs.

    Raises :class:`CheckpointError`, which names ``file``, for a name that is no linear of the model.
    """
    handles = []
    for name, threshold in thresholds.items():
        try:
            module: Any = model.get_submodule(name)
        except AttributeError:
            module = None
        if getattr(module, "weight", None) is None or module.weight.ndim != 2:
            problem = "config.json has a threshold for this module, which is no linear of the model"
            raise CheckpointError(problem, file=file, module=name, fix=RESPARSIFY)
        handles.append(module.register_forward_pre_hook(_before(threshold)))
    return handles


@contextmanager
def thresholds_applied(model: nn.Module, thresholds: Mapping[str, float], file: Path) -> Iterator[None]:
    """:func:`apply_thresholds` while open."""
    with ExitStack() as hooks:
        for handle in apply_thresholds(model, thresholds, file):
            hooks.callback(handle.remove)
        yield


def _before(threshold: float) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    def before(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return dropped(inputs[0], threshold), *inputs[1:]

    return before
