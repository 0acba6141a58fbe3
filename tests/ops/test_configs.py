"""Which kernel configurations are legal, what they should cost, and which one dispatch takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import make_spense
from vllm_spense.format import Checkpoint, Codecs
from vllm_spense.ops import LinearSpec, available_backends, extension
from vllm_spense.ops.linear import table
from vllm_spense.ops.linear.configs import (
    KernelConfig,
    busiest,
    candidates,
    clusters_at_once,
    estimate,
    illegal,
    shared_memory_cycles,
    tensor_cycles,
)
from vllm_spense.ops.linear.table import TuningEntry, TuningTable, bucket, dense_ratio, pick, table_path
from vllm_spense.ops.linear.tune import layer_specs

HOPPER, BLACKWELL, ADA = (9, 0), (10, 0), (8, 9)
GATE_UP = LinearSpec("output", 51200, 5120, (12800, 12800), (12800, 12800))
DOWN = LinearSpec("input", 5120, 25600, (12800,), (12800,))
RAGGED = LinearSpec("input", 1001, 2064, (1048,), (1016,))


@pytest.mark.parametrize("spec", [GATE_UP, DOWN, RAGGED])
@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 128, 129, 1000, 32768])
def test_hopper_always_has_a_configuration_that_covers_the_tokens(spec: LinearSpec, tokens: int) -> None:
    legal = candidates(spec, tokens, HOPPER, cutlass=False)
    assert legal
    assert len(set(legal)) == len(legal)
    assert all(illegal(spec, tokens, config, HOPPER) is None for config in legal)
    if tokens <= 128:
        assert all(config.tile_tokens >= tokens for config in legal if not config.multicast)


def test_each_architecture_has_its_kernels() -> None:
    assert {c.kernel for c in candidates(GATE_UP, 4096, HOPPER, cutlass=True)} == {"sm90", "cutlass"}
    assert {c.kernel for c in candidates(GATE_UP, 4096, BLACKWELL, cutlass=True)} == {"cutlass"}
    assert candidates(GATE_UP, 4096, BLACKWELL, cutlass=False) == []
    assert candidates(GATE_UP, 4096, ADA, cutlass=True) == []


@pytest.mark.parametrize(
    ("spec", "config", "capability", "message"),
    [
        (GATE_UP, KernelConfig("sm90", 128, 16), ADA, "compute capability 9.0 only"),
        (GATE_UP, KernelConfig("sm90", 128, 24), HOPPER, "tiles of 24 tokens"),
        (GATE_UP, KernelConfig("sm90", 96, 16), HOPPER, "tiles of 96 rows"),
        (GATE_UP, KernelConfig("sm90", 128, 16, 3), HOPPER, "clusters of 3"),
        (GATE_UP, KernelConfig("sm90", 128, 256, 8, True), HOPPER, "clusters of 8"),
        (GATE_UP, KernelConfig("cutlass", 128, 256), ADA, "9.0 and 10.x"),
        (RAGGED, KernelConfig("cutlass", 128, 256), HOPPER, "multiple of 16"),
        (
            LinearSpec("output", 1004, 512, (504,), (500,)),
            KernelConfig("cutlass", 128, 256),
            HOPPER,
            "multiple of 8",
        ),
    ],
)
def test_illegal_configurations_say_why(spec, config, capability, message) -> None:
    assert message in (illegal(spec, 64, config, capability) or "")


def test_the_estimate_knows_the_two_limits() -> None:
    """Decode cannot beat the bytes, prefill cannot beat the operations; both grow with what they move."""
    decode = min(estimate(GATE_UP, 16, c, 132) for c in candidates(GATE_UP, 16, HOPPER, False))
    assert decode > GATE_UP.weight_bytes / 4.3e12
    prefill = min(estimate(GATE_UP, 8192, c, 132) for c in candidates(GATE_UP, 8192, HOPPER, False))
    operations = 2 * 8192 * 5120 * (25600 * 0.5 + 25600)
    assert prefill > operations / 1979e12
    dense = LinearSpec("output", 51200, 5120, (0, 0), (25600, 25600))
    assert estimate(dense, 16, KernelConfig("sm90", 128, 16), 132) > decode


def test_one_processor_is_bound_by_the_bytes_it_loads() -> None:
    """2:4 weights are 0.625 of dense ones, beside the same activations."""
    config = KernelConfig("sm90", 128, 8)
    sparse, dense = (
        estimate(LinearSpec("output", 12800, 5120, (s,), (12800 - s,)), 1, config, 1) for s in (12800, 0)
    )
    assert sparse / dense == pytest.approx((128 * 0.625 + 8) / (128 + 8), rel=0.01)


def test_cycles_of_a_prefill_stage_by_hand() -> None:
    """128 x 256 x 128 columns: two warpgroups read x, each half of A; TMA writes everything once."""
    x, a, metadata = 256 * 128 // 128, 128 * 128 // 128, 128 * 16 // 128
    assert shared_memory_cycles(128, 256, sparse=False) == 2 * x + a + (x + a) == 1024
    assert shared_memory_cycles(128, 256, sparse=True) == 2 * x + a / 2 + (x + a / 2) + 2 * metadata == 928
    assert tensor_cycles(128, 256, sparse=False) == 128 * 256 * 128 / 4096 == 1024
    assert tensor_cycles(128, 256, sparse=True) == 512


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("tokens", [8, 64, 128, 256])
def test_sparse_tiles_wait_for_shared_memory_whatever_their_size(rows: int, tokens: int) -> None:
    ratio = shared_memory_cycles(rows, tokens, True) / tensor_cycles(rows, tokens, True)
    assert ratio == pytest.approx(1 + 80 / tokens + 1 / (rows / 64))
    assert ratio > 1.8


def test_prefill_gains_what_shared_memory_allows() -> None:
    """1024 cycles of a dense stage against 928 of a sparse one, alone or mixed."""

    def best(sparse: int) -> float:
        spec = LinearSpec("input", 5120, 25600, (sparse,), (25600 - sparse,))
        return min(estimate(spec, 16384, c, 132) for c in candidates(spec, 16384, HOPPER, True))

    assert best(0) / best(25600) == pytest.approx(1024 / 928, rel=0.01)
    assert best(0) / best(12800) == pytest.approx(1024 / (1024 + 928) * 2, rel=0.01)


def test_clusters_of_an_h200_by_hand() -> None:
    """Two GPCs of 18 multiprocessors and six of 16, so four of them are in no cluster of 4 or 8."""
    assert [clusters_at_once(132, n) for n in (1, 2, 4, 8)] == [132, 66, 2 * 4 + 6 * 4, 16]
    config = KernelConfig("sm90", 128, 16, 4)
    told = estimate(DOWN, 16, config, 132, clusters=19)  # 40 tiles: three turns, not two
    assert told > estimate(DOWN, 16, config, 132) == estimate(DOWN, 16, config, 132, clusters=32)


def test_few_tiles_want_a_split_of_k() -> None:
    """Down has 40 tiles of 128 rows for 132 multiprocessors: unsplit, most of them would idle."""
    best = min(candidates(DOWN, 16, HOPPER, False), key=lambda c: estimate(DOWN, 16, c, 132))
    assert best.cluster > 1


@pytest.mark.parametrize(("heavy", "light", "clusters"), [(10, 30, 7), (7, 0, 7), (0, 20, 6), (5, 3, 132)])
def test_the_busiest_cluster_is_near_the_mean(heavy: int, light: int, clusters: int) -> None:
    mean = (heavy * 2.0 + light * 1.0) / clusters
    assert mean <= busiest(heavy, light, 2.0, 1.0, clusters) <= mean + 2.0


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 1), (2, 2), (3, 4), (17, 32), (64, 64), (65, 128), (10**6, 32768)]
)
def test_buckets_are_powers_of_two(tokens: int, expected: int) -> None:
    assert bucket(tokens) == expected


def entry(tokens: int = 16, us: float = 10.0, dense_us: float | None = 12.0, **change) -> TuningEntry:
    fields = {
        "split": "output",
        "out_features": 51200,
        "in_features": 5120,
        "sparse_sizes": (12800, 12800),
        "dense_sizes": (12800, 12800),
        "kernel": "sm90",
        "tile_rows": 64,
        "tile_tokens": 16,
        "cluster": 2,
        "multicast": False,
    }
    return TuningEntry(**(fields | change), tokens=tokens, us=us, dense_us=dense_us)


def test_a_measured_bucket_wins_over_the_estimate() -> None:
    entries = {16: entry()}
    assert pick(GATE_UP, 9, HOPPER, 132, entries, False) == KernelConfig("sm90", 64, 16, 2)
    unmeasured = pick(GATE_UP, 65, HOPPER, 132, entries, False)
    assert unmeasured is not None
    assert unmeasured.tile_tokens >= 128


def test_what_the_device_says_of_its_clusters_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no cluster fits, the call runs unsplit; an instance that is not there is an error."""
    alone = pick(DOWN, 16, HOPPER, 132, {}, False, lambda config: 0 if config.cluster > 1 else 132)
    assert alone is not None
    assert alone.cluster == 1
    assert pick(DOWN, 16, HOPPER, 132, {}, False, lambda config: 0) is None

    def clusters(*shape: object) -> int:
        if shape[2] == 8:
            return 0
        raise RuntimeError("spense: linear_sm90 refused the call with status 1")

    monkeypatch.setattr(torch.ops.spense, "sm90_clusters", clusters, raising=False)
    assert extension.sm90_clusters(128, 16, 8, False) == 0
    with pytest.raises(RuntimeError, match="status 1"):
        extension.sm90_clusters(128, 16, 3, False)


