"""How the dense indices are shared out: measured on crude prunings that run beside the dense model.

Fisher costs (:mod:`.sensitivity`) rank the indices of one layer, but not layers: they take the errors of
different outputs and tokens as independent and the loss as quadratic, and a massive activation rules all sums
in which it stands. So each layer's 2:4 is tried by itself, and what it costs is the KL divergence of the
model's answers from the dense model's. The budget that follows has to hold its own against the same dense
ratio everywhere, and the ranks of indices their own against SpenseGPT+'s, on windows that neither was made
from.

Crude is Wanda's choice (arXiv 2306.11695): the two least ``|w| · ‖x‖`` of four go, nothing makes up for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_spense.format.sparse24 import magnitude_mask
from vllm_spense.models.parts import Mlp, mlp_shapes
from vllm_spense.network import language_head, logits_at, scored_positions
from vllm_spense.pruning.activations import LayerInputs, watching
from vllm_spense.pruning.choice.allocation import dense_counts, legal_counts
from vllm_spense.pruning.choice.selection import DenseChoice, permutation
from vllm_spense.pruning.choice.sensitivity import IndexCosts
from vllm_spense.pruning.config import GRADIENT_SELECTIONS, PruneConfig, Selection
from vllm_spense.pruning.solvers.hessian import squares
from vllm_spense.pruning.source import SourceModel

PILOT_TOKENS = 128
"""A window's part that is measured: many short windows, for few long ones mislead (docs/accuracy.md)."""
PILOT_EVERY, PILOT_LOGITS = 2, 1 << 24
"""Layers are compared at every second token, at fewer where these have more logits in a window."""
MARGIN = 0.05
"""Candidates so close to the best count as equal: crude trials of a few windows differ by a few percent by
chance."""
FALL = 1.7
"""Power of the 2:4 share in which a layer's divergence grows: 1.6 to 2 in both models of docs/accuracy.md."""

Variant = Sequence[torch.Tensor | None]
"""Per layer which indices are 2:4 (positions, a multiple of 8), None where all of them stay dense."""
Embed = Callable[[torch.Tensor], LayerInputs]
Step = Callable[[int, int], None]


@dataclass(frozen=True)
class Verdict:
    """What was chosen, and by candidate the KL divergence from the dense model, nats per token."""

    chosen: str
    divergences: dict[str, float]

    def record(self) -> dict[str, Any]:
        """For provenance; :meth:`read` is the way back."""
        values = {k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in self.divergences.items()}
        return {"chosen": self.chosen, "divergences": values}

    @classmethod
    def read(cls, record: Any) -> Verdict | None:
        """None for None."""
        if record is None:
            return None
        values = {k: math.inf if v is None else v for k, v in record["divergences"].items()}
        return cls(record["chosen"], values)

    def __str__(self) -> str:
        others = ", ".join(f"{k} {v:.4f}" for k, v in self.divergences.items() if k != self.chosen)
        return f"{self.chosen}: KL {self.divergences[self.chosen]:.4f} in a crude trial, against {others}"


def choose(
    source: SourceModel,
    embed: Embed,
    windows: torch.Tensor,
    costs: IndexCosts,
    config: PruneConfig,
    progress: Step | None = None,
) -> tuple[DenseChoice, Verdict]:
    """The dense indices of the whole model, from its layers' measured divergences; and what they beat.

    ``windows [samples, seq]``: the last ``config.pilot_samples`` are measured, as many in front of them
    judge. ``embed`` puts windows in front of the first layer.
    ``progress`` gets (steps done, steps in all).
    """
    count = config.pilot_samples
    measured = windows[-count:, :PILOT_TOKENS]
    judges = windows[-2 * count : -count, :PILOT_TOKENS] if len(windows) >= 2 * count else measured
    layers = len(source.layers)
    pilot = Pilot(source, None if progress is None else lambda done: progress(done, 2 * layers))
    halves = [cheaper_half(cost, config.alignment) for cost in costs.fisher]
    found = pilot.layers(embed(measured), measured, halves)
    # What overflows is as dear as the dearest that does not.
    dearest = max((value for value in found if value is not None and math.isfinite(value)), default=1.0)
    falls = [
        torch.zeros(len(cost))
        if half is None or value is None
        else falling(min(value, dearest), len(half), len(cost))
        for value, half, cost in zip(found, halves, costs.fisher, strict=True)
    ]
    shapes = mlp_shapes(source.layers)
    counts = {"uniform": dense_counts(falls, shapes, config.model_copy(update={"allocation": "uniform"}))}
    counts[config.allocation] = dense_counts(falls, shapes, config)
    rivals: list[Selection] = ["spensegpt+"] if config.selection in GRADIENT_SELECTIONS else []
    scores = {selection: costs.ranking(selection) for selection in [*rivals, config.selection]}
    # What was asked for stands first, and wins among equals.
    names = {f"{a}, {s}": (a, s) for a in reversed(counts) for s in reversed(scores)}
    trials = [_variant(counts[a], scores[s]) for a, s in names.values()]
    values = dict(zip(names, pilot.divergences(embed(judges), judges, trials), strict=True))
    least = min(values.values())
    first = next(name for name, value in values.items() if value * (1 - MARGIN) <= least)
    verdict = Verdict(first, values)
    allocation, selection = names[verdict.chosen]
    ranks = scores[selection] if config.selection in GRADIENT_SELECTIONS else None
    return DenseChoice(counts[allocation], ranks), verdict


