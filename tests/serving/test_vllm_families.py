"""Real vLLM on CPU: Phi-3, fused on disk and in vLLM, served from a Spense checkpoint of its parts."""

from __future__ import annotations

import pytest
from tiny_families import make_family
from tiny_text import write_text
from vllm_runs import Pool

from vllm_spense.format.export import export
from vllm_spense.pruning import PruneConfig, prune

pytestmark = pytest.mark.vllm
EAGER = {"enforce_eager": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    root = tmp_path_factory.mktemp("phi3")
    make_family("phi3", root / "dense", hidden_size=128, head_dim=None, sliding_window=None)  # heads of 32
    text = write_text(root / "text.txt")
    for dtype, format in (("bf16", "bfloat16"), ("fp8", "spense-dense")):
        config = PruneConfig(calibration=str(text), num_samples=4, seq_len=64, weight_dtype=dtype)
        prune(root / "dense", root / dtype, config)
        export(root / dtype, root / f"{dtype}-twin", format=format)
    pool = Pool(tmp_path_factory.mktemp("runs"))
    for name in ("bf16", "bf16-twin", "fp8", "fp8-twin", "dense"):
        pool.add(name, {"model": str(root / name), "llm": EAGER})
    pool.together("bf16", "bf16-twin")
    pool.together("fp8", "fp8-twin")
    return pool


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_phi3_tokens_are_those_of_the_dense_twin(runs: Pool, dtype: str) -> None:
    """bf16: stock vLLM on the export, which is fused again; fp8: the twin, which is not."""
    assert runs[dtype].outputs == runs[f"{dtype}-twin"].outputs
    assert len(runs[dtype].tokens) == 6


def test_the_unpruned_phi3_gives_other_tokens(runs: Pool) -> None:
    for dtype in ("bf16", "fp8"):
        assert all(a != b for a, b in zip(runs[dtype].tokens, runs["dense"].tokens, strict=True))
