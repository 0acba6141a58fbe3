"""How far a model is from its dense reference, token by token: KL divergence and top-1 agreement.

Perplexity only looks at the probability of the one token that came; the divergence looks at all of them, so
it shows damage earlier and with less noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Agreement:
    """Means over ``tokens`` scored positions; ``nll``, ``reference_nll`` and ``kl`` in nats.

    ``kl``: KL(reference ‖ model) of the next-token distributions. ``top1``: share of positions where both
    find the same token the most probable.
    """

    nll: float
    reference_nll: float
    kl: float
    top1: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def reference_perplexity(self) -> float:
        return math.exp(self.reference_nll)


@torch.inference_mode()
def agreement(
    model: nn.Module,
    reference: nn.Module,
    windows: torch.Tensor,
    progress: Callable[[int, int], None] | None = None,
    *,
    context: int = 1,
) -> Agreement:
    """Compare ``model`` with ``reference`` on ``windows [num, seq_len]`` (int64, on the models' device).

    The same positions as :func:`~vllm_spense.evaluation.perplexity.mean_nll` scores, and one pass of each
    model: both run window by window, because the logits of a whole text (16384 × 49152) fill 3 GB.
    ``progress`` gets (windows done, windows in all). Raises ``ValueError`` for models with different
    vocabularies.
    """
    nll = reference_nll = kl = 0.0
    same = 0
    for i, window in enumerate(windows):
        p, q = (_log_probabilities(m, window, context) for m in (reference, model))
        if p.shape != q.shape:
            raise ValueError(
                f"the model has {q.shape[-1]} output tokens, its reference {p.shape[-1]}: distributions "
                "over different vocabularies cannot be compared"
            )
        targets = window[context:, None]
        nll -= float(q.gather(-1, targets).sum(dtype=torch.float64))
        reference_nll -= float(p.gather(-1, targets).sum(dtype=torch.float64))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        if progress is not None:
            progress(i + 1, windows.shape[0])
    tokens = windows.shape[0] * (windows.shape[1] - context)
    return Agreement(nll / tokens, reference_nll / tokens, kl / tokens, same / tokens, tokens)


def _log_probabilities(model: nn.Module, window: torch.Tensor, context: int) -> torch.Tensor:
    """Log-probabilities ``[seq_len - context, vocabulary]`` fp32 of the scored tokens of ``window``."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, context - 1 : -1]
    return logits.float().log_softmax(-1)