def test_measured_configurations_that_cannot_run_here_are_passed_over() -> None:
    wrong = {16: entry(tile_rows=32)}
    assert pick(GATE_UP, 16, HOPPER, 132, wrong, False) in candidates(GATE_UP, 16, HOPPER, False)
    absent = {16: entry(kernel="cutlass", tile_rows=128, tile_tokens=256)}
    assert pick(GATE_UP, 16, HOPPER, 132, absent, False).kernel == "sm90"  # type: ignore[union-attr]
    assert pick(GATE_UP, 16, ADA, 132, {}, True) is None


def test_dense_wins_by_the_mean_over_the_buckets() -> None:
    assert dense_ratio({1: entry(us=10, dense_us=20), 2: entry(us=20, dense_us=10)}) == pytest.approx(1)
    assert dense_ratio({1: entry(dense_us=None)}) is None
    assert dense_ratio({}) is None


def test_tables_are_read_from_the_users_directory_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SPENSE_TUNING_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(table, "PACKAGED", tmp_path / "package")
    for directory, us in (("user", 5.0), ("package", 9.0)):
        made = TuningTable(device="X 1", torch="2", date="d", command="c", entries=(entry(us=us), entry(32)))
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "X_1.json").write_text(made.model_dump_json())
    table.measured.cache_clear()
    found = table.measured("X 1")[table.shape_of(GATE_UP)]
    assert found[16].us == 5.0
    assert sorted(found) == [16, 32]
    assert table.measured("Y") == {}
    assert table_path("X 1") == tmp_path / "user" / "X_1.json"


