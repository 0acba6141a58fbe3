"""How much the model's loss minds that an intermediate index becomes 2:4: one gradient pass, layer by layer.

To second order, with an empirical diagonal Fisher matrix F as the Hessian of the loss, an error δ in a
linear layer's output costs ``½ Σ_i F_ii E[δ_i²]``. F_ii is the mean squared gradient of the next-token
loss with respect to output i. So costs compare between projections and between layers, and one budget
serves the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle

from vllm_spense.format import CheckpointError
from vllm_spense.format.sparse24 import magnitude_mask
from vllm_spense.pruning.activations import LayerInputs
from vllm_spense.pruning.adapters import Mlp, check_weights
from vllm_spense.pruning.hessian import squares
from vllm_spense.pruning.source import SourceModel

DOWN_SHARE = 0.2
"""Part of a down column's energy that 2:4 removes: the two smallest squares of four normal variables."""


def index_costs(
    source: SourceModel,
    inputs: LayerInputs,
    windows: torch.Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> list[torch.Tensor]:
    """Per layer the loss [I] fp32 (nats per token, up to a common factor) that 2:4 on each index adds.

    ``inputs`` stand in front of the first layer of the dense model and are used up; ``windows
    [samples, seq]`` are their tokens. Forward, keeping each layer's inputs, and back again: one layer is
    in memory at a time. Layers without a prunable MLP get an empty tensor. ``progress`` gets (steps done,
    steps in all). Raises :class:`CheckpointError` for a gradient that is not finite.
    """
    layers = source.layers
    fronts = []
    for index, layer in enumerate(layers):
        fronts.append(inputs.keep(inputs.hidden))
        with source.resident(layer.module):
            check_weights(layer)
            inputs.advance(index, layer.module)
        if progress is not None:
            progress(index + 1, 2 * len(layers))
    gradients = _loss_gradients(source, inputs, windows)
    costs: list[torch.Tensor] = []
    for index, layer in reversed(list(enumerate(layers))):
        states = fronts.pop()
        with source.resident(layer.module), _observing(layer.mlp) as moments:
            for i in range(len(windows)):
                gradients[i] = _backward(inputs, index, layer.module, states[i], gradients[i])
            found = torch.empty(0) if layer.mlp is None else _costs(layer.mlp, moments).cpu()
        if not torch.isfinite(found).all():
            raise CheckpointError(
                "the gradient of the calibration loss is NaN or infinite here",
                module=layer.name,
                fix="check the source model's weights; fp16 models can overflow",
            )
        costs.append(found)
        if progress is not None:
            progress(2 * len(layers) - index, 2 * len(layers))
    return costs[::-1]


def _loss_gradients(source: SourceModel, inputs: LayerInputs, windows: torch.Tensor) -> torch.Tensor:
    """Gradient [samples, seq, hidden] of the summed next-token loss at the last layer's output."""
    network = source.network
    gradients = inputs.keep(inputs.hidden)
    with source.resident(*source.embedding(), network.get_output_embeddings()):
        for i, window in enumerate(windows):
            tokens = window.to(source.device)
            with torch.enable_grad(), inputs.standing_in(network, i) as states:
                logits = network(input_ids=tokens[None], use_cache=False).logits[0, :-1]
                loss = cross_entropy(logits.float(), tokens[1:], reduction="sum")
                gradients[i] = torch.autograd.grad(loss, states)[0][0]
    return gradients


def _backward(
    inputs: LayerInputs, index: int, layer: nn.Module, states: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """Gradient [seq, hidden] at a layer's input, from the one at its output; hooks see those inside."""
    with torch.enable_grad():
        front = inputs.on_device(states).requires_grad_()
        output = inputs.run(index, layer, front)
        return torch.autograd.grad(output, front, inputs.on_device(gradient))[0][0]


class _Moments:
    """Sums of squares over tokens: ``entering [K]`` a linear, and of the gradient ``leaving [N]`` it."""

    def __init__(self, linear: nn.Linear) -> None:
        self.entering = torch.zeros(linear.in_features, device=linear.weight.device)
        self.leaving = torch.zeros(linear.out_features, device=linear.weight.device)

    def see(self, _linear: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.entering += squares(args[0].detach())
        output.register_hook(self._see_gradient)

    def _see_gradient(self, gradient: torch.Tensor) -> None:
        self.leaving += squares(gradient)


@contextmanager
def _observing(mlp: Mlp | None) -> Iterator[list[_Moments]]:
    """While open, the moments of the inner linears and, last, of down are added up."""
    linears = [] if mlp is None else [*mlp.inner.values(), mlp.down]
    moments = [_Moments(linear) for linear in linears]
    handles: list[RemovableHandle] = []
    try:
        for linear, moment in zip(linears, moments, strict=True):
            handles.append(linear.register_forward_hook(moment.see))
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _costs(mlp: Mlp, moments: list[_Moments]) -> torch.Tensor:
    """Fisher-weighted errors [I] of 2:4 in the rows of the inner linears and the columns of down.

    The error of a row is that of dropping the two least ``|w| · sqrt(E[x²])`` of each four; that of a
    column is a fixed share of its energy, for its partners in a group are not known yet.
    """
    *inner, last = moments
    down = mlp.down.weight.float()
    costs = DOWN_SHARE * last.entering * (down.square() * last.leaving[:, None]).sum(0)
    for linear, moment in zip(mlp.inner.values(), inner, strict=True):
        energy = linear.weight.float().square() * moment.entering
        costs += moment.leaving * energy.masked_fill(magnitude_mask(energy), 0.0).sum(1)
    return costs
