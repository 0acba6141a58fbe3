"""Which of transformers' classes a config.json asks for, and whether it predicts tokens."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch


def auto_class(config: Any) -> Any:
    """The automatic class that builds the first of ``config.architectures``.

    It is the one for causal language models, multimodal wrappers, sequence classifiers or models without a
    head, whichever knows that name for this kind of configuration; else the one for causal language models.
    A name alone never decides what is built: the class belongs to ``config``'s own type.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    wanted = next(iter(config.architectures or ()), None)
    for auto in (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
        AutoModel,
    ):
        known = auto._model_mapping.get(type(config), ())
        classes = known if isinstance(known, (list, tuple)) else (known,)
        if any(found.__name__ == wanted for found in classes):
            return auto
    return AutoModelForCausalLM


def language_head(network: Any) -> Any:
    """The module that turns hidden states into logits; ``ValueError`` for a network without one."""
    head = network.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(network).__name__} has no language-model head, so it predicts no next tokens: it can be "
            "pruned with --preset spensegpt+, but neither guided by a loss nor measured by perplexity"
        )
    return head


def scored_positions(network: Any, length: int, limit: int, every: int = 1) -> torch.Tensor:
    """Positions of a window, each ``every``-th or fewer: as many as have ``limit`` logits together.

    All of them for most vocabularies; with 262,144 tokens the head is dearer than all layers.
    """
    vocabulary = language_head(network).get_parameter("weight").shape[0]
    return torch.arange(0, length, max(every, math.ceil(length * vocabulary / limit)))


def logits_at(network: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [positions, vocabulary] fp32 of one window ``tokens [seq]``; others are not computed."""
    positions = positions.to(tokens.device)
    if "logits_to_keep" in inspect.signature(network.forward).parameters:
        return network(input_ids=tokens[None], use_cache=False, logits_to_keep=positions).logits[0].float()
    return network(input_ids=tokens[None], use_cache=False).logits[0, positions].float()
