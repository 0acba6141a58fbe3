"""Real vLLM on CPU serves a Spense checkpoint of each model family with exactly the tokens of its dense twin.

The table of models in README is made from this list: `python tests/serving/model_table.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from model_table import FAMILIES, README, TABLE, table
from tiny import make_spense
from tiny_families import FAMILIES as OPTIONS
from tiny_families import make_family
from tiny_multimodal import NEW, OLD, make_paligemma
from tiny_text import write_text
from vllm_runs import Pool

from vllm_spense.format.export import export
from vllm_spense.pruning import PruneConfig, prune

pytestmark = pytest.mark.vllm
EAGER = {"enforce_eager": True}
PREFIXES = {"paligemma": OLD, "paligemma-new": NEW}
SERVED = [*FAMILIES, "phi3-bf16", "paligemma-new"]


def make(kind: str, root: Path, text: Path) -> None:
    """The random model, its Spense checkpoint and the dense twin, in ``root``."""
    if kind in PREFIXES:  # `spense prune` refuses multimodal models: straight through the format package
        make_paligemma(root / "dense", prefix=PREFIXES[kind])
        make_spense(root / "dense", root / "spense", inside="language_model")
    else:
        family, _, bf16 = kind.partition("-")
        heads = {} if "head_dim" in OPTIONS[family] else {"head_dim": 32}  # a size that vLLM has on CPUs
        make_family(family, root / "dense", hidden_size=128, **heads)
        config = PruneConfig(
            calibration=str(text),
            preset="spensegpt+",
            num_samples=4,
            seq_len=64,
            weight_dtype="bf16" if bf16 else "fp8",
        )
        prune(root / "dense", root / "spense", config)
    # in bf16 the twin is an ordinary model, fused again where the original is fused on disk
    export(root / "spense", root / "twin", format="bfloat16" if kind.endswith("bf16") else "spense-dense")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Two processes with half of the families each."""
    root = tmp_path_factory.mktemp("families")
    text = write_text(root / "text.txt")
    pool = Pool(tmp_path_factory.mktemp("runs"))
    for i, kind in enumerate(SERVED):
        make(kind, root / kind, text)
        llm = EAGER | ({"limit_mm_per_prompt": {"image": 0}} if kind in PREFIXES else {})
        for name in ("spense", "twin", "dense"):
            pool.add(str(i % 2), f"{kind}-{name}", {"model": str(root / kind / name), "llm": llm})
    pool.start("0", "1")
    return pool


@pytest.mark.parametrize("kind", SERVED)
def test_tokens_are_those_of_the_dense_twin(runs: Pool, kind: str) -> None:
    """And their logprobs; those of the unpruned model, as negative control, are others."""
    served, twin, unpruned = (runs[f"{kind}-{name}"] for name in ("spense", "twin", "dense"))
    assert served.outputs == twin.outputs
    assert len(served.tokens) == 6
    assert all(a != b for a, b in zip(served.first_logprobs, unpruned.first_logprobs, strict=True))


def test_readme_lists_what_is_tested() -> None:
    assert {kind for kind, family in FAMILIES.items() if family.pruned} == set(OPTIONS)
    before, after = TABLE
    text = README.read_text()
    assert text.split(before)[1].split(after)[0].strip() == table(), "run python tests/serving/model_table.py"