def test_layers_of_other_codecs_do_not_share_an_entry() -> None:
    bf16 = replace(GATE_UP, codecs=Codecs.of("bf16"))
    assert table.shape_of(GATE_UP) == entry(16).shape
    assert table.shape_of(bf16) == entry(16, codec="bf16").shape
    assert table.shape_of(bf16) != table.shape_of(GATE_UP)


def test_tables_from_before_there_were_codecs_are_of_fp8(tmp_path: Path) -> None:
    made = TuningTable(device="X", torch="2", date="d", command="c", entries=(entry(16),))
    raw = json.loads(made.model_dump_json())
    assert raw["entries"][0].pop("codec") == "fp8"
    (tmp_path / "X.json").write_text(json.dumps(raw))
    assert table.read_table(tmp_path / "X.json") == made


@pytest.mark.parametrize("content", ["{", "[]", '{"device": 1}', "\xff"])
def test_a_broken_table_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "X.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"X\.json is not a tuning table .* `spense tune`"):
        table.read_table(path)


def test_unknown_keys_in_a_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "X.json"
    raw = json.loads(TuningTable(device="X", torch="2", date="d", command="c").model_dump_json())
    path.write_text(json.dumps(raw | {"speed": 1}))
    with pytest.raises(ValueError, match="speed"):
        table.read_table(path)


@pytest.mark.parametrize(
    ("spec", "device", "message"),
    [
        (GATE_UP, "cpu", "runs on CUDA devices"),
        (LinearSpec("output", 64, 64, (32,), (32,), Codecs.of("bf16")), "cuda", "FP8 weights, not bf16"),
        (LinearSpec("output", 64, 64, (32,), (32,), Codecs.of("int8")), "cuda", "FP8 weights, not INT8"),
        (LinearSpec("output", 64, 64, (0,), (64,)), "cuda", "no 2:4 region"),
        (LinearSpec("output", 64, 72, (32,), (32,)), "cuda", "multiple of 16"),
        (LinearSpec("output", 320, 64, (32,) * 5, (32,) * 5), "cuda", "at most 4"),
    ],
)
def test_layers_the_cuda_back_end_cannot_run(spec: LinearSpec, device: str, message: str) -> None:
    backend = next(b for b in available_backends() if b.name == "cuda")
    assert message in (backend.why_not(spec, torch.device(device)) or "")


def test_nothing_is_measured_for_other_codecs(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_spense(tiny_llama, tmp_path / "spense", codec="int8"))
    with pytest.raises(ValueError, match="the GPU kernels take FP8 weights, not INT8: there is nothing to"):
        layer_specs(checkpoint)