def falling(divergence: float, sparse: int, intermediate: int) -> torch.Tensor:
    """Cost [I] of each index, dearest first, in a layer whose ``sparse`` cheapest ones cost ``divergence``.

    With a share s of the indices in 2:4 a layer costs a constant times s to the power of :data:`FALL`.
    """
    shares = torch.arange(intermediate, -1, -1, dtype=torch.float64) / sparse
    left = max(divergence, 1e-12) * shares**FALL
    return left[:-1] - left[1:]


def cheaper_half(cost: torch.Tensor, alignment: int) -> torch.Tensor | None:
    """The cheaper half of the indices, as near to half as may be; None where all have to stay dense."""
    counts = legal_counts(len(cost), alignment)[:-1]
    if not counts:
        return None
    dense = min(counts, key=lambda count: abs(2 * count - len(cost)))
    return permutation(cost, len(cost), dense)[: len(cost) - dense]


def _variant(counts: list[int], scores: list[torch.Tensor]) -> Variant:
    pairs = zip(counts, scores, strict=True)
    return [permutation(s, len(s), n)[: len(s) - n] if n < len(s) else None for n, s in pairs]


class Pilot:
    """Passes over the layers, one in memory at a time."""

    def __init__(self, source: SourceModel, progress: Callable[[int], None] | None) -> None:
        self.source = source
        self._progress = progress
        self._done = 0

    def layers(
        self, dense: LayerInputs, windows: torch.Tensor, halves: Sequence[torch.Tensor | None]
    ) -> list[float | None]:
        """What each layer diverges by with these of its indices in 2:4, all others dense; None for None."""
        places = [i for i, half in enumerate(halves) if half is not None]
        alone: list[Variant] = [[half if i == at else None for i, half in enumerate(halves)] for at in places]
        found = iter(self.divergences(dense, windows, alone, PILOT_EVERY))
        return [None if half is None else next(found) for half in halves]

    @torch.no_grad()
    def divergences(
        self, dense: LayerInputs, windows: torch.Tensor, variants: Sequence[Variant], every: int = 1
    ) -> list[float]:
        """Mean KL(dense ‖ variant) of the next-token distributions; ``dense`` holds ``windows`` embedded.

        At each ``every``-th token, or at fewer. Infinite for a variant whose states leave their dtype.
        """
        streams: dict[int, LayerInputs] = {}
        for index, layer in enumerate(self.source.layers):
            here = {v: s for v, variant in enumerate(variants) if (s := variant[index]) is not None}
            streams |= {v: dense.fork() for v in here if v not in streams}
            with self.source.resident(layer.module):
                energies = _Energies(layer.mlp)
                with energies.watching():
                    dense.advance(index, layer.module)
                for v, stream in streams.items():
                    with energies.pruned(here.get(v)):
                        stream.advance(index, layer.module, check=False)
            self._done += 1
            if self._progress is not None:
                self._progress(self._done)
        streamed = [streams.get(v, dense) for v in range(len(variants))]
        return self._compared(dense, windows, streamed, every)

    def _compared(
        self, dense: LayerInputs, windows: torch.Tensor, streams: Sequence[LayerInputs], every: int
    ) -> list[float]:
        source, sums = self.source, [0.0] * len(streams)
        with source.resident(*source.embedding(), language_head(source.network)):
            positions = scored_positions(source.network, windows.shape[1], PILOT_LOGITS, every)

            def answers(stream: LayerInputs, window: int) -> torch.Tensor:
                with stream.standing_in(source.network, window):
                    logits = logits_at(source.network, windows[window].to(source.device), positions)
                return logits.log_softmax(-1)

            for window in range(len(windows)):
                expected = answers(dense, window)
                likely = expected.exp()
                for v, stream in enumerate(streams):
                    apart = (expected - answers(stream, window)).mul_(likely)
                    sums[v] += float(apart.sum(-1).mean()) / len(windows)
        return [value if math.isfinite(value) else math.inf for value in sums]


class _Energies:
    """Sums of squares in front of an MLP's linears, and crude 2:4 by them."""

    def __init__(self, mlp: Mlp | None) -> None:
        self.mlp = mlp
        if mlp is not None:
            device = mlp.down.weight.device
            self.entering = torch.zeros(mlp.reader.in_features, device=device)
            self.inside = torch.zeros(mlp.intermediate, device=device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, the MLP's inputs are added up."""
        if self.mlp is None:
            yield
            return

        def see_entering(x: torch.Tensor) -> None:
            self.entering += squares(x)

        def see_inside(x: torch.Tensor) -> None:
            self.inside += squares(x)

        with watching(self.mlp.reader, see_entering), watching(self.mlp.down, see_inside):
            yield

    @contextmanager
    def pruned(self, sparse: torch.Tensor | None) -> Iterator[None]:
        """While open, the indices ``sparse`` are 2:4 in all linears of the MLP."""
        if self.mlp is None or sparse is None:
            yield
            return
        linears: list[nn.Linear] = [*self.mlp.inner.values(), self.mlp.down]
        originals = [linear.weight.clone() for linear in linears]
        at = sparse.to(self.entering.device)
        try:
            for linear in linears[:-1]:
                linear.weight[at] = _wanda(linear.weight[at], self.entering)
            linears[-1].weight[:, at] = _wanda(linears[-1].weight[:, at], self.inside[at])
            yield
        finally:
            for linear, original in zip(linears, originals, strict=True):
                linear.weight.copy_(original)


def _wanda(weight: torch.Tensor, energies: torch.Tensor) -> torch.Tensor:
    return weight.masked_fill(~magnitude_mask(weight.float().square() * energies), 0.0)
