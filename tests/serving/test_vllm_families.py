"""Real vLLM on CPU serves a Spense checkpoint of each model family with exactly the tokens of its dense twin.

The table of models in docs/models.md is made from this list: `python -m tools.model_table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.markdown import fill
from tests.tiny_families import FAMILIES as OPTIONS
from tests.tiny_families import make_family
from tests.tiny_text import write_text
from tests.vllm_runs import Pool, Run, token_prompts, torchvision
from tools.model_table import DOCUMENT, FAMILIES, models
from vllm_spense.evaluation import load_model
from vllm_spense.models.export import export
from vllm_spense.pruning import PruneConfig, prune

pytestmark = pytest.mark.vllm
EAGER = {"enforce_eager": True}
ONLINE = ("phi3", "glm4", "phi", "starcoder2", "opt", "exaone4", "gemma4_text", "gemma4_moe")
ONLINE += ("qwen3_5_text", "falcon_h1")
"""Their checkpoints are what load-time mode makes of the dense model: fused on disk, plain, unusual."""
LOAD_TIME: dict[str, Any] = {"preset": "magnitude", "calibration": None, "dense_ratio": 0.5, "alignment": 8}
SERVED = [*FAMILIES, "phi3-bf16"]
NEAR = {"glm4": 1.0, "jais2": 0.8}
"""Largest distance from the pruned model, relative to the unpruned one's; 0.6 for all others.

FP8 activations move random models of some families nearly as far as pruning does: GLM-4 0.63 was measured,
Jais 2 0.74 on an EPYC without AMX, with our kernels and without.
"""


def make(kind: str, root: Path, text: Path) -> None:
    """The random model, its Spense checkpoint and the dense twin, in ``root``."""
    family, _, bf16 = kind.partition("-")
    heads = {} if "head_dim" in OPTIONS[family] else {"head_dim": 32}  # a size that vLLM has on CPUs
    make_family(family, root / "dense", hidden_size=128, **heads)
    calibrated = {"calibration": str(text), "preset": "spensegpt+", "num_samples": 4, "seq_len": 64}
    options = LOAD_TIME if kind in ONLINE else calibrated
    config = PruneConfig(weight_dtype="bf16" if bf16 else "fp8", **options)
    prune(root / "dense", root / "spense", config)
    # in bf16 the twin is an ordinary model, fused again where the original is fused on disk
    export(root / "spense", root / "twin", format="bfloat16" if kind.endswith("bf16") else "spense-dense")


@dataclass(frozen=True)
class Served:
    """Where the models lie, and the runs of ``KIND-spense`` and ``KIND-twin``."""

    root: Path
    pool: Pool


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Two processes at a time, with a quarter of the families each."""
    root = tmp_path_factory.mktemp("families")
    text = write_text(root / "text.txt")
    pool = Pool(tmp_path_factory.mktemp("runs"))
    for i, kind in enumerate(SERVED):
        make(kind, root / kind, text)
        for name in ("spense", "twin"):
            pool.add(str(i % 4), f"{kind}-{name}", {"model": str(root / kind / name), "llm": EAGER})
        if kind in ONLINE:
            online = EAGER | {"quantization": "spense"}
            pool.add(str(i % 4), f"{kind}-online", {"model": str(root / kind / "dense"), "llm": online})
    for group in "0123":
        pool.environment(group, **torchvision())  # vLLM's module of Qwen3.5 holds the multimodal model, too
    pool.start("0", "1", "2", "3")
    return Served(root, pool)


@pytest.mark.parametrize("kind", SERVED)
def test_tokens_are_those_of_the_dense_twin(runs: Served, kind: str) -> None:
    """And their logprobs, which are near those of the pruned model in transformers.

    The unpruned model is the negative control, in transformers too: that takes no engine.
    """
    served, twin = (runs.pool[f"{kind}-{name}"] for name in ("spense", "twin"))
    assert served.outputs == twin.outputs
    assert len(served.tokens) == 6
    pruned, unpruned = (distance(served, runs.root / kind / name) for name in ("spense", "dense"))
    assert pruned < NEAR.get(kind, 0.6) * unpruned


@pytest.mark.parametrize("kind", [kind for kind in ONLINE if kind in SERVED])
def test_load_time_mode_is_magnitude_pruning(runs: Served, kind: str) -> None:
    """On disk by `spense prune --preset magnitude`, with the last half of each MLP dense."""
    assert runs.pool[f"{kind}-online"].outputs == runs.pool[f"{kind}-spense"].outputs
    assert len(runs.pool[f"{kind}-online"].tokens) == 6


@torch.no_grad()
def distance(served: Run, directory: Path) -> float:
    """Mean difference of the first tokens' logprobs from those of ``directory`` in transformers, in fp32."""
    model, total = load_model(directory), 0.0
    for prompt, tokens, logprob in zip(token_prompts(), served.tokens, served.first_logprobs, strict=True):
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        total += abs(float(logits.log_softmax(-1)[tokens[0]]) - logprob)
    return total / len(token_prompts())


def test_the_document_lists_what_is_tested() -> None:
    assert FAMILIES.keys() == OPTIONS.keys()
    text = DOCUMENT.read_text()
    assert fill(text, "models", models()) == text, "run python -m tools.model_table"
