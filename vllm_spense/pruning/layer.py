"""Prune one decoder layer in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from vllm_spense.format import CheckpointError, Codecs, Layout, LinearFormat
from vllm_spense.format.codecs import codec
from vllm_spense.format.linear import Rounding
from vllm_spense.models.parts import DecoderLayer, Mlp, check_weights
from vllm_spense.pruning.activations import (
    LayerInputs,
    Outputs,
    Stop,
    recording_outputs,
    replaying,
    watching,
)
from vllm_spense.pruning.choice.attention import (
    Attention,
    group_order,
    move_groups,
    observe,
    observe_out,
)
from vllm_spense.pruning.choice.selection import index_scores, permutation, permute_columns, permute_rows
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.solvers.hessian import Hessian, output_error, squares
from vllm_spense.pruning.solvers.joint import fit_jointly, output_losses, split, stride
from vllm_spense.pruning.solvers.obs import factorize
from vllm_spense.pruning.solvers.regroup import regroup
from vllm_spense.pruning.solvers.solver import Solver
from vllm_spense.pruning.stages import stage
from vllm_spense.pruning.targets import LayerTargets

KEEP_BYTES = 2 << 30
"""Inputs of down up to this size are kept between two passes instead of being computed again."""


@dataclass
class PrunedLayer:
    """Result for one layer: the encoded weights by module name (:func:`encode`), and what was lost.

    ``losses`` per pruned module: relative squared output error of pruning and rounding together (of the
    weight itself where nothing was calibrated). ``row_order``: the permutation of a module's rows, to
    be applied to its bias. ``damping``: modules whose Hessian needed more damping, with the value used.
    ``left_out``: MLPs whose joint fit did not lower the error on tokens that it had not seen.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    layouts: dict[str, Layout]
    losses: dict[str, float] = field(default_factory=dict)
    row_order: dict[str, torch.Tensor] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass
class _Observed:
    """What the unpruned layer showed: attention's outputs per sample (on the CPU), the Hessian in front
    of the inner linears, per sample some of their inputs [T, K] fp32 (on the CPU; only where they are fitted
    jointly) and some that judge the fit, and the sums of squares in front of down if indices are scored.
    """

    attention: Outputs
    h: torch.Tensor
    tokens: list[torch.Tensor]
    unseen: list[torch.Tensor]
    down_squares: torch.Tensor | None


