"""Do layers that run one at a time compute what the model does? Asked of every model before it is pruned.

A model class may hand its layers what the replay does not know of: arguments made from earlier layers, states
changed between two layers, attention that others look into. Each such difference is silent otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_spense.format import CheckpointError
from vllm_spense.models.parts import DecoderLayer, UnsupportedModelError
from vllm_spense.pruning.activations import (
    LayerInputs,
    first_output,
    layer_arguments,
    recording_outputs,
    replaying,
)
from vllm_spense.pruning.source import SourceModel

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative error by compute dtype. On CPUs there is none; some sums on GPUs have no fixed order."""


@torch.no_grad()
def check_replay(
    source: SourceModel, windows: torch.Tensor, progress: Callable[[int, int], None] | None = None
) -> None:
    """Compare every layer of ``source``, run by itself, with the model's own forward of ``windows[0]``.

    ``windows [2 or more, seq]``: arguments that differ between windows need a second one to be seen. Each
    layer is read once, and only one is in memory. ``progress`` gets (layers done, layers in all).

    Raises :class:`UnsupportedModelError` that names the first layer whose states differ, or at which the
    forward fails, and the relative error; :class:`CheckpointError` as reading a layer does.
    """
    layers = source.layers
    with source.resident(*source.embedding()):
        with _refusing(layers[0], "the model's forward in front of it fails"):
            inputs = LayerInputs(source.network, windows, source.device, dtype=source.dtype)
        check = _Check(source, inputs, progress)
        base, tokens = source.network.base_model, windows[:1].to(source.device)  # with a wrapper's own steps
        with check.lending(), _refusing(layers[-1], "the model's forward behind it fails"):
            own = base(input_ids=tokens, use_cache=False)[0]
        with inputs.standing_in(source.network, 0):
            replayed = base(input_ids=tokens, use_cache=False)[0]
            check.compare(replayed, own, layers[-1], "what the model makes of its output")


class _Check:
    """One pass of the model's own forward, in which each layer also runs by itself."""

    def __init__(
        self, source: SourceModel, inputs: LayerInputs, progress: Callable[[int, int], None] | None
    ) -> None:
        self._source = source
        self._inputs = inputs
        self._progress = progress

    @contextmanager
    def lending(self) -> Iterator[None]:
        """While open, each layer gets its weights for its turn and is compared in it."""

        def forward_of(index: int, layer: DecoderLayer) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                del layer.module.forward  # the class's own forward shows again
                with self._source.resident(layer.module), _refusing(layer, "it fails when it runs by itself"):
                    return self._layer(index, layer, args, kwargs)

            return forward

        layers = self._source.layers
        try:
            for index, layer in enumerate(layers):
                layer.module.forward = forward_of(index, layer)
            yield
        finally:
            for layer in layers:
                layer.module.__dict__.pop("forward", None)

    def _layer(self, index: int, layer: DecoderLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states, others = layer_arguments(args, kwargs)
        states = states.clone()
        self.compare(self._inputs.on_device(self._inputs.hidden[0]), states, layer, "what comes into it")
        with _refusing(layer, "the model's own forward fails in it"):
            output = layer.module(states.clone(), *others, **kwargs)
            own = first_output(output)
        block = layer.attention_block
        with recording_outputs(block, torch.clone) as attention:
            self.compare(self._replayed(index, layer, states), own, layer, "its output")
        if layer.mlp is not None:  # then the pruner runs attention once, and the MLP again and again
            with replaying(block, attention, attention.wrap):
                again = self._replayed(index, layer, states)
            self.compare(again, own, layer, "its output behind recorded attention")
        self._inputs.hidden[0] = own[0]
        if self._progress is not None:
            self._progress(index + 1, len(self._source.layers))
        return output

    def _replayed(self, index: int, layer: DecoderLayer, states: torch.Tensor) -> torch.Tensor:
        return self._inputs.run(0, index, layer.module, states.clone())

    def compare(self, replayed: torch.Tensor, own: torch.Tensor, layer: DecoderLayer, what: str) -> None:
        """Raises :class:`UnsupportedModelError` where the two are not the same states."""
        error = _relative_error(replayed, own)
        if not error <= TOLERANCE[self._source.dtype]:
            apart = f"a relative error of {error:.2g}"
            raise _unsupported(layer, f"run by itself, {what} is not as in the model's own forward: {apart}")


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all finite values together; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    if torch.equal(found, expected):
        return 0.0
    finite = found.isfinite() & expected.isfinite()  # NaN and infinity are refused where states are used
    found, expected = found[finite].float(), expected[finite].float()
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


@contextmanager
def _refusing(layer: DecoderLayer, where: str) -> Iterator[None]:
    """While open, whatever a model class raises because it is used in this way is a refusal."""
    try:
        yield
    except (CheckpointError, UnsupportedModelError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _unsupported(layer, f"{where} ({type(error).__name__}: {error})") from error


def _unsupported(layer: DecoderLayer, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{layer.name} ({type(layer.module).__name__}) cannot be pruned with calibration: {reason}. "
        "--preset magnitude runs no layer"
    )
