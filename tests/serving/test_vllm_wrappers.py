"""Real vLLM on CPU serves pruned multimodal wrappers, with an image in the prompt, and models for pooling.

Each answers exactly as its dense twin does. Together with ``tests/pruning/test_wrappers.py`` this is the end
of the table in docs/models.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_text import write_text
from tests.tiny_wrappers import IMAGE, WRAPPERS, make_headless, make_wrapper
from tests.vllm_runs import Pool, Run, token_prompts, torchvision
from tools.model_table import POOLING
from tools.model_table import WRAPPERS as TITLES
from vllm_spense.evaluation import load_model
from vllm_spense.models.export import export
from vllm_spense.pruning import PruneConfig, prune

pytestmark = pytest.mark.vllm
WORDS = 500
"""Of the vocabulary; behind them are the tokens that stand for images."""

HEADLESS: dict[str, dict[str, Any]] = {
    "embedding": {"pool": "embed", "model": {"prefix": ""}},
    "base": {"pool": "embed", "model": {"prefix": "model."}},
    "classifier": {"pool": "classify", "model": {}},
    "reranker": {
        "pool": "classify",
        "model": {},
        "overrides": {
            "architectures": ["Qwen3ForSequenceClassification"],
            "classifier_from_token": ["w7", "w8"],
            "is_original_qwen3_reranker": True,
        },
    },
}


def text_and_images(kind: str) -> list[Any]:
    words = IMAGE.get(kind, "w5 w511 w6 w7")
    return [*token_prompts(3, vocab=WORDS), *({"text": words, "image": seed} for seed in (0, 1))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Two processes for the wrappers, one for the rest; models lie in ``root / KIND``."""
    root = tmp_path_factory.mktemp("wrappers")
    text = write_text(root / "text.txt", vocabulary=WORDS)
    pool = Pool(root)
    options = {"calibration": str(text), "preset": "spensegpt+", "num_samples": 4, "seq_len": 64}

    def add(group: str, kind: str, request: dict[str, Any]) -> None:
        prune(root / kind / "dense", root / kind / "spense", PruneConfig(**options))
        export(root / kind / "spense", root / kind / "twin", format="spense-dense")
        for name in ("spense", "twin"):
            pool.add(group, f"{kind}-{name}", request | {"model": str(root / kind / name)})

    for i, kind in enumerate(WRAPPERS):
        make_wrapper(kind, root / kind / "dense")
        limit = {"image": 1} | ({"video": 0} if kind.startswith(("qwen", "gemma4")) else {})
        llm = {"enforce_eager": True, "skip_tokenizer_init": False, "limit_mm_per_prompt": limit}
        add(f"wrappers-{i % 2}", kind, {"llm": llm, "prompts": text_and_images(kind), "max_tokens": 12})
    for kind, asked in HEADLESS.items():
        made = "embedding" if kind == "reranker" else kind
        make_headless(made, root / kind / "dense", **asked["model"])
        llm = {"enforce_eager": True, "runner": "pooling", "skip_tokenizer_init": False}
        llm |= {"hf_overrides": asked["overrides"]} if "overrides" in asked else {}
        add("pooling", kind, {"llm": llm, "pool": asked["pool"]})
    for group in ("wrappers-0", "wrappers-1"):
        pool.environment(group, **torchvision())
    pool.start("wrappers-0", "wrappers-1", "pooling")
    return pool


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_answers_as_its_dense_twin_does(runs: Pool, kind: str) -> None:
    """Tokens and logprobs. What an image shows matters; text alone is near the model in transformers."""
    served, twin = (runs[f"{kind}-{name}"] for name in ("spense", "twin"))
    assert served.outputs == twin.outputs
    assert len(served.tokens) == 5
    assert served.first_logprobs[3] != served.first_logprobs[4]
    if kind == "paligemma":  # vLLM 0.32 answers otherwise than transformers for the dense model already
        return
    pruned, unpruned = (distance(served, runs.work / kind / name) for name in ("spense", "dense"))
    assert pruned < 0.6 * unpruned


@torch.no_grad()
def distance(served: Run, directory: Path) -> float:
    """Mean difference of the first tokens' logprobs from those of ``directory`` in transformers, in fp32."""
    assert served.answer is not None
    model, total = load_model(directory), 0.0
    for i, prompt in enumerate(served.answer["prompts"][:3]):
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        total += abs(float(logits.log_softmax(-1)[served.tokens[i][0]]) - served.first_logprobs[i])
    return total / 3


@pytest.mark.parametrize("kind", HEADLESS)
def test_a_model_for_pooling_answers_as_its_dense_twin_does(runs: Pool, kind: str) -> None:
    """Embeddings are the last token's normalised states, as transformers computes them."""
    served, twin = (runs[f"{kind}-{name}"] for name in ("spense", "twin"))
    assert served.outputs == twin.outputs
    prompts = token_prompts()
    assert len(served.outputs) == len(prompts)
    if HEADLESS[kind]["pool"] == "embed":
        far = [spread(served, prompts, runs.work / kind / name) for name in ("spense", "dense")]
        assert far[0] < 0.3 * far[1]


@torch.no_grad()
def spread(served: Run, prompts: list[list[int]], directory: Path) -> float:
    """Mean distance of the embeddings from those of ``directory`` in transformers."""
    model: Any = load_model(directory)
    total = 0.0
    for prompt, found in zip(prompts, served.outputs, strict=True):
        states = model.base_model(input_ids=torch.tensor([prompt]))[0][0, -1]
        total += float((torch.tensor(found) - states / states.norm()).norm())
    return total / len(prompts)


def test_the_table_lists_what_is_tested() -> None:
    assert TITLES.keys() == WRAPPERS.keys()
    assert POOLING.keys() == HEADLESS.keys()
