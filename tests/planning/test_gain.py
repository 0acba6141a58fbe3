"""What `plan` says: bytes by hand, the verdict, and the conditions it depends on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.planning.test_step import GATE_UP, write_table
from vllm_spense.planning import plan, read_model
from vllm_spense.planning.gain import MAX_CONTEXT, PAYS
from vllm_spense.planning.shapes import Experts


def test_memory_by_hand() -> None:
    """Llama-3.1-8B: q and o 4096 x 4096, k and v 1024 x 4096, three MLP matrices 14336 x 4096."""
    attention, mlp = 2 * 4096 * 4096 + 2 * 1024 * 4096, 3 * 14336 * 4096
    scales = 4 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    ends = 2 * 2 * 128256 * 4096
    memory = plan("Llama-3.1-8B", dense_ratio=0.5).memory
    assert memory.dense_bytes == 32 * (attention + mlp + scales) + ends
    assert memory.spense_bytes == 32 * (attention + mlp * 13 // 16 + scales) + ends
    assert memory.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert memory.dense_kv_tokens == int((0.92 * 141e9 - memory.dense_bytes) // 131072)
    gained = memory.spense_kv_tokens - memory.dense_kv_tokens
    assert gained == pytest.approx(32 * mlp * 3 / 16 / 131072, abs=1)


def test_memory_of_tied_embeddings_experts_and_ranks() -> None:
    model = read_model("Llama-3.1-8B")
    whole = plan(model).memory.dense_bytes
    assert whole - plan(replace(model, tied=True)).memory.dense_bytes == 2 * 128256 * 4096
    mixed = plan(replace(model, experts=Experts(32, 4, 1, 1024))).memory
    assert mixed.dense_bytes - whole == 32 * 4 * 3 * 1024 * 4096 * 2
    halves = plan(model, tensor_parallel=2).memory
    assert halves.dense_bytes == pytest.approx(whole / 2, rel=1e-3)  # the scales of o and down are on both
    assert halves.kv_bytes_per_token == 2 * 32 * 4 * 128 * 2


def test_dense_ratio_one_changes_nothing() -> None:
    found = plan("Qwen3-32B", dense_ratio=1.0)
    assert found.decode.speedup == found.prefill.speedup == 1
    assert found.memory.saved == 0
    assert found.pays_up_to is None
    assert found.verdict.startswith("Spense does not pay: 1.00x decode, 1.00x prefill (predicted)")
    assert "less than 1.05x at any context" in found.verdict


def test_lower_ratios_save_more_bytes() -> None:
    found = [plan("Qwen3-32B", dense_ratio=r).memory for r in (1.0, 0.5, 0.25, 0.0)]
    assert [m.spense_bytes for m in found] == sorted((m.spense_bytes for m in found), reverse=True)
    assert len({m.dense_bytes for m in found}) == 1
    assert len({m.spense_bytes for m in found}) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 8, "context": 512}, "Spense pays at decode only: "),
        ({"gpu": "B200", "batch": 32, "context": 65536}, "Spense pays at prefill only: "),
        ({"batch": 8, "context": 512, "prefill_tokens": 1}, "Spense pays: "),
        ({"batch": 32, "context": 65536, "dense_ratio": 0.97}, "Spense does not pay: "),
    ],
)
def test_the_verdict(options: dict, words: str) -> None:
    assert plan("Qwen3-32B", **options).verdict.startswith(words)


def test_the_limit_of_the_context() -> None:
    found = plan("Qwen3-32B", batch=16, dense_ratio=0.25)
    limit = found.pays_up_to
    assert limit is not None
    at, beyond = (plan("Qwen3-32B", batch=16, dense_ratio=0.25, context=c) for c in (limit, 2 * limit))
    assert round(at.decode.speedup, 2) >= PAYS > round(beyond.decode.speedup, 2)
    assert f"decode gains 1.05x up to a context of {limit}" in found.verdict


def test_batches_show_the_share_of_the_weights() -> None:
    found = plan("Qwen3-32B", batch=3)
    assert list(found.batches) == [1, 3, 8, 32, 128, 256]
    shares = [phase.mlp_share for phase in found.batches.values()]
    assert shares == sorted(shares, reverse=True)
    assert found.batches[3] == found.decode


def test_where_the_times_come_from(tables) -> None:
    assert "estimates: nothing has been measured" in plan("Qwen3-32B").source
    write_table(tables, GATE_UP, tokens_32=(50.0, 80.0))
    found = plan("Qwen3-32B")
    assert found.source.startswith("kernel times measured for 1 of 2 at decode; the others")
    assert "predicted, in part from measured kernels" in found.verdict
    assert "nothing has been measured" in plan("Qwen3-32B", "H100").source


def test_layers_left_dense_take_dense_memory(tables) -> None:
    before = plan("Qwen3-32B").memory
    write_table(tables, GATE_UP, tokens_32=(90.0, 80.0))
    found = plan("Qwen3-32B")
    assert found.memory.spense_bytes - before.spense_bytes == 64 * 51200 * 5120 * 3 // 16
    assert any(note.startswith("64 linear layers with a 2:4 region run as dense FP8") for note in found.notes)


def test_what_does_not_fit_is_said() -> None:
    notes = plan("Qwen3-32B", batch=256).notes
    assert any("dense FP8: 1048576 tokens of KV cache are asked for" in note for note in notes)
    model = read_model("Llama-3.1-70B", 0.25)
    huge = replace(model, vocabulary=model.vocabulary * 2)
    notes = plan(huge, "H100").notes
    assert "the dense FP8 weights do not fit 1 × H100" in notes
    assert "the Spense weights do not fit 1 × H100" not in notes


def test_other_gpus_say_how_rough_they_are() -> None:
    assert any("CUTLASS GEMM per region" in note for note in plan("Qwen3-32B", "B200").notes)
    assert any("3.35 TB/s" in note for note in plan("Qwen3-32B", "H100").notes)
    assert len(plan("Qwen3-32B", "H200").notes) == 1


@pytest.mark.parametrize(
    "options", [{"batch": 0}, {"context": MAX_CONTEXT + 1}, {"prefill_tokens": 0}, {"kv_dtype": "int4"}]
)
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(ValueError, match=r"must lie in|no tensor-parallel size"):
        plan("Qwen3-32B", **options)


def test_it_can_be_written_as_json() -> None:
    found = plan("Qwen3-32B")
    again = json.loads(json.dumps(found.as_dict()))
    assert again["decode"]["speedup"] == found.decode.speedup
    assert again["decode"]["dense_seconds"] == pytest.approx(sum(again["decode"]["dense"].values()))
    assert again["batches"]["8"]["mlp_share"] == found.batches[8].mlp_share
    assert again["memory"]["saved"] == found.memory.saved
