"""Real vLLM on CPU, in the ways people run it: each gives the tokens of the plain engine."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.tiny import VOCAB, make_llama, make_spense
from tests.vllm_runs import Pool
from vllm_spense.models.export import export

pytestmark = pytest.mark.vllm
EAGER = {"enforce_eager": True}
COUNTED = EAGER | {"disable_log_stats": False}
TRACED = {"compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}}
"""vLLM 0.32 has no buffers for a stage's input if nothing is compiled on a CPU."""
PP2 = TRACED | {"pipeline_parallel_size": 2, "kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.1}
DRAFTED = {"method": "draft_model", "num_speculative_tokens": 3}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
HEAD = 70
"""Tokens that four prompts begin with: two full blocks of the cache."""


def prompts() -> list[list[int]]:
    """Four that begin alike, two that repeat themselves."""
    rng = random.Random(1)
    head = [rng.randrange(3, VOCAB) for _ in range(HEAD)]
    alike = [head + [rng.randrange(3, VOCAB) for _ in range(5)] for _ in range(4)]
    return [*alike, [7, 8, 9, 10] * 6, [30, 31, 32] * 8]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    root = tmp_path_factory.mktemp("modes")
    make_llama(root / "dense")
    make_spense(root / "dense", root / "spense")
    export(root / "spense", root / "twin", format="spense-dense")
    (root / "sharded").mkdir()
    for file in (root / "spense").glob("*.json"):
        shutil.copy(file, root / "sharded")
    pool = Pool(tmp_path_factory.mktemp("runs"))

    def add(group: str, name: str, llm: dict, model: str = "spense", **more: str) -> None:
        pool.add(group, name, {"model": str(root / model), "llm": llm, "prompts": prompts(), **more})

    add("modes", "plain", EAGER, save=str(root / "sharded"))
    add("modes", "plain-twin", EAGER, "twin")
    add("modes", "plain-dense", EAGER, "dense")
    cached = {"enable_prefix_caching": True, "block_size": 32, "max_num_seqs": 1}
    add("modes", "prefix", EAGER | cached)
    add("modes", "chunked", EAGER | {"enable_chunked_prefill": True, "max_num_batched_tokens": 32})
    overrides = EAGER | {"hf_overrides": {"rms_norm_eps": 0.1}}
    add("modes", "overrides", overrides)
    add("modes", "overrides-twin", overrides, "twin")
    add("modes", "mismatch", EAGER | {"quantization": "fp8"})
    add("modes", "sharded", EAGER | {"load_format": "sharded_state"}, "sharded")
    add("modes", "drafted", COUNTED | {"speculative_config": DRAFTED | {"model": str(root / "spense")}})
    add("ngram", "ngram", COUNTED | {"speculative_config": NGRAM})
    add("pp2", "pp2", PP2)
    add("pp2", "pp2-twin", PP2, "twin")
    pool.environment("pp2", VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    for name, plugins in (("allowed", "spense,other"), ("not-allowed", "other")):
        add(name, name, EAGER)
        pool.environment(name, VLLM_PLUGINS=plugins)
    pool.start("modes", "ngram")
    return pool


def test_plain_tokens_are_those_of_the_dense_twin(runs: Pool) -> None:
    """What the other modes are compared with."""
    assert runs["plain"].outputs == runs["plain-twin"].outputs
    assert all(a != b for a, b in zip(runs["plain"].tokens, runs["plain-dense"].tokens, strict=True))


@pytest.mark.parametrize("mode", ["prefix", "chunked", "drafted", "ngram", "allowed"])
def test_the_mode_changes_no_token(runs: Pool, mode: str) -> None:
    assert runs[mode].tokens == runs["plain"].tokens


def test_prefixes_were_found_in_the_cache(runs: Pool) -> None:
    answer = runs["prefix"].answer
    assert answer is not None
    first, *others = answer["cached"][:4]
    assert first == 0
    assert all(cached == 64 for cached in others)


@pytest.mark.parametrize("mode", ["drafted", "ngram"])
def test_drafts_were_accepted(runs: Pool, mode: str) -> None:
    """A model that drafts for itself is right each time; n-grams at least once."""
    answer = runs[mode].answer
    assert answer is not None
    generated = sum(len(tokens) for tokens in runs[mode].tokens)
    assert answer["metrics"][ACCEPTED] >= (generated // 2 if mode == "drafted" else 1)


def test_overridden_configuration(runs: Pool) -> None:
    assert runs["overrides"].outputs == runs["overrides-twin"].outputs
    assert runs["overrides"].tokens != runs["plain"].tokens


def test_two_pipeline_stages(runs: Pool) -> None:
    assert runs["pp2"].outputs == runs["pp2-twin"].outputs
    assert len(runs["pp2"].tokens) == len(prompts())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mismatch", ("spense", "does not match", "fp8")),
        ("not-allowed", ("Unknown quantization method: spense",)),
        ("sharded", ("model-rank-0-part-0.safetensors", "sharded_state", "Fix:")),
    ],
)
def test_what_cannot_be_served_says_why(runs: Pool, name: str, words: tuple[str, ...]) -> None:
    assert runs[name].failed
    for word in words:
        assert word in runs[name].log
