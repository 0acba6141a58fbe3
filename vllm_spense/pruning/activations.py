"""Run a decoder one layer at a time on cached hidden states."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_spense.format import CheckpointError
from vllm_spense.format.writer import writing
from vllm_spense.pruning.adapters import decoder, decoder_layers

Hook = Callable[[torch.Tensor], None]
Allocate = Callable[[Sequence[int], torch.dtype], torch.Tensor]


def in_memory(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor in host memory."""
    return torch.empty(tuple(shape), dtype=dtype)


def on_disk(directory: Path) -> Allocate:
    """An allocator of tensors that are mapped files in ``directory``.

    The files have no name, so their space is free again when the tensor is gone, even after a SIGKILL.
    """

    def allocate(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        count = torch.Size(shape).numel()
        handle, path = tempfile.mkstemp(prefix="activations-", dir=directory)
        try:
            with writing(directory):
                # Real blocks now: a hole that cannot be filled later is a SIGBUS, not an error message.
                os.posix_fallocate(handle, 0, max(1, count * dtype.itemsize))
            return torch.from_file(path, shared=True, size=count, dtype=dtype).view(*shape)
        finally:
            os.close(handle)
            os.unlink(path)

    return allocate


class LayerInputs:
    """Hidden states [samples, seq, hidden] bf16 on the host, in front of the current layer.

    The model's own forward prepares each layer's other arguments (masks, rotary embeddings), once;
    after that the layers run singly. Samples go one at a time, so results do not depend on a batch.
    ``windows``: token ids [samples, seq]; only the embedding has to be there, the layers do not run.
    ``allocate`` says where the states are kept (:func:`in_memory`, :func:`on_disk`).
    """

    def __init__(
        self,
        model: nn.Module,
        windows: torch.Tensor,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.bfloat16,
        allocate: Allocate = in_memory,
    ) -> None:
        self.device = device
        self._allocate = allocate
        base = decoder(model)
        found = decoder_layers(model)
        layers = [layer.module for layer in found]
        self._names = [layer.name for layer in found]
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        for i, window in enumerate(windows):
            self._arguments = []
            with _recording(layers, self._record):
                base(input_ids=window[None].to(device), use_cache=False)
            if i == 0:
                self._compute_dtype = self._first.dtype
                self.hidden = allocate((len(windows), *self._first.shape[1:]), dtype)
            self.hidden[i] = self._first[0]
        del self._first

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if not self._arguments:
            self._first = args[0]
        kept = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
        self._arguments.append((args[1:], kept))
        return args[0]

    def fork(self) -> LayerInputs:
        """A second stream from the same hidden states on; the arguments are shared."""
        twin = object.__new__(LayerInputs)
        twin.__dict__ |= self.__dict__
        twin.hidden = self.keep(self.hidden)
        return twin

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of ``x`` in x's dtype where the hidden states are kept."""
        kept = self._allocate(x.shape, x.dtype)
        return kept.copy_(x)

    def feed(self, index: int, layer: nn.Module) -> None:
        """Run layer ``index`` on every sample for what watchers see; :class:`Stop` ends a sample."""
        for i in range(len(self.hidden)):
            with suppress(Stop):
                self._run(i, index, layer)

    def advance(self, index: int, layer: nn.Module) -> None:
        """Replace the hidden states by the outputs of layer ``index``.

        Raises :class:`CheckpointError` naming the layer for NaN or infinity in them.
        """
        for i in range(len(self.hidden)):
            states = self._run(i, index, layer)[0]
            if not torch.isfinite(states).all():
                raise CheckpointError(
                    "this layer turns the calibration text into NaN or infinity",
                    module=self._names[index],
                    fix="check the source model's weights; fp16 models can overflow",
                )
            self.hidden[i] = states

    def _run(self, sample: int, index: int, layer: nn.Module) -> torch.Tensor:
        return self.run(index, layer, self.on_device(self.hidden[sample]))

    def on_device(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [seq, hidden] of one sample as the layers take them: [1, seq, hidden]."""
        return states[None].to(self.device, self._compute_dtype)

    def run(self, index: int, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Output [1, seq, hidden] of layer ``index`` for such states."""
        args, kwargs = self._arguments[index]
        output = layer(states, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def standing_in(self, model: nn.Module, sample: int) -> Iterator[torch.Tensor]:
        """While open, ``model``'s layers pass on the states of ``sample`` instead of computing.

        Yields these states, a leaf whose gradient a caller can ask for.
        """
        states = self.on_device(self.hidden[sample]).requires_grad_()
        with _recording([layer.module for layer in decoder_layers(model)], lambda *_: states):
            yield states


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


@contextmanager
def recording_outputs(
    module: nn.Module, keep: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu
) -> Iterator[list[torch.Tensor]]:
    """While open, ``keep`` of the (first) output of every call of ``module`` is appended to the list."""
    outputs: list[torch.Tensor] = []

    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(keep(output[0] if isinstance(output, tuple) else output))

    handle = module.register_forward_hook(record)
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
