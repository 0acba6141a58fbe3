"""How much of an MLP each token uses: the share of hidden values that are not zero, measured on a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_spense.evaluation.hidden import hidden_values
from vllm_spense.evaluation.loading import load_model, load_tokenizer
from vllm_spense.evaluation.perplexity import text_windows
from vllm_spense.models.parts import decoder
from vllm_spense.sources import check_windows, load_config, positions
from vllm_spense.text import Beginning, Bos, Given

SEQ_LEN = 512


@dataclass(frozen=True)
class LayerDensity:
    """One MLP: how many ``neurons`` it has, what share of them a token uses on average (``density``), and how
    many no token used (``dead``)."""

    neurons: int
    density: float
    dead: int


@dataclass(frozen=True)
class Density:
    """By the name of each MLP's last linear, over ``tokens``."""

    layers: dict[str, LayerDensity]
    tokens: int

    @property
    def mean(self) -> float:
        """Share of all hidden values that are not zero."""
        neurons = sum(layer.neurons for layer in self.layers.values())
        return sum(layer.density * layer.neurons for layer in self.layers.values()) / neurons

    @property
    def dead(self) -> float:
        """Share of all neurons that no token used."""
        neurons = sum(layer.neurons for layer in self.layers.values())
        return sum(layer.dead for layer in self.layers.values()) / neurons


def text_density(
    directory: str | Path,
    text: Given,
    *,
    seq_len: int | None = None,
    max_tokens: int = 16384,
    bos: Bos = "auto",
    text_column: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Density:
    """Density of a dense, Spense or thresholded ``directory`` on the beginning of a text.

    Thresholds of the checkpoint are applied first. Options and errors are those of
    :func:`~vllm_spense.evaluation.evaluate`, but windows are shorter for models with few positions.
    """
    tokenizer = load_tokenizer(directory)
    if seq_len is None:
        seq_len = min(SEQ_LEN, positions(load_config(Path(directory), borrow=True)) or SEQ_LEN)
    windows = text_windows(tokenizer, Beginning(text, tokenizer, text_column), seq_len, max_tokens, bos)
    check_windows(windows, Path(directory))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return measure_density(load_model(directory, device=device), windows.to(device), progress)


@torch.inference_mode()
def measure_density(
    model: nn.Module, windows: torch.Tensor, progress: Callable[[int, int], None] | None = None
) -> Density:
    """Density of ``model`` on ``windows [num, seq_len]`` (int64, on its device), every token counted.

    ``progress`` gets (windows done, windows in all).
    """
    used: dict[str, torch.Tensor] = {}

    def see(name: str, hidden: torch.Tensor) -> None:
        counts = (hidden != 0).flatten(0, -2).sum(0)
        used[name] = used[name] + counts if name in used else counts

    layers: Any = decoder(model)  # the head costs more than small models' layers
    with hidden_values(model, see):
        for i, window in enumerate(windows):
            layers(input_ids=window[None], use_cache=False)
            if progress is not None:
                progress(i + 1, len(windows))
    tokens = windows.numel()
    found = {
        name: LayerDensity(len(counts), float(counts.double().mean()) / tokens, int((counts == 0).sum()))
        for name, counts in used.items()
    }
    return Density(found, tokens)
