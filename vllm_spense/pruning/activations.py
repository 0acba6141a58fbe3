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
from vllm_spense.models.parts import UnsupportedModelError, decoder, decoder_layers
from vllm_spense.pruning.arguments import Allocate, Arguments, Call, SharedValues, map_tensors

Hook = Callable[[torch.Tensor], None]


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

    Raises :class:`UnsupportedModelError` for a model that does not run its layers once each, in order.
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
        self._names = [layer.name for layer in decoder_layers(model)]
        self._arguments = Arguments(self._names, len(windows), allocate)
        self._shared = SharedValues()
        self._in_tuples = _returns_tuples(model, windows[:1, :2].to(device))
        for i in range(len(windows)):
            first = self._record(model, windows[i : i + 1].to(device), i)
            if i == 0:
                self._compute_dtype = first.dtype
                self.hidden = allocate((len(windows), *first.shape[1:]), dtype)
            self.hidden[i] = first[0]
        self._arguments.finish()

    def _record(self, model: nn.Module, window: torch.Tensor, number: int) -> torch.Tensor:
        """Keep the arguments of all layers for ``window`` [1, seq]; returns the first layer's states."""
        seen: list[torch.Tensor] = []

        def record(
            index: int, states: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]
        ) -> torch.Tensor:
            if index != len(seen):
                raise UnsupportedModelError(
                    f"{self._names[index]} does not run once and in its turn in the model's own forward, so "
                    "that the layers cannot be pruned one by one"
                )
            seen.append(states)
            kept = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
            self._arguments.record(number, index, args, kept)
            return seen[0]

        with _standing_in(model, record, self._in_tuples):
            decoder(model)(input_ids=window, use_cache=False)
        if len(seen) < len(self._names):
            raise UnsupportedModelError(f"{self._names[len(seen)]} does not run in the model's own forward")
        return seen[0]

    def fork(self) -> LayerInputs:
        """A second stream from the same hidden states on; the arguments are shared."""
        twin = object.__new__(LayerInputs)
        twin.__dict__ |= self.__dict__
        twin.hidden = self.keep(self.hidden)
        twin._shared = self._shared.copy()
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

    def advance(self, index: int, layer: nn.Module, *, check: bool = True) -> None:
        """Replace the hidden states by the outputs of layer ``index``.

        Raises :class:`CheckpointError` naming the layer for NaN or infinity in them, if ``check``.
        """
        for i in range(len(self.hidden)):
            states = self._run(i, index, layer)[0]
            if check and not torch.isfinite(states).all():
                raise CheckpointError(
                    "this layer turns the calibration text into NaN or infinity",
                    module=self._names[index],
                    fix="check the source model's weights; fp16 models can overflow",
                )
            self.hidden[i] = states

    def _run(self, sample: int, index: int, layer: nn.Module) -> torch.Tensor:
        return self.run(sample, index, layer, self.on_device(self.hidden[sample]))

    def on_device(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [seq, hidden] of one sample as the layers take them: [1, seq, hidden]."""
        return states[None].to(self.device, self._compute_dtype)

    def run(self, sample: int, index: int, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Output [1, seq, hidden] of layer ``index`` for such states, with the arguments of ``sample``.

        What the layer hands to later layers is kept too, even where :class:`Stop` ends the run.
        """
        call = self.call(sample, index)
        try:
            return first_output(layer(states, *call.args, **call.kwargs))
        finally:
            for key, value in call.written().items():
                kept = map_tensors(lambda x: self.keep(x.detach()), value)
                self._shared.write(sample, index, key, kept)

    def call(self, sample: int, index: int) -> Call:
        """The arguments of layer ``index`` beside the hidden states, for a run of the caller's own."""
        return self._arguments.call(sample, index, self._shared, self.device)

    @contextmanager
    def standing_in(self, model: nn.Module, sample: int) -> Iterator[torch.Tensor]:
        """While open, ``model``'s layers pass on the states of ``sample`` instead of computing.

        Yields these states, a leaf whose gradient a caller can ask for.
        """
        states = self.on_device(self.hidden[sample]).requires_grad_()
        with _standing_in(model, lambda *_: states, self._in_tuples):
            yield states


def first_output(output: Any) -> torch.Tensor:
    """The hidden states among what a layer or an attention block returns."""
    return output[0] if isinstance(output, tuple) else output


def layer_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """The hidden states of a decoder layer's call, which leave ``kwargs``, and its other arguments."""
    return (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())


@contextmanager
def _standing_in(model: nn.Module, record: Callable[..., torch.Tensor], in_tuples: bool) -> Iterator[None]:
    """While open, layers return ``record(index, states, args, kwargs)``, alone or ``in_tuples``."""
    layers = [layer.module for layer in decoder_layers(model)]

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states, others = layer_arguments(args, kwargs)
            states = record(index, states, others, kwargs)
            return (states,) if in_tuples else states

        return forward

    try:
        for index, layer in enumerate(layers):
            layer.forward = stand_in(index)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)  # the class's own forward shows again


def _returns_tuples(model: nn.Module, window: torch.Tensor) -> bool:
    """Whether the layers return tuples (Falcon-H1): then states that come alone lose a dimension."""
    seen: list[torch.Tensor] = []

    def record(_index: int, states: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.append(states)
        return seen[0]

    with _standing_in(model, record, in_tuples=False):
        seen.append(decoder(model)(input_ids=window, use_cache=False)[0])
    return any(states.ndim < seen[0].ndim for states in seen)


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


class Outputs(list[torch.Tensor]):
    """The first outputs of a module's calls; ``length``: of the tuple that it returns them in (0: none)."""

    length = 0

    def wrap(self, output: torch.Tensor) -> Any:
        """``output`` as the module returns it, with None for what comes behind it in a tuple."""
        return (output, *[None] * (self.length - 1)) if self.length else output


@contextmanager
def recording_outputs(
    module: nn.Module, keep: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu
) -> Iterator[Outputs]:
    """While open, ``keep`` of the (first) output of every call of ``module`` is appended to the list."""
    outputs = Outputs()

    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.length = len(output) if isinstance(output, tuple) else 0
        outputs.append(keep(first_output(output)))

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
