"""The start-up log: what one rank loaded, what it saves, what runs it, and what fell back and why.

vLLM tells a quantization config when a layer is created and when it is loaded, never that the model is
complete. So the layers are counted: the block is logged when the last one that was created is loaded. What
vLLM never creates (other pipeline stages) or throws away before loading is not waited for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

import torch

from vllm_spense.format.linear import LinearFormat
from vllm_spense.models.families import in_attention
from vllm_spense.serving import compat

if TYPE_CHECKING:
    from vllm_spense.ops.linear.spec import LinearSpec

logger = compat.init_logger("vllm.spense")  # only loggers below "vllm" show INFO


@dataclass(frozen=True)
class LayerFacts:
    """One loaded layer on this rank; ``fallback`` says why ``backend`` is not the device's preferred one."""

    prefix: str
    spec: LinearSpec
    backend: str
    fallback: str | None
    memory_bytes: int


class LoadSummary:
    """The layers of one quantization config in this process, held weakly.

    A reload brings the same layers to the same back ends, so nothing is logged again. A copy, and what
    arrives in another process, starts empty.
    """

    def __init__(self) -> None:
        self._pending: WeakSet[torch.nn.Module] = WeakSet()
        self._loaded: WeakKeyDictionary[torch.nn.Module, LayerFacts] = WeakKeyDictionary()
        self._unquantized: WeakSet[torch.nn.Module] = WeakSet()

    def __reduce__(self) -> tuple[type[LoadSummary], tuple[()]]:
        return LoadSummary, ()

    def skip(self, layer: torch.nn.Module) -> None:
        """A linear layer of the model that stays unquantized."""
        self._unquantized.add(layer)

    def expect(self, layer: torch.nn.Module) -> None:
        """A Spense layer was created and will be loaded."""
        self._pending.add(layer)

    def add(self, layer: torch.nn.Module, facts: LayerFacts) -> None:
        """A Spense layer was loaded; the last one of the model logs the block."""
        logger.debug("%s runs on %s", facts.prefix, facts.backend)
        self._loaded[layer] = facts
        if layer in self._pending:
            self._pending.discard(layer)
            if not self._pending:
                logger.info("%s", describe(list(self._loaded.values()), len(self._unquantized)))


class SparsitySummary:
    """One line when the last of a model's layers that skip zeros is loaded; they are held weakly.

    ``what`` they are, in the plural; ``density``: what the checkpoint says of the layers that it measured.
    """

    def __init__(self, what: str, density: Iterable[float] = ()) -> None:
        self.what = what
        self.density = tuple(density)
        self._pending: WeakSet[torch.nn.Module] = WeakSet()
        self._backends: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[SparsitySummary], tuple[str, tuple[float, ...]]]:
        return SparsitySummary, (self.what, self.density)

    def expect(self, layer: torch.nn.Module) -> None:
        """A layer was created and will be loaded."""
        self._pending.add(layer)

    def add(self, layer: torch.nn.Module, prefix: str, backend: str) -> None:
        """A layer was loaded; the last one of the model logs the line, and a reload nothing."""
        logger.debug("%s runs on %s", prefix, backend)
        self._backends[layer] = backend
        if layer in self._pending:
            self._pending.discard(layer)
            if not self._pending:
                logger.info("%s", self.describe())

    def describe(self) -> str:
        """How many layers there are, what runs them, and how dense their input is where that is known."""
        backends = Counter(self._backends.values())
        named = ", ".join(f"{name} {count}" for name, count in backends.most_common())
        line = f"TwELL: {len(self._backends)} activation-sparse {self.what}; back ends: {named}"
        if not self.density:
            return f"{line}; density: not in the checkpoint"
        low, middle, high = min(self.density), median(self.density), max(self.density)
        return f"{line}; density by the checkpoint: min {low:.1%}, median {middle:.1%}, max {high:.1%}"


def describe(layers: Sequence[LayerFacts], unquantized: int) -> str:
    """The log block, one fact per line."""
    from vllm_spense.ops.linear.cpu import CpuBackend, describe_cpu  # not where vLLM registers us

    specs = [facts.spec for facts in layers]
    hybrid = [facts for facts in layers if facts.spec.hybrid]
    mlp = [facts.spec for facts in hybrid if not in_attention(facts.prefix)]
    dtype = " and ".join(sorted({spec.codecs.title for spec in specs}))
    stored = sum(spec.stored.nbytes() for spec in specs)
    dense = sum(LinearFormat(spec.stored.layout.without_sparsity, spec.codecs).nbytes() for spec in specs)
    memory = sum(facts.memory_bytes for facts in layers)
    backends = Counter(facts.backend for facts in layers)
    reasons = Counter((facts.backend, facts.fallback) for facts in layers if facts.fallback)
    lines = [
        f"Spense: {len(layers)} linear layers: {len(hybrid)} hybrid (2:4 + dense), "
        f"{len(layers) - len(hybrid)} all-dense {dtype}; {unquantized} more left unquantized",
        f"weights on this rank: {mib(stored)}, as dense {dtype} {mib(dense)} "
        f"({1 - stored / dense:.1%} saved); {mib(memory)} in memory",
        "back ends: " + ", ".join(f"{name} {count}" for name, count in backends.most_common()),
    ]
    if mlp:
        lines.insert(1, f"mean dense ratio of the hybrid MLP layers: {dense_ratio(mlp):.3f}")
    if CpuBackend.name in backends:
        lines.append(f"CPU kernels: {describe_cpu()}")
    lines += [f"fell back to {name}: {count}, {why}" for (name, why), count in reasons.most_common()]
    return "\n  ".join(lines)


def dense_ratio(specs: Sequence[LinearSpec]) -> float:
    """Share of the weights that lie in the dense region."""
    dense = sum(rows * columns for rows, columns in (spec.dense_shape for spec in specs))
    return dense / sum(spec.out_features * spec.in_features for spec in specs)


def mib(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
