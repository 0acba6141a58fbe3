"""The four-way continuation task: how items are made, and their scores one sequence at a time."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from tests.tiny import make_llama
from tests.tiny_text import add_tokenizer
from vllm_spense.evaluation import evaluate, load_model
from vllm_spense.evaluation.continuation import Continuation, Items, continuation, make_items, span_scores

WORDS = 12  # few, so that every token stands in every document


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> torch.nn.Module:
    return load_model(tiny_llama)


def documents(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(WORDS) for _ in range(length)] for _ in range(count)]


def places(ids: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part]


def test_items_say_what_the_text_says() -> None:
    texts = documents(40, 60)
    items = make_items(texts, context=16, span=6)
    assert items.contexts.shape == (40, 16)
    assert items.spans.shape == (40, 4, 6)
    homes = set()
    for context, spans, answer in zip(
        items.contexts.tolist(), items.spans.tolist(), items.answers.tolist(), strict=True
    ):
        whole = context + spans[answer]
        home = next(number for number, ids in enumerate(texts) if places(ids, whole))
        homes.add(home)
        start = places(texts[home], whole)[0]
        assert len({tuple(span) for span in spans}) == 4
        for span in spans:
            found = [(n, i) for n, ids in enumerate(texts) for i in places(ids, [context[-1], *span])]
            assert found  # a wrong span stands behind the same token too
        wrong = [span for i, span in enumerate(spans) if i != answer]
        inside = {tuple(texts[home][i : i + 6]) for i in range(start - 5, start + len(whole))}
        assert not inside & {tuple(span) for span in wrong}  # and nowhere inside the context
    assert len(homes) == 40  # one item per document
    assert set(items.answers.tolist()) == {0, 1, 2, 3}


def test_equal_arguments_give_equal_items() -> None:
    texts = documents(30, 80)
    first, again, other = make_items(texts), make_items(texts), make_items(texts, seed=1)
    for name in ("contexts", "spans", "answers"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.contexts, other.contexts)
    assert len(make_items(texts, count=7).answers) == 7


def test_one_wrong_span_comes_from_the_same_document() -> None:
    """Document 0 is [0 a b c d] repeated with running numbers; 0 stands before many spans of its own."""
    own = [token for i in range(20) for token in (0, 1000 + i, 2000 + i, 3000 + i)]
    others = [[0, 4000 + i, 5000 + i, 6000 + i] * 20 for i in range(20)]
    checked = 0
    for seed in range(8):
        items = make_items([own, *others], context=8, span=3, seed=seed)
        mine = [i for i, ids in enumerate(items.contexts.tolist()) if places(own, ids)]
        for i in mine:
            if int(items.contexts[i, -1]) == 0:
                firsts = [span[0] for span in items.spans[i].tolist()]
                assert sum(1000 <= first < 2000 for first in firsts) >= 2  # the right span and one more
                checked += 1
    assert checked


def test_wrong_spans_differ_although_the_text_repeats_itself() -> None:
    """Behind each token stand three spans, the commonest of them in nine documents of ten."""
    common = [[0, 1, 2, 3] * 20 for _ in range(36)]
    rare = [[0, 4 + i, 2, 3] * 20 for i in range(4)]
    items = make_items([*common, *rare], context=8, span=3)
    for spans in items.spans.tolist():
        assert len({tuple(span) for span in spans}) == 4


def test_documents_without_items() -> None:
    with pytest.raises(ValueError, match="no document gives an item of 32 \\+ 12 tokens"):
        make_items(documents(10, 43))
    with pytest.raises(ValueError, match="no document"):
        make_items([list(range(1000 * i, 1000 * i + 60)) for i in range(10)])  # nothing stands twice


def test_scores_are_those_of_each_sequence_alone(model: torch.nn.Module) -> None:
    items = make_items(documents(11, 60), context=16, span=6)
    seen: list[tuple[int, int]] = []
    scores = span_scores(model, items, lambda *step: seen.append(step))
    expected = torch.empty(11, 4)
    for i in range(11):
        for j in range(4):
            ids = torch.cat([items.contexts[i], items.spans[i, j]])
            with torch.inference_mode():
                p = model(ids[None], use_cache=False).logits[0].double().softmax(-1)
            expected[i, j] = sum(math.log(p[t - 1, ids[t]]) for t in range(16, 22)) / 6
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert seen == [(1, 2), (2, 2)]
    result = continuation(model, items)
    right = [max(range(4), key=lambda j: expected[i, j]) == items.answers[i] for i in range(11)]
    assert result == Continuation(sum(right) / 11, 11)


def test_an_item_is_right_when_its_answer_is_the_likeliest(model: torch.nn.Module) -> None:
    items = make_items(documents(24, 60))
    best = span_scores(model, items).argmax(-1)
    assert continuation(model, Items(items.contexts, items.spans, best)).accuracy == 1
    assert continuation(model, Items(items.contexts, items.spans, (best + 1) % 4)).accuracy == 0


def test_standard_error() -> None:
    assert Continuation(0.8, 400).standard_error == pytest.approx(0.02)
    assert Continuation(1.0, 5).standard_error == 0


def test_evaluate_with_continuation(tmp_path: Path) -> None:
    dense = add_tokenizer(make_llama(tmp_path / "dense"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{i}" for i in ids) for ids in documents(20, 60)))
    steps: list[tuple[int, int]] = []
    result = evaluate(
        dense,
        text,
        seq_len=64,
        max_tokens=128,
        with_continuation=True,
        progress=lambda *step: steps.append(step),
    )
    assert result.continuation is not None
    assert result.continuation.items == 20
    assert steps == [(i, 5) for i in range(1, 6)]  # two windows, three batches of items
    text.write_text("w1 " * 200)
    with pytest.raises(ValueError, match=r"text\.txt: no document gives an item"):
        evaluate(dense, text, seq_len=64, with_continuation=True)
