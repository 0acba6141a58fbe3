"""The values between an MLP's activation and its last linear, in a transformers model: seen or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from vllm_spense.models.families import MLP_FORMS, in_attention
from vllm_spense.models.parts import decoder

See = Callable[[str, torch.Tensor], torch.Tensor | None]
"""Gets the name of an MLP's last linear and its input ``[..., neurons]``; what it returns goes on instead."""

_LAST = {last for _, last in MLP_FORMS}


def last_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The last linear of each MLP (down, fc2) by the model's own name, layer by layer; not those of routed
    experts, nor of what sees or hears.

    Raises :class:`~vllm_spense.models.parts.UnsupportedModelError` for models without decoder layers.
    """
    text = decoder(model)
    inside = next(name for name, module in model.named_modules() if module is text)
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(f"{inside}.layers.".lstrip("."))
        and name.rpartition(".")[2] in _LAST
        and "experts" not in name.split(".")
        and not in_attention(name)
    }


@contextmanager
def hidden_values(model: nn.Module, see: See) -> Iterator[None]:
    """While open, every forward pass shows ``see`` the hidden values of each MLP, gradients attached."""

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], Any]:
        def before(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
            return see(name, inputs[0])

        return before

    with ExitStack() as hooks:
        for name, module in last_linears(model).items():
            hooks.callback(module.register_forward_pre_hook(hook(name)).remove)
        yield
