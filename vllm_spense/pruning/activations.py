"""Run a decoder one layer at a time on cached hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from vllm_spense.pruning.adapters import decoder, decoder_layers

Hook = Callable[[torch.Tensor], None]


class LayerInputs:
    """Hidden states [samples, seq, hidden] fp32 in front of the current layer.

    The model's own forward prepares each layer's other arguments (masks, rotary embeddings), once;
    after that the layers run singly. Samples go one at a time, so results do not depend on a batch.
    """

    def __init__(self, model: nn.Module, windows: torch.Tensor, device: torch.device) -> None:
        self.device = device
        base = decoder(model)
        layers = [layer.module for layer in decoder_layers(model)]
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        embedded = []
        for window in windows:
            self._arguments = []
            with _recording(layers, self._record):
                base(input_ids=window[None].to(device), use_cache=False)
            embedded.append(self._first.float().cpu())
        self.hidden = torch.cat(embedded)

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if not self._arguments:
            self._first = args[0]
        kept = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
        self._arguments.append((args[1:], kept))
        return args[0]

    def feed(self, index: int, layer: nn.Module) -> None:
        """Run layer ``index`` on every sample for what watchers see; :class:`Stop` ends a sample."""
        for i in range(len(self.hidden)):
            with suppress(Stop):
                self._run(i, index, layer)

    def advance(self, index: int, layer: nn.Module) -> None:
        """Replace the hidden states by the outputs of layer ``index``."""
        for i in range(len(self.hidden)):
            self.hidden[i] = self._run(i, index, layer)[0].cpu()

    def _run(self, sample: int, index: int, layer: nn.Module) -> torch.Tensor:
        args, kwargs = self._arguments[index]
        output = layer(self.hidden[sample, None].to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def _recording(layers: Iterable[nn.Module], record: Callable) -> Iterator[None]:
    """While open, the layers hand their hidden states through and report their arguments."""

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        return record(args, kwargs)

    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own forward shows again


@contextmanager
def watching(module: nn.Module, hook: Hook) -> Iterator[None]:
    """While open, ``hook`` sees the input of every call of ``module``."""
    handle = module.register_forward_pre_hook(lambda _, args: hook(args[0]))
    try:
        yield
    finally:
        handle.remove()


class Stop(Exception):
    """Raised by a watcher to leave a forward whose rest is not needed."""


def inputs_of_last(block: nn.Module, last: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What ``block(x)`` feeds to its submodule ``last``, without running ``last``."""
    seen: list[torch.Tensor] = []

    def stop(value: torch.Tensor) -> None:
        seen.append(value)
        raise Stop

    with watching(last, stop), suppress(Stop):
        block(x)
    return seen[0]


@contextmanager
def recording_outputs(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """While open, the (first) output of every call of ``module`` is appended to the list, on the CPU."""
    outputs: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).cpu())

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def replaying(
    module: nn.Module, outputs: Iterable[torch.Tensor], wrap: Callable[[torch.Tensor], Any]
) -> Iterator[None]:
    """While open, ``module`` does not compute: its calls return ``wrap(output)`` of one after another."""
    remaining = iter(outputs)
    module.forward = lambda *_, **__: wrap(next(remaining))
    try:
        yield
    finally:
        del module.forward  # the class's own forward shows again
