"""What a run tells its user about its own quality: one kind of warning, and when there is one.

Errors stop a run; a warning says that it goes on but that the result may be worse than it could be.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vllm_spense.models.parts import DecoderLayer
    from vllm_spense.pruning.config import PruneConfig
    from vllm_spense.text import Calibration

SMALL_MODEL = 1_000_000_000
"""Parameters below which one-shot 2:4 costs visible quality; docs/accuracy.md has a model of 0.13 billion."""
NOTICEABLE_SPARSITY = 0.25
"""Share of zeros in the MLPs from which a small model is warned about; that of dense ratio 0.5."""


class PruneWarning(UserWarning):
    """The run goes on, but its result may be worse than it could be; an error under ``strict``."""


def warn(text: str) -> None:
    """Warn with one line of ``text``."""
    warnings.warn(text, PruneWarning, stacklevel=2)


@contextmanager
def warnings_as_errors(strict: bool) -> Iterator[None]:
    """While open and ``strict``, every :class:`PruneWarning` is a ``ValueError`` with its text."""
    if not strict:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", PruneWarning)
        try:
            yield
        except PruneWarning as warning:
            raise ValueError(f"{warning} (an error because of --strict)") from None


def warn_about_size(parameters: int, config: PruneConfig) -> None:
    """Warn where the model has few ``parameters`` for the share of zeros that ``config`` asks for."""
    sparsity = (1 - config.dense_ratio) / 2
    if parameters < SMALL_MODEL and sparsity >= NOTICEABLE_SPARSITY:
        warn(
            f"{parameters / 1e6:.3g} million parameters are few for {sparsity:.0%} zeros in the MLPs: "
            "expect visibly worse text; larger models and a higher --dense-ratio lose less"
        )


def warn_about_experts(layers: Sequence[DecoderLayer], stored: torch.dtype) -> None:
    """One warning that says how many routed experts stay dense, and their bytes as ``stored``."""
    blocks = [layer.experts for layer in layers if layer.experts is not None]
    if not blocks:
        return
    parameters = [p for block in blocks for p in block.parameters()]
    size = sum(p.numel() for p in parameters) * stored.itemsize
    experts = sum(len(next(block.parameters())) for block in blocks)  # stacked along dimension 0
    warn(
        f"{experts} routed experts in {len(blocks)} layers ({size / 1e9:.3g} GB) are copied as they are: "
        "dense and not in FP8; only shared experts and ordinary MLPs are pruned"
    )


def warn_about_overlap(text: Calibration) -> None:
    """Warn where the windows are longer together than the text."""
    if text.tokens is not None and text.windows.numel() > text.tokens:
        count, seq_len = text.windows.shape
        warn(
            f"{count} windows of {seq_len} tokens out of a text of {text.tokens} tokens overlap heavily; "
            "a longer calibration text prunes better"
        )


def warn_about_calibration(tokens: int, layers: Sequence[DecoderLayer], config: PruneConfig) -> None:
    """Warn where the Hessian of an MLP has more columns than there are calibration ``tokens``."""
    if config.method != "obs" or config.dense_ratio == 1:
        return
    mlps = [layer.mlp for layer in layers if layer.mlp is not None]
    columns = {name: linear.in_features for m in mlps for name, linear in m.inner.items()}
    columns |= {m.down_name: m.down.in_features for m in mlps}
    name = max(columns, key=columns.__getitem__)
    if tokens < columns[name]:
        warn(
            f"{tokens} calibration tokens are fewer than the {columns[name]} inputs of {name}: its Hessian "
            "is singular and the solver fits these tokens alone; raise --num-samples or --seq-len"
        )
