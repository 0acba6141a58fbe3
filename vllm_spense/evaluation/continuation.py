"""Which of four spans continues the text? A multiple-choice task made from any held-out text.

It works like HellaSwag (arXiv 1905.07830): each choice is scored by its log-likelihood behind the context.
The three wrong spans follow, elsewhere in the text, the same token that ends the context, one of them in the
same document if there is such a place. So neither grammar nor the topic alone gives the answer away.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vllm_spense.text import Beginning, Bos, opening

CHOICES = 4
CONTEXT = 32
SPAN = 12
BATCH = 8

Place = tuple[int, int]
"""Document and first token of a span."""


@dataclass(frozen=True)
class Items:
    """``contexts [n, context]``, ``spans [n, 4, span]`` (token ids) and ``answers [n]`` (0 … 3), int64."""

    contexts: torch.Tensor
    spans: torch.Tensor
    answers: torch.Tensor


@dataclass(frozen=True)
class Continuation:
    """``accuracy``: share of ``items`` answered rightly; chance is 0.25."""

    accuracy: float
    items: int

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy: how much another draw of the items would move it."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.items)


def continuation(
    model: nn.Module,
    items: Items,
    progress: Callable[[int, int], None] | None = None,
) -> Continuation:
    """Share of items whose right span is the most likely one; ``progress`` gets (batches done, batches)."""
    scores = span_scores(model, items, progress)
    right = scores.argmax(-1) == items.answers.to(scores.device)
    return Continuation(float(right.double().mean()), len(right))


def text_items(
    tokenizer: Any, text: Beginning, *, count: int = 850, seed: int = 0, bos: Bos = "auto"
) -> Items:
    """Items of a text, one per document: what blank lines separate, or a chat.

    Every context starts with the model's opening (:func:`~vllm_spense.text.bos.opening`).

    Raises ``ValueError`` when the text has no documents that are long enough.
    """
    start = list(opening(tokenizer, bos))
    documents = text.documents()
    ids = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []
    ids = [row[len(start) :] if row[: len(start)] == start else row for row in ids]  # a chat's own
    try:
        items = make_items(ids, count=count, seed=seed)
    except ValueError as error:
        raise ValueError(f"{text.name}: {error}") from None
    front = torch.tensor(start, dtype=torch.long).expand(len(items.answers), -1)
    return replace(items, contexts=torch.cat([front, items.contexts], 1))


def make_items(
    documents: Sequence[Sequence[int]],
    *,
    count: int = 850,
    seed: int = 0,
    context: int = CONTEXT,
    span: int = SPAN,
) -> Items:
    """At most ``count`` items of ``documents`` (token ids); equal arguments give equal items.

    A document gives one item, cut at a random place. Wrong spans are as long as the right one, so that
    normalising by length changes nothing. Documents without wrong spans are passed over. Raises
    ``ValueError`` when no item is left.
    """
    generator = random.Random(seed)
    places: dict[int, list[Place]] = defaultdict(list)  # by the token before the span
    for number, ids in enumerate(documents):
        for start in range(1, len(ids) - span + 1):
            places[ids[start - 1]].append((number, start))
    contexts: list[list[int]] = []
    spans: list[list[list[int]]] = []
    answers: list[int] = []
    for number in generator.sample(range(len(documents)), len(documents)):
        ids = documents[number]
        if len(ids) < context + span or len(contexts) == count:
            continue
        cut = generator.randrange(context, len(ids) - span + 1)
        right = list(ids[cut : cut + span])
        outside = [
            (other, start)
            for other, start in places[ids[cut - 1]]
            if other != number or not cut - context - span < start < cut + span
        ]
        near = [place for place in outside if place[0] == number]
        near = generator.sample(near, min(len(near), 1))
        far = generator.sample(outside, min(len(outside), 64))  # behind "the" there are thousands
        found = (list(documents[other][start : start + span]) for other, start in near + far)
        wrong = _distinct(found, right)
        if len(wrong) == CHOICES - 1:
            answers.append(generator.randrange(CHOICES))
            wrong.insert(answers[-1], right)
            contexts.append(list(ids[cut - context : cut]))
            spans.append(wrong)
    if not contexts:
        raise ValueError(f"no document gives an item of {context} + {span} tokens with three wrong spans")
    return Items(torch.tensor(contexts), torch.tensor(spans), torch.tensor(answers))


def _distinct(spans: Iterable[list[int]], right: list[int]) -> list[list[int]]:
    """The first three spans that differ from each other and from the right one."""
    wrong: list[list[int]] = []
    for span in spans:
        if len(wrong) < CHOICES - 1 and span != right and span not in wrong:
            wrong.append(span)
    return wrong


@torch.inference_mode()
def span_scores(
    model: nn.Module, items: Items, progress: Callable[[int, int], None] | None = None
) -> torch.Tensor:
    """Mean log-likelihood ``[n, 4]`` fp32 of each span's tokens behind its context.

    The four choices of an item share one pass over the context, by its key-value cache.
    """
    device = next(model.parameters()).device
    total, width = len(items.answers), items.spans.shape[-1]
    scores = []
    for first in range(0, total, BATCH):
        contexts, spans = (x[first : first + BATCH].to(device) for x in (items.contexts, items.spans))
        out: Any = model(input_ids=contexts, use_cache=True, logits_to_keep=1)
        opening = out.logits[:, -1].float().log_softmax(-1).gather(-1, spans[:, :, 0])
        cache = out.past_key_values
        cache.batch_repeat_interleave(CHOICES)
        flat = spans.flatten(0, 1)
        logits = model(input_ids=flat[:, :-1], past_key_values=cache, use_cache=True).logits
        rest = logits.float().log_softmax(-1).gather(-1, flat[:, 1:, None]).sum((1, 2))
        scores.append((opening + rest.view_as(opening)) / width)
        if progress is not None:
            progress(len(scores), -(-total // BATCH))
    return torch.cat(scores)
