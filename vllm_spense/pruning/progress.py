"""How far a pruning run is, for whoever waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vllm_spense.pruning.choice.pilot import Verdict
from vllm_spense.pruning.resume import LayerRecord


@dataclass(frozen=True)
class PruneProgress:
    """State after one layer: 1-based ``layer`` of ``layers``, losses per MLP module, seconds.

    ``restored``: the layer was finished by an earlier run and only the hidden states were computed.
    ``stage``: nothing is pruned yet in ``text``, where a long text is read (``layer`` are characters so far,
    ``layers`` is 0), in ``check``, which compares the layers with the model's own forward, in
    ``gradient``, where each layer is counted forward and backward, and in ``pilot``, which passes over the
    layers twice and ends with a ``verdict``.
    """

    layer: int
    layers: int
    losses: dict[str, float]
    elapsed: float
    remaining: float
    restored: bool = False
    stage: Literal["text", "check", "gradient", "pilot", "layers"] = "layers"
    verdict: Verdict | None = None


class Clock:
    """Started with the run; tells ``progress``, if there is one, what the run has done and when."""

    def __init__(self, progress: Callable[[PruneProgress], None] | None = None) -> None:
        self._progress = progress
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._started

    def text(self, characters: int) -> None:
        """So many characters of the text are read."""
        self._tell(characters, 0, 0.0, stage="text")

    def steps(self, stage: Literal["check", "gradient", "pilot"]) -> Callable[[int, int], None]:
        """A callback that takes (steps done, steps in all) of a stage before the layers, which begins now."""
        began = time.monotonic()

        def step(done: int, steps: int) -> None:
            remaining = (time.monotonic() - began) / done * (steps - done)
            self._tell(done, steps, remaining, stage=stage)

        return step

    def verdict(self, layers: int, verdict: Verdict) -> None:
        """The pilot is done."""
        self._tell(layers, layers, 0.0, stage="pilot", verdict=verdict)

    def layer(self, index: int, layers: int, records: list[LayerRecord], restored: float | None) -> None:
        """Layer ``index`` is done; ``records`` are those of all pruned ones. ``restored``: seconds since the
        first one was restored, for one that an earlier run had pruned."""
        mine = [record.seconds for record in records]
        remaining = sum(mine) / len(mine) * (layers - len(records))
        if restored is not None:  # what pruning took is on record; restoring goes on as it went so far
            remaining += restored / (index + 1) * (len(records) - index - 1)
        losses = records[index].losses
        self._tell(index + 1, layers, remaining, losses=losses, restored=restored is not None)

    def _tell(
        self,
        done: int,
        steps: int,
        remaining: float,
        *,
        losses: dict[str, float] | None = None,
        restored: bool = False,
        stage: Literal["text", "check", "gradient", "pilot", "layers"] = "layers",
        verdict: Verdict | None = None,
    ) -> None:
        if self._progress is not None:
            event = PruneProgress(
                done, steps, losses or {}, self.seconds, remaining, restored, stage, verdict
            )
            self._progress(event)
