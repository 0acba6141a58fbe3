"""Agreement with a reference model, against sums written out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.tiny import make_llama, make_spense
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.evaluation import evaluate, load_model
from vllm_spense.evaluation.agreement import agreement
from vllm_spense.evaluation.perplexity import mean_nll


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_llama(tmp_path_factory.mktemp("agreement") / "dense"))


@pytest.fixture(scope="module")
def spense(dense: Path) -> Path:
    return make_spense(dense, dense.parent / "spense")


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(0))


def test_by_hand(dense: Path, spense: Path, windows: torch.Tensor) -> None:
    model, reference = load_model(spense), load_model(dense)
    seen: list[tuple[int, int]] = []
    result = agreement(model, reference, windows, lambda *step: seen.append(step))
    divergences, likelihoods, references, same = [], [], [], []
    for window in windows:
        with torch.inference_mode():
            p = reference(window[None]).logits[0].double().softmax(-1)
            q = model(window[None]).logits[0].double().softmax(-1)
        for i in range(23):
            divergences.append(math.fsum(a * math.log(a / b) for a, b in zip(p[i], q[i], strict=True)))
            likelihoods.append(-math.log(q[i, window[i + 1]]))
            references.append(-math.log(p[i, window[i + 1]]))
            same.append(max(range(512), key=lambda t: p[i, t]) == max(range(512), key=lambda t: q[i, t]))
    assert result.tokens == len(same) == 69
    assert result.kl == pytest.approx(sum(divergences) / 69, rel=1e-4)
    assert result.nll == pytest.approx(sum(likelihoods) / 69, rel=1e-5)
    assert result.reference_nll == pytest.approx(sum(references) / 69, rel=1e-5)
    assert result.top1 == sum(same) / 69
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.reference_perplexity == pytest.approx(math.exp(result.reference_nll))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert result.kl > 0.01  # the models differ: the comparison above compares something
    assert 0 < result.top1 < 1


def test_divergence_is_from_the_reference_to_the_model(
    dense: Path, spense: Path, windows: torch.Tensor
) -> None:
    model, reference = load_model(spense), load_model(dense)
    there, back = agreement(model, reference, windows), agreement(reference, model, windows)
    assert there.kl != pytest.approx(back.kl, rel=0.01)
    assert there.top1 == back.top1
    assert there.nll == back.reference_nll


def test_a_model_agrees_with_itself(dense: Path, windows: torch.Tensor) -> None:
    model = load_model(dense)
    result = agreement(model, load_model(dense), windows)
    assert result.kl == 0
    assert result.top1 == 1
    assert result.nll == result.reference_nll == pytest.approx(mean_nll(model, windows), rel=1e-6)


def test_evaluate_with_a_reference(dense: Path, spense: Path) -> None:
    text = write_text(dense.parent / "text.txt", 100)
    alone, original = (evaluate(directory, text, seq_len=32) for directory in (spense, dense))
    steps: list[tuple[int, int]] = []
    both = evaluate(spense, text, seq_len=32, reference=dense, progress=lambda *step: steps.append(step))
    assert both.agreement is not None
    assert alone.agreement is None
    assert both.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
    assert both.agreement.reference_perplexity == pytest.approx(original.perplexity, rel=1e-5)
    assert both.agreement.kl > 0
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_models_that_cannot_be_compared(dense: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    model = load_model(dense)
    smaller = load_model(dense)
    smaller.lm_head = torch.nn.Linear(model.lm_head.in_features, 500)
    with pytest.raises(ValueError, match="512 output tokens, its reference 500"):
        agreement(model, smaller, windows)
    other = add_tokenizer(make_llama(tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="other tokens"):
        evaluate(dense, write_text(tmp_path / "text.txt", 2000), seq_len=32, reference=other)
