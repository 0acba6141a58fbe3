"""How much the model's loss minds that an intermediate index becomes 2:4: one gradient pass, layer by layer.

To second order, with an empirical diagonal Fisher matrix F as the Hessian of the loss, an error δ in a
linear layer's output costs ``½ Σ_i F_ii E[δ_i²]``. F_ii is the mean squared gradient of the next-token
loss with respect to output i. So costs compare between projections and between layers, and one budget
serves the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle

from vllm_spense.format import CheckpointError
from vllm_spense.format.sparse24 import magnitude_mask
from vllm_spense.models.parts import Mlp, check_weights
from vllm_spense.network import language_head, logits_at, scored_positions
from vllm_spense.pruning.activations import LayerInputs, first_output
from vllm_spense.pruning.arguments import Key, floating_tensors
from vllm_spense.pruning.choice.selection import index_scores
from vllm_spense.pruning.config import Selection
from vllm_spense.pruning.solvers.hessian import squares
from vllm_spense.pruning.source import SourceModel

LOGITS = 1 << 24
"""Logits of a window that the loss is taken from; fewer tokens of it where the vocabulary is large."""
DOWN_SHARE = 0.2
"""Part of a down column's energy that 2:4 removes: the two smallest squares of four normal variables."""


@dataclass
class IndexCosts:
    """What is known of the intermediate indices, per layer [I] fp32 on the CPU; empty without a prunable MLP.

    ``fisher``: the loss (nats per token, up to a common factor) that 2:4 on an index adds. ``scores``:
    SpenseGPT+'s, of the dense model's inputs.
    """

    fisher: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)

    def ranking(self, selection: Selection) -> list[torch.Tensor]:
        """By what ``selection`` ranks, the highest stay dense; ``consensus``: the mean of both ranks.

        Gradients know best what the calibration text needs, and less of other text than activations do. Both
        together come close to the better one on either (docs/accuracy.md).
        """
        if selection == "spensegpt":
            return [torch.arange(len(fisher)) for fisher in self.fisher]
        if selection == "spensegpt+":
            return self.scores
        if selection == "fisher":
            return self.fisher
        pairs = zip(self.fisher, self.scores, strict=True)
        return [(_ranks(fisher) + _ranks(scores)) / 2 for fisher, scores in pairs]


def _ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort(stable=True).argsort().float()


def index_costs(
    source: SourceModel,
    inputs: LayerInputs,
    windows: torch.Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> IndexCosts:
    """What 2:4 on each index costs, from one gradient pass.

    ``inputs`` stand in front of the first layer of the dense model and are used up; ``windows
    [samples, seq]`` are their tokens. Forward, keeping each layer's inputs, and back again: one layer is
    in memory at a time. ``progress`` gets (steps done, steps in all).

    Raises :class:`CheckpointError` for a gradient that is not finite.
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
    known = IndexCosts()
    shared = _SharedGradients()
    for index, layer in reversed(list(enumerate(layers))):
        states = fronts.pop()
        with source.resident(layer.module), _observing(layer.mlp) as moments:
            for i in range(len(windows)):
                front = inputs.on_device(states[i])
                gradients[i] = _backward(inputs, i, index, layer.module, front, gradients[i], shared)
            found = scores = torch.empty(0)
            if layer.mlp is not None:
                found, scores = _costs(layer.mlp, moments).cpu(), _scores(layer.mlp, moments).cpu()
            known.fisher.insert(0, found)
            known.scores.insert(0, scores)
        if not torch.isfinite(found).all():
            raise CheckpointError(
                "the gradient of the calibration loss is NaN or infinite here",
                module=layer.name,
                fix="check the source model's weights; fp16 models can overflow",
            )
        if progress is not None:
            progress(2 * len(layers) - index, 2 * len(layers))
    return known


def _loss_gradients(source: SourceModel, inputs: LayerInputs, windows: torch.Tensor) -> torch.Tensor:
    """Gradient [samples, seq, hidden] of the summed next-token loss at the last layer's output."""
    network = source.network
    head = language_head(network)
    gradients = inputs.keep(inputs.hidden)
    positions = scored_positions(network, windows.shape[1] - 1, LOGITS).to(source.device)
    with source.resident(*source.embedding(), head):
        for i, window in enumerate(windows):
            tokens = window.to(source.device)
            with torch.enable_grad(), inputs.standing_in(network, i) as states:
                logits = logits_at(network, tokens, positions)
                loss = cross_entropy(logits, tokens[positions + 1], reduction="sum")
                gradients[i] = torch.autograd.grad(loss, states)[0][0]
    return gradients


class _SharedGradients:
    """Gradients at what layers hand to later ones (Gemma 4's keys and values), till the writer's turn."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int, Key], list[torch.Tensor]] = {}

    def add(self, window: int, writer: int, key: Key, found: list[torch.Tensor]) -> None:
        """From one layer that read the value."""
        found = [gradient.cpu() for gradient in found]
        place = window, writer, key
        sums = self._sums.get(place)
        self._sums[place] = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]

    def take(self, window: int, writer: int, key: Key) -> list[torch.Tensor]:
        """Their sums, in the order of the value's tensors; empty where no layer read it."""
        return self._sums.pop((window, writer, key), [])


def _backward(
    inputs: LayerInputs,
    window: int,
    index: int,
    layer: nn.Module,
    front: torch.Tensor,
    gradient: torch.Tensor,
    shared: _SharedGradients,
) -> torch.Tensor:
    """Gradient [seq, hidden] at a layer's input ``front`` [1, seq, hidden], from the one at its output.

    Hooks see those inside. Layers go from the last to the first.
    """
    with torch.enable_grad():
        call = inputs.call(window, index)
        read = {key: list(floating_tensors(value)) for key, (_, value) in call.read.items()}
        leaves = [front, *(leaf for found in read.values() for leaf in found)]
        for leaf in leaves:
            leaf.requires_grad_()
        outputs = [first_output(layer(front, *call.args, **call.kwargs))]
        backs = [inputs.on_device(gradient)]
        for key, value in call.written().items():
            for written, back in zip(floating_tensors(value), shared.take(window, index, key), strict=False):
                outputs.append(written)
                backs.append(back.to(inputs.device))
        found = torch.autograd.grad(outputs, leaves, backs, materialize_grads=True)
    rest = iter(found[1:])
    for key, values in read.items():
        writer, _ = call.read[key]
        shared.add(window, writer, key, [next(rest) for _ in values])
    return found[0][0]


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


def _scores(mlp: Mlp, moments: list[_Moments]) -> torch.Tensor:
    *inner, last = moments
    weights = [linear.weight.float() for linear in mlp.inner.values()]
    return index_scores(weights, mlp.down.weight.float(), inner[0].entering, last.entering)