class LayerPruner:
    """Prunes layer after layer of one model under one configuration.

    ``inputs`` is None for methods that need no calibration; ``costs``: what each index [I] of each layer
    costs as 2:4, None where each layer ranks its own. The model's linears hold the rounded weights
    afterwards, so that the next layer is calibrated on what will be served.
    """

    def __init__(
        self, config: PruneConfig, inputs: LayerInputs | None, costs: Sequence[torch.Tensor] | None = None
    ) -> None:
        self.config = config
        self.inputs = inputs
        self.costs = costs

    def prune(self, index: int, targets: LayerTargets) -> PrunedLayer:
        """Prune the ``targets`` and round all linears of their layer where it is, then advance the inputs.

        The layer runs in its own dtype; statistics, solvers and the weights that are encoded are fp32.

        Raises :class:`CheckpointError` for NaN or infinity in weights or inputs, :class:`SolverError` when
        OBS fails.
        """
        layer, attention = targets.layer, targets.attention
        result = PrunedLayer({}, targets.layouts)
        check_weights(layer)
        weight_dtype = self.config.weight_dtype
        if codec(weight_dtype).everywhere:
            for name, linear in layer.dense.items():
                if attention is None or name not in attention.linears:
                    self._store(result, name, linear, linear.weight.float(), Codecs.of(weight_dtype))
        if attention is not None:
            self._prune_attention(index, layer, attention, result)
        if layer.mlp is not None:
            self._prune_mlp(index, layer, layer.mlp, result)
        elif self.inputs is not None:
            self.inputs.advance(index, layer.module)
        return result

    def _prune_attention(
        self, index: int, layer: DecoderLayer, attention: Attention, result: PrunedLayer
    ) -> None:
        h_in, squares, h_out = None, None, None
        if self.inputs is not None:
            scored = self.config.scores_heads and attention.dense > 0
            h_in, squares = observe(attention, index, layer, self.inputs, scored)
        result.row_order |= move_groups(attention, group_order(attention, h_in, squares))
        solver = Solver(self.config, h_in, " and ".join(attention.inner))
        for name, linear in attention.inner.items():
            self._solve(result, solver, name, linear)
        if self.inputs is not None:  # q, k and v are pruned now, so o sees other inputs than before
            h_out = observe_out(attention, index, layer, self.inputs)
        solver = Solver(self.config, h_out, attention.out_name)
        self._solve(result, solver, attention.out_name, attention.out)

    def _prune_mlp(self, index: int, layer: DecoderLayer, mlp: Mlp, result: PrunedLayer) -> None:
        dense = result.layouts[next(iter(mlp.inner))].dense
        seen = self._observe(index, layer, mlp, dense)
        order = self._permute(index, mlp, dense, seen)
        result.row_order |= dict.fromkeys(mlp.inner, order)
        solver = Solver(self.config, None if seen is None else seen.h, " and ".join(mlp.inner))
        if seen is not None and seen.tokens:
            self._solve_jointly(mlp, result, solver, seen)
        else:
            for name, linear in mlp.inner.items():
                self._solve(result, solver, name, linear)
        # The inner linears are pruned now, so down sees other inputs than before.
        h, kept = (None, []) if seen is None else self._observe_down(index, layer, mlp, seen)
        if h is not None and self.config.regroup and result.layouts[mlp.down_name].sparse:
            order = self._regroup(mlp, result, h)
            h, kept = h[order][:, order], [x[..., order] for x in kept]
        self._solve(result, Solver(self.config, h, mlp.down_name), mlp.down_name, mlp.down)
        if seen is not None:
            self._advance(index, layer, mlp, seen, kept)

    # -- statistics ------------------------------------------------------------------------------

    def _observe(self, index: int, layer: DecoderLayer, mlp: Mlp, dense: int) -> _Observed | None:
        """Run the layer up to the MLP (up to down, if indices are scored) on all samples."""
        if self.inputs is None:
            return None
        device = mlp.down.weight.device
        scored = self.config.selection == "spensegpt+" and 0 < dense < mlp.intermediate
        h = Hessian(mlp.reader.in_features, device)
        sums = torch.zeros(mlp.intermediate, device=device)
        fitted = self.config.joint and dense < mlp.intermediate
        samples, length = self.inputs.hidden.shape[:2]
        every = stride(samples, length, mlp.reader.in_features)
        tokens: list[torch.Tensor] = []
        unseen: list[torch.Tensor] = []

        def see_inner(x: torch.Tensor) -> None:
            h.add(x)
            if fitted:
                for part, found in zip(split(x.flatten(0, -2), every), (tokens, unseen), strict=True):
                    found.append(part.float().cpu())
            if not scored:
                raise Stop

        def see_down(x: torch.Tensor) -> None:
            sums.add_(squares(x))
            raise Stop

        with (
            recording_outputs(layer.attention_block, self.inputs.keep) as attention,
            watching(mlp.reader, see_inner),
            watching(mlp.down, see_down),
        ):
            self.inputs.feed(index, layer.module)
        if not torch.isfinite(sums).all():
            raise CheckpointError(
                "the calibration inputs of this layer hold NaN or infinity", module=mlp.down_name
            )
        matrix = h.matrix(next(iter(mlp.inner)))
        return _Observed(attention, matrix, tokens, unseen, sums if scored else None)

    def _observe_down(
        self, index: int, layer: DecoderLayer, mlp: Mlp, seen: _Observed
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hessian [I, I] of down's inputs, and these inputs themselves if they are small enough to keep."""
        assert self.inputs is not None
        h = Hessian(mlp.intermediate, mlp.down.weight.device)
        tokens = sum(x.numel() // x.shape[-1] for x in seen.attention)
        keep = tokens * mlp.intermediate * mlp.down.weight.element_size() <= KEEP_BYTES
        kept: list[torch.Tensor] = []

        def see_down(x: torch.Tensor) -> None:
            h.add(x)
            if keep:
                kept.append(x.cpu())
            raise Stop

        with self._replaying_attention(layer, seen), watching(mlp.down, see_down):
            self.inputs.feed(index, layer.module)
        return h.matrix(mlp.down_name), kept

    def _advance(
        self, index: int, layer: DecoderLayer, mlp: Mlp, seen: _Observed, kept: list[torch.Tensor]
    ) -> None:
        """Outputs of the finished layer; attention and, where kept, down's inputs are known already."""
        assert self.inputs is not None
        down, device = mlp.down, mlp.down.weight.device
        with ExitStack() as stack:
            stack.enter_context(self._replaying_attention(layer, seen))
            if kept:  # what lies between the inner linears and down runs on zeros, and is ignored
                for linear in mlp.inner.values():
                    zeros = replaying(linear, kept, lambda x: torch.zeros_like(x, device=device))
                    stack.enter_context(zeros)
                outputs = replaying(
                    down, kept, lambda x: functional.linear(x.to(device), down.weight, down.bias)
                )
                stack.enter_context(outputs)
            self.inputs.advance(index, layer.module)

    def _replaying_attention(self, layer: DecoderLayer, seen: _Observed) -> AbstractContextManager[None]:
        """Attention is done with before the MLP changes, so that its outputs stay right."""
        device = next(layer.attention_block.parameters()).device
        return replaying(layer.attention_block, seen.attention, lambda x: seen.attention.wrap(x.to(device)))

    # -- changes ---------------------------------------------------------------------------------

    @stage("select")
    def _permute(self, index: int, mlp: Mlp, dense: int, seen: _Observed | None) -> torch.Tensor:
        """Move the dense indices to the end in all linears; returns the order [I] on the CPU."""
        scores = None
        if self.costs is not None:
            scores = self.costs[index]
        if seen is not None and seen.down_squares is not None:
            weights = [linear.weight.float() for linear in mlp.inner.values()]
            scores = index_scores(weights, mlp.down.weight.float(), seen.h, seen.down_squares)
        order = permutation(scores, mlp.intermediate, dense)
        self._reorder(mlp, order)
        return order

    def _solve_jointly(self, mlp: Mlp, result: PrunedLayer, solver: Solver, seen: _Observed) -> None:
        """Prune the inner linears, then fit their 2:4 rows to the dense intermediate values of some tokens,
        unless that does not lower the error of the MLP's output on others."""
        if mlp.activation is None:
            raise ValueError(
                f"{mlp.name}: its activation function was not found, so that joint cannot be used"
            )
        originals = {k: v.weight.to(torch.float32, copy=True) for k, v in mlp.inner.items()}
        pruned = {name: solver.prune(w, result.layouts[name]) for name, w in originals.items()}
        rows = slice(result.layouts[mlp.down_name].sparse)
        device = mlp.down.weight.device
        dense = [weight[rows] for weight in originals.values()]
        unfitted = [weight[rows] for weight in pruned.values()]
        biases = [None if x.bias is None else x.bias[rows].float() for x in mlp.inner.values()]
        tokens, unseen = torch.cat(seen.tokens).to(device), torch.cat(seen.unseen).to(device)
        with stage("joint fit"):
            fitted = fit_jointly(mlp.activation, unfitted, dense, biases, tokens, seen.h, self.config.joint)
        if len(unseen):
            down = mlp.down.weight[:, rows].float()
            before, after = output_losses(mlp.activation, [unfitted, fitted], dense, biases, down, unseen)
            if not after < before:
                fitted = unfitted
                result.left_out.append(mlp.name)
        for (name, linear), weight in zip(mlp.inner.items(), fitted, strict=True):
            whole = torch.cat([weight, pruned[name][rows.stop :]])
            self._finish(result, solver, name, linear, originals[name], whole)

    def _regroup(self, mlp: Mlp, result: PrunedLayer, h: torch.Tensor) -> torch.Tensor:
        """Deal the 2:4 columns of down to better groups, the rows of the pruned inner linears with them."""
        cols = result.layouts[mlp.down_name].sparse
        factor = factorize(h, self.config.damping, name=mlp.down_name)
        upper = factor.upper[:, :cols]
        weight = mlp.down.weight[:, :cols].float().masked_fill(factor.dead[:cols], 0.0)  # as OBS does
        order = regroup(weight, upper.t() @ upper, self.config.regroup, self.config.seed).cpu()
        order = torch.cat([order, torch.arange(cols, mlp.intermediate)])
        self._reorder(mlp, order)
        for name in mlp.inner:
            result.tensors[name] = reorder_rows(result.tensors[name], result.layouts[name], order)
            result.row_order[name] = result.row_order[name][order]
        return order

    def _reorder(self, mlp: Mlp, order: torch.Tensor) -> None:
        """Permute the intermediate dimension by ``order [I]`` (on the CPU) in all linears."""
        for linear in mlp.inner.values():
            permute_rows(linear, order)
        permute_columns(mlp.down, order)

    def _solve(self, result: PrunedLayer, solver: Solver, name: str, linear: nn.Linear) -> None:
        original = linear.weight.to(torch.float32, copy=True)
        self._finish(result, solver, name, linear, original, solver.prune(original, result.layouts[name]))

    def _finish(
        self,
        result: PrunedLayer,
        solver: Solver,
        name: str,
        linear: nn.Linear,
        original: torch.Tensor,
        weight: torch.Tensor,
    ) -> None:
        """Store what became of the ``original``, and what that lost."""
        codecs = self.config.codecs
        weight, roundings = solver.round(weight, LinearFormat(result.layouts[name], codecs))
        self._store(result, name, linear, weight, codecs, roundings)
        with stage("output error"):
            result.losses[name] = output_error(linear.weight - original, original, solver.h)
        if solver.raised_damping is not None:
            result.damping[solver.name] = solver.raised_damping

    @stage("round and pack")
    def _store(
        self,
        result: PrunedLayer,
        name: str,
        linear: nn.Linear,
        weight: torch.Tensor,
        codecs: Codecs,
        roundings: Sequence[Rounding] = (),
    ) -> None:
        """Encode ``weight``, once and for all, and put the values that it stands for into ``linear``."""
        layout = result.layouts[name]
        result.tensors[name] = encode(weight, layout, codecs, roundings)
        linear.weight.copy_(decode(result.tensors[name], layout, codecs))


# -- the stored form -----------------------------------------------------------------------------


def encode(
    weight: torch.Tensor, layout: Layout, codecs: Codecs, roundings: Sequence[Rounding] = ()
) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors of ``weight [N, K]`` fp32 by short name, without a bias, on its device.

    ``roundings``: with which it was rounded (:meth:`~vllm_spense.pruning.solvers.solver.Solver.round`).
    """
    return LinearFormat(layout, codecs).encode(weight, roundings=roundings)


def decode(tensors: Mapping[str, torch.Tensor], layout: Layout, codecs: Codecs) -> torch.Tensor:
    """The values ``[N, K]`` fp32 that :func:`encode` stored, zeros written out."""
    return LinearFormat(layout, codecs).decode(tensors)


def reorder_rows(
    tensors: Mapping[str, torch.Tensor], layout: Layout, order: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What :func:`encode` makes of the rows in ``order [N]``, which keeps the rows of S and of D (output
    split) among themselves: rows are encoded one by one, as tensor parallelism needs it, too."""
    parts = {"sparse": order[: layout.sparse], "dense": order[layout.sparse :] - layout.sparse}
    return {name: _take(tensor, parts.get(name.split("_")[0], order)) for name, tensor in tensors.items()}


def _take(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    bits = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # not every build indexes FP8
    return bits[rows.to(tensor.device)].view(tensor.dtype)
