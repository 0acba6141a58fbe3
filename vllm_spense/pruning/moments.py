"""All second moments that a solver may ask for of one linear's inputs, and the dense model's beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_spense.models.parts import DecoderLayer
from vllm_spense.pruning.activations import LayerInputs, watching
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.hessian import Hessian
from vllm_spense.pruning.solve import Solver


@dataclass(frozen=True)
class Moments:
    """Of some inputs, for a :class:`~.solve.Solver`, which says what they are; empty without calibration."""

    h: torch.Tensor | None = None
    halves: tuple[torch.Tensor, torch.Tensor] | None = None
    cross: torch.Tensor | None = None

    def take(self, order: torch.Tensor) -> Moments:
        """Of the same inputs in another ``order [K]``."""

        def take(matrix: torch.Tensor | None) -> torch.Tensor | None:
            return None if matrix is None else matrix[order][:, order]

        halves = None
        if self.halves is not None:
            fit, held_out = self.halves
            halves = fit[order][:, order], held_out[order][:, order]
        return Moments(take(self.h), halves, take(self.cross))

    def solver(self, config: PruneConfig, name: str) -> Solver:
        return Solver(config, self.h, name, halves=self.halves, cross=self.cross)


class InputStatistics:
    """Sums up inputs [..., K] sample by sample. ``originals``: the inputs x* [..., K] of the dense model for
    the same samples, for an asymmetric objective."""

    def __init__(
        self,
        features: int,
        device: torch.device,
        config: PruneConfig,
        originals: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._share = config.asymmetric
        self._hessian = Hessian(features, device, hold_out=config.search_damping)
        self._originals = None if originals is None else iter(originals)
        self._cross = None if originals is None else torch.zeros(features, features, device=device)
        self._tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """The inputs of the next sample."""
        self._hessian.add(x)
        if self._originals is not None and self._cross is not None:
            flat = x.reshape(-1, x.shape[-1]).float()
            original = next(self._originals).to(flat.device).reshape(flat.shape).float()
            self._cross.addmm_(original.t(), flat)
            self._tokens += len(flat)

    def moments(self, module: str) -> Moments:
        """Raises :class:`~vllm_spense.format.CheckpointError` naming ``module`` for NaN or infinity."""
        h = self._hessian.matrix(module)
        cross = None
        if self._cross is not None:
            cross = h.lerp(self._cross * (2.0 / self._tokens), self._share)
        return Moments(h, self._hessian.halves(), cross)


class DenseStream:
    """The dense model's hidden states from layer to layer, beside those of the pruned one.

    ``reader`` and ``down``: the inputs of these linears of the present layer, one tensor per sample, where
    the hidden states are kept: tokens · (hidden + intermediate) numbers of the compute dtype.
    """

    def __init__(self, inputs: LayerInputs) -> None:
        self._inputs = inputs.fork()
        self.reader: list[torch.Tensor] = []
        self.down: list[torch.Tensor] = []

    def advance(self, index: int, layer: DecoderLayer) -> None:
        """Through ``layer``, which still has its original weights."""
        self.reader, self.down = [], []
        if layer.mlp is None:
            self._inputs.advance(index, layer.module)
            return
        with (
            watching(layer.mlp.reader, lambda x: self.reader.append(self._inputs.keep(x))),
            watching(layer.mlp.down, lambda x: self.down.append(self._inputs.keep(x))),
        ):
            self._inputs.advance(index, layer.module)

    def permute(self, order: torch.Tensor) -> None:
        """As the intermediate indices of the layer were."""
        for x in self.down:
            x.copy_(x[..., order])
