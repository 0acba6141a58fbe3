"""The kernels' own schedule (tile_plan.h, called through the extension): complete, no repeats, balanced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SETTINGS = settings(max_examples=150, deadline=None)


def plan(
    tokens: int,
    sparse: list[int],
    dense: list[int],
    *,
    output_split: bool = True,
    features: int = 512,
    tile_rows: int = 128,
    tile_tokens: int = 16,
    group: int = 1,
    sparse_k: int = 256,
    lead: int = 1,
    clusters: int = 132,
) -> torch.Tensor:
    """int32 [units, 7]: cluster, turn, first row, end row, first token, sparse stages, dense stages."""
    total = sum(sparse) + sum(dense)
    n, k = (total, features) if output_split else (features, total)
    shape = (tile_rows, tile_tokens, group, sparse_k, lead, clusters)
    return torch.ops.spense.tile_plan(tokens, n, k, sparse, dense, output_split, *shape)


@SETTINGS
@given(
    sizes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), min_size=1, max_size=4),
    tokens=st.integers(1, 700),
    tile=st.sampled_from([(64, 16, 1), (128, 16, 1), (128, 128, 1), (128, 128, 2), (128, 256, 4)]),
    lead=st.integers(0, 3),
    clusters=st.integers(1, 140),
)
def test_an_output_split_is_covered_exactly_once(sizes, tokens, tile, lead, clusters) -> None:
    sparse, dense = ([s[i] for s in sizes] for i in range(2))
    rows, wide, group = tile
    units = plan(
        *(tokens, sparse, dense),
        tile_rows=rows,
        tile_tokens=wide,
        group=group,
        lead=lead,
        clusters=clusters,
    )
    total = sum(sparse) + sum(dense)
    is_sparse = torch.cat([torch.tensor([True] * s + [False] * d) for s, d in sizes]).bool()
    seen = torch.zeros(total, -(-tokens // wide), dtype=torch.int32)
    for _, _, first, end, token, sparse_stages, dense_stages in units.tolist():
        seen[first:end, token // wide] += 1
        assert (sparse_stages, dense_stages) == ((2, 0) if is_sparse[first] else (0, 4))
        assert is_sparse[first:end].eq(is_sparse[first]).all(), "a unit stays inside one region"
    assert seen.eq(1).all()


@SETTINGS
@given(
    rows=st.integers(1, 2000),
    sparse=st.integers(0, 20),
    dense=st.integers(0, 20),
    tokens=st.integers(1, 300),
    clusters=st.integers(1, 140),
)
def test_an_input_split_has_both_kinds_of_stages_in_every_tile(rows, sparse, dense, tokens, clusters) -> None:
    units = plan(*(tokens, [sparse * 40], [dense * 48]), output_split=False, features=rows, clusters=clusters)
    seen = torch.zeros(rows, -(-tokens // 16), dtype=torch.int32)
    for _, _, first, end, token, sparse_stages, dense_stages in units.tolist():
        seen[first:end, token // 16] += 1
        assert sparse_stages == -(-sparse * 40 // 256)
        assert dense_stages == -(-dense * 48 // 128)
    assert seen.eq(1).all()


@pytest.mark.parametrize(("sparse", "dense"), [(12800, 12800), (19200, 6400), (25600, 0), (0, 25600)])
@pytest.mark.parametrize("lead", [1, 2])
@pytest.mark.parametrize(("tokens", "tile_tokens", "group"), [(16, 16, 1), (512, 128, 2), (8192, 256, 4)])
def test_a_real_layer_is_balanced(sparse, dense, lead, tokens, tile_tokens, group) -> None:
    """Qwen3-32B gate_up: no cluster has more than one heavy unit above the mean of all."""
    clusters = 132 // group
    units = plan(
        *(tokens, [sparse, sparse], [dense, dense]),
        features=5120,
        tile_tokens=tile_tokens,
        group=group,
        lead=lead,
        clusters=clusters,
    )
    heavy = (1 + lead) / 1.0
    load = torch.zeros(clusters)
    for cluster, _, _, _, _, sparse_stages, _ in units.tolist():
        load[cluster] += 1 if sparse_stages else heavy
    assert load.max() <= load.mean() + heavy


@SETTINGS
@given(
    sparse=st.integers(0, 700),
    dense=st.integers(0, 700),
    tokens=st.integers(1, 300),
    group=st.sampled_from([1, 2]),
    clusters=st.integers(1, 140),
)
def test_pairs_of_gate_and_up_cover_the_activation_once(sparse, dense, tokens, group, clusters) -> None:
    """Tiles of 64 rows of gate (and of up): y is [tokens, sparse + dense]."""
    sizes = ([sparse] * 2, [dense] * 2, True)
    shape = (64, 16, group, 256, 1, clusters, True)
    units = torch.ops.spense.tile_plan(tokens, 2 * (sparse + dense), 512, *sizes, *shape)
    seen = torch.zeros(sparse + dense, -(-tokens // 16), dtype=torch.int32)
    for _, _, first, end, token, sparse_stages, dense_stages in units.tolist():
        seen[first:end, token // 16] += 1
        assert (sparse_stages, dense_stages) == ((2, 0) if first < sparse else (0, 4))
    assert seen.eq(1).all()


def test_heavy_units_go_first_and_clusters_work_in_turns() -> None:
    units = plan(16, [1280, 1280], [640, 640], clusters=7)
    for cluster in range(7):
        mine = units[units[:, 0] == cluster]
        assert mine[:, 1].tolist() == list(range(len(mine)))
        kinds = (mine[:, 6] == 0).int().tolist()
        assert kinds == sorted(kinds), "dense tiles, then sparse ones"


def test_neighbouring_clusters_share_operands_at_large_m() -> None:
    """One wave of a prefill touches few row groups and few token tiles, so that both stay in L2."""
    units = plan(8192, [25600], [0], features=5120, tile_tokens=256, group=2, clusters=66)
    first_wave = units[units[:, 1] == 0]
    assert first_wave[:, 4].unique().numel() <= 8
    assert first_wave[:, 2].unique().numel() <= 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparse": [64] * 5, "dense": [0] * 5}, "1 to 4 fused shards"),
        ({"sparse": [-8], "dense": [16]}, "negative region size"),
        ({"sparse": [8, 8], "dense": [8, 8], "output_split": False}, "an input split has one shard"),
        ({"sparse": [8], "dense": [8], "clusters": 0}, "sizes must be positive"),
    ],
)
def test_bad_sizes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        plan(16, **change)
