"""Real vLLM on CPU: attention with 2:4 heads gives exactly the tokens of its dense twin, on 1 and 2 ranks."""

from __future__ import annotations

import pytest

from tests.tiny import dense_twin
from tests.tiny_families import make_family
from tests.tiny_text import write_text
from tests.vllm_runs import Pool
from vllm_spense.format import Checkpoint
from vllm_spense.models.export import export
from vllm_spense.pruning import PruneConfig, prune

pytestmark = pytest.mark.vllm
EAGER = {"enforce_eager": True}
TP2 = EAGER | {"tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Eight query heads on four key/value heads of 32, two of them dense; biases everywhere."""
    root = tmp_path_factory.mktemp("attention")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    make_family("llama", root / "dense", num_hidden_layers=2, hidden_size=128, **heads)
    config = PruneConfig(
        calibration=str(write_text(root / "text.txt")),
        preset="spensegpt+",
        num_samples=4,
        seq_len=64,
        targets="mlp+attention",
    )
    prune(root / "dense", root / "spense", config)
    export(root / "spense", root / "twin", format="spense-dense")
    dense_twin(root / "spense", root / "twin-tp2", tp=2)
    pool = Pool(tmp_path_factory.mktemp("runs"))
    for name, model in (("one", "spense"), ("one-twin", "twin"), ("dense", "dense")):
        pool.add("one", name, {"model": str(root / model), "llm": EAGER})
    for name, model in (("two", "spense"), ("two-twin", "twin-tp2")):
        pool.add("two", name, {"model": str(root / model), "llm": TP2})
    pool.environment("two", VLLM_CPU_OMP_THREADS_BIND="0|1")
    pool.start("one", "two")
    spec = Checkpoint(root / "spense").require_spense().modules["model.layers.1.self_attn.k_proj"]
    assert (spec.sparse, spec.dense) == (64, 64)
    return pool


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_tokens_and_logprobs_are_those_of_the_dense_twin(runs: Pool, ranks: str) -> None:
    assert runs[ranks].outputs == runs[f"{ranks}-twin"].outputs
    assert len(runs[ranks].tokens) == 6


def test_the_unpruned_model_gives_other_tokens(runs: Pool) -> None:
    assert all(a != b for a, b in zip(runs["one"].tokens, runs["dense"].tokens, strict=True))
