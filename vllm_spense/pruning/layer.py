"""Prune one decoder layer in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from vllm_spense.format import CheckpointError, Layout, dequantize, quantize_per_channel
from vllm_spense.pruning.activations import (
    LayerInputs,
    Stop,
    inputs_of_last,
    recording_outputs,
    replaying,
    watching,
)
from vllm_spense.pruning.adapters import DecoderLayer
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.hessian import Hessian, output_error
from vllm_spense.pruning.selection import dense_count, index_scores, permutation
from vllm_spense.pruning.solvers import (
    Factor,
    factorize,
    prune_magnitude,
    prune_obs,
    prune_wanda,
)

_KEEP_BYTES = 2 << 30
"""Inputs of down up to this size are kept between two passes instead of being computed again."""


@dataclass
class PrunedLayer:
    """Result for one layer: full-precision weights before rounding, by module name, and what was lost.

    ``losses`` per MLP module: relative squared output error of pruning and rounding together (of the
    weight itself where nothing was calibrated). ``row_order``: the permutation of a module's rows, to
    be applied to its bias. ``damping``: modules whose Hessian needed more damping, with the value used.
    """

    weights: dict[str, torch.Tensor]
    layouts: dict[str, Layout]
    losses: dict[str, float] = field(default_factory=dict)
    row_order: dict[str, torch.Tensor] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)


@dataclass
class _Observed:
    """What the unpruned layer showed: per sample the MLP's input and attention's output (on the CPU),
    the Hessian in front of gate and up, and the sums of squares in front of down if indices are scored.
    """

    mlp_inputs: list[torch.Tensor]
    attention: list[torch.Tensor]
    h_in: torch.Tensor
    down_squares: torch.Tensor | None


class LayerPruner:
    """Prunes layer after layer of one model under one configuration.

    ``inputs`` is None for methods that need no calibration. The model's linears hold the rounded
    weights afterwards, so that the next layer is calibrated on what will be served.
    """

    def __init__(self, config: PruneConfig, inputs: LayerInputs | None) -> None:
        self.config = config
        self.inputs = inputs

    def prune(self, index: int, layer: DecoderLayer) -> PrunedLayer:
        """Prune MLP and round all linears of ``layer`` (on its device, fp32), then advance the inputs.

        Raises :class:`CheckpointError` for NaN or infinity in weights or inputs, ``ValueError`` for
        sizes that no layout fits, :class:`SolverError` when OBS fails.
        """
        layouts = self._layouts(layer)
        gate_name, up_name, down_name = layer.mlp_names()
        result = PrunedLayer({}, layouts)
        self._check_weights(layer)
        if self.config.weight_dtype == "fp8":
            for name, linear in layer.attention.items():
                self._store(result, name, linear, linear.weight)

        seen = self._observe(index, layer, layouts[gate_name].dense)
        h_in = None if seen is None else seen.h_in
        order = self._permute(layer, layouts[gate_name].dense, seen)
        result.row_order = {gate_name: order, up_name: order}
        solve_in = self._solver(h_in, f"{gate_name} and up_proj", result)
        for name, linear in ((gate_name, layer.gate), (up_name, layer.up)):
            original = linear.weight.clone()
            self._store(result, name, linear, solve_in(original, layouts[name]))
            result.losses[name] = output_error(linear.weight - original, original, h_in)
        # Gate and up are pruned now, so down sees other inputs than before.
        h_down, down_inputs = (None, []) if seen is None else self._observe_down(layer, seen)
        original = layer.down.weight.clone()
        pruned = self._solver(h_down, down_name, result)(original, layouts[down_name])
        self._store(result, down_name, layer.down, pruned)
        result.losses[down_name] = output_error(layer.down.weight - original, original, h_down)
        if seen is not None:
            self._advance(index, layer, seen, down_inputs)
        return result

    def _layouts(self, layer: DecoderLayer) -> dict[str, Layout]:
        intermediate = layer.gate.out_features
        hidden = layer.gate.in_features
        dense = dense_count(intermediate, self.config.dense_ratio, self.config.alignment)
        sparse = intermediate - dense
        gate, up, down = layer.mlp_names()
        try:
            rows = Layout("output", intermediate, hidden, sparse)
            cols = Layout("input", hidden, intermediate, sparse)
        except ValueError as error:
            raise ValueError(f"{layer.name}.mlp: {error}") from None
        if not sparse:
            cols = Layout("output", hidden, intermediate, 0)  # the one spelling of a dense layer
        layouts = {gate: rows, up: rows, down: cols}
        if self.config.weight_dtype == "fp8":
            layouts |= {
                name: Layout("output", linear.out_features, linear.in_features, 0)
                for name, linear in layer.attention.items()
            }
        return layouts

    def _check_weights(self, layer: DecoderLayer) -> None:
        for child, tensor in layer.module.named_parameters():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(
                    "the source model's weight holds NaN or infinity",
                    tensor=f"{layer.name}.{child}",
                    fix="get an intact copy of the source model",
                )

    # -- statistics ------------------------------------------------------------------------------

    def _observe(self, index: int, layer: DecoderLayer, dense: int) -> _Observed | None:
        """Run the layer up to the MLP (up to down, if indices are scored) on all samples."""
        if self.inputs is None:
            return None
        gate, _, down = layer.mlp_names()
        device = layer.gate.weight.device
        scored = self.config.selection == "spensegpt+" and 0 < dense < layer.down.in_features
        mlp_inputs: list[torch.Tensor] = []
        h_in = Hessian(layer.gate.in_features, device)
        squares = torch.zeros(layer.down.in_features, device=device)

        def see_mlp(x: torch.Tensor) -> None:
            h_in.add(x)
            mlp_inputs.append(x.cpu())
            if not scored:
                raise Stop

        def see_down(x: torch.Tensor) -> None:
            squares.add_(x.reshape(-1, x.shape[-1]).square().sum(0))
            raise Stop

        with (
            recording_outputs(layer.attention_block) as attention,
            watching(layer.gate, see_mlp),
            watching(layer.down, see_down),
        ):
            self.inputs.feed(index, layer.module)
        if not torch.isfinite(squares).all():
            raise CheckpointError("the calibration inputs of this layer hold NaN or infinity", module=down)
        return _Observed(mlp_inputs, attention, h_in.matrix(gate), squares if scored else None)

    def _observe_down(self, layer: DecoderLayer, seen: _Observed) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hessian of down's inputs, and these inputs themselves if they are small enough to keep."""
        device = layer.down.weight.device
        h = Hessian(layer.down.in_features, device)
        tokens = sum(x.numel() // x.shape[-1] for x in seen.mlp_inputs)
        keep = tokens * layer.down.in_features * 4 <= _KEEP_BYTES
        kept = []
        for x in seen.mlp_inputs:
            inner = inputs_of_last(layer.mlp, layer.down, x.to(device))
            h.add(inner)
            if keep:
                kept.append(inner.cpu())
        return h.matrix(layer.mlp_names()[2]), kept

    def _advance(
        self, index: int, layer: DecoderLayer, seen: _Observed, down_inputs: list[torch.Tensor]
    ) -> None:
        """Outputs of the finished layer; attention and, where kept, down's inputs are known already."""
        assert self.inputs is not None
        device = layer.down.weight.device
        outputs: Iterator[torch.Tensor]
        if down_inputs:
            outputs = (layer.down(x.to(device)) for x in down_inputs)
        else:  # a list, for the MLP cannot compute while it is replayed
            outputs = iter([layer.mlp(x.to(device)).cpu() for x in seen.mlp_inputs])
        with (
            replaying(layer.attention_block, seen.attention, lambda x: (x.to(device), None)),
            replaying(layer.mlp, outputs, lambda x: x.to(device)),
        ):
            self.inputs.advance(index, layer.module)

    # -- changes ---------------------------------------------------------------------------------

    def _permute(
        self,
        layer: DecoderLayer,
        dense: int,
        seen: _Observed | None,
    ) -> torch.Tensor:
        """Move the dense indices to the end in gate, up and down; returns the order [I] on the CPU."""
        scores = None
        if seen is not None and seen.down_squares is not None:
            weights = (layer.gate.weight, layer.up.weight, layer.down.weight)
            scores = index_scores(*weights, seen.h_in, seen.down_squares)
        on_cpu = permutation(scores, layer.gate.out_features, dense)
        order = on_cpu.to(layer.gate.weight.device)
        for linear in (layer.gate, layer.up):
            linear.weight.copy_(linear.weight[order])
            if linear.bias is not None:
                linear.bias.copy_(linear.bias[order])
        layer.down.weight.copy_(layer.down.weight[:, order])
        return on_cpu

    def _solver(self, h: torch.Tensor | None, name: str, result: PrunedLayer):
        """A function (weight, layout) -> pruned weight for layers whose input Hessian is ``h``."""
        config = self.config
        if config.method == "magnitude" or h is None:
            return prune_magnitude
        if config.method == "wanda":
            return lambda weight, layout: prune_wanda(weight, layout, h)
        factor: Factor | None = None

        def solve(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
            nonlocal factor
            if not layout.sparse:
                return weight
            if factor is None:
                factor = factorize(h, config.damping, name=name, strict=config.strict)
                if factor.escalations:
                    result.damping[name] = factor.damping
                    warnings.warn(
                        f"{name}: the input Hessian needed damping {factor.damping:g} instead of "
                        f"{config.damping:g}; more calibration text may prune better",
                        stacklevel=2,
                    )
            return prune_obs(weight, layout, factor, config.block_size)

        return solve

    def _store(self, result: PrunedLayer, name: str, linear: nn.Linear, weight: torch.Tensor) -> None:
        """Keep ``weight`` for packing, and put its rounded values into ``linear``."""
        result.weights[name] = weight.detach().clone()
        if self.config.weight_dtype == "fp8":
            rounded = dequantize(*quantize_per_channel(weight))
        else:
            rounded = weight.to(torch.bfloat16).float()
        linear.weight.copy_(rounded)
