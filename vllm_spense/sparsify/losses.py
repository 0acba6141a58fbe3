"""What skipping costs: divergence from the model itself without it, which is far less noisy than a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div

from vllm_spense.evaluation.thresholds import thresholds_applied
from vllm_spense.network import logits_at, scored_positions

LOGITS = 1 << 24
"""Logits of a window that are compared; fewer tokens of it where the vocabulary is large."""
LEAST = 1e-9
"""Nats: what costs nothing measurable still has a price."""


class Losses:
    """KL(model ‖ model that skips) on ``windows [count, seq_len]``, nats per token."""

    def __init__(self, model: Any, windows: torch.Tensor, directory: Path) -> None:
        self._model, self._windows, self._directory = model, windows, directory
        self._positions = scored_positions(model, windows.shape[1], LOGITS)
        self._whole = [self._log_probabilities(window) for window in windows]

    @torch.inference_mode()
    def of(self, thresholds: Mapping[str, float]) -> float:
        """Mean over the tokens, with ``thresholds`` by module."""
        with thresholds_applied(self._model, thresholds, self._directory):
            parts = [
                kl_div(self._log_probabilities(window), whole, reduction="batchmean", log_target=True)
                for window, whole in zip(self._windows, self._whole, strict=True)
            ]
        return max(LEAST, float(torch.stack(parts).mean()))

    def alone(
        self, thresholds: Mapping[str, float], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, float]:
        """By module: the loss if it alone skips; ``progress`` gets (modules done, modules in all)."""
        found = {}
        for name, threshold in thresholds.items():
            found[name] = self.of({name: threshold})
            progress(len(found), len(thresholds))
        return found

    @torch.inference_mode()
    def _log_probabilities(self, window: torch.Tensor) -> torch.Tensor:
        return logits_at(self._model, window, self._positions).log_softmax(-1)
