"""The border between rows and whole matrices, and the latter against the definition."""

from __future__ import annotations

import pytest
import torch

from tests.mlps import ACTIVATIONS, assert_within_rounding, mlp
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.many_tokens import (
    MOST_TOKENS,
    UNKNOWN,
    dense_input,
    dense_mlp,
    most_tokens,
    relative_cost,
    shape_for,
)
from vllm_spense.ops.mlp.sparse_input import SparseInputSpec, sparse_input_definition
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpSpec


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("bias", [False, True])
def test_whole_matrices_compute_the_mlp(activation: Activation, bias: bool) -> None:
    given = mlp(5, 24, 70, 12, 0.4, torch.float32, bias=bias)
    assert_within_rounding(dense_mlp(*given.tensors(), activation), given, activation)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [None, torch.randn(12)])
def test_a_whole_matrix_computes_the_layer(bias: torch.Tensor | None) -> None:
    given = mlp(5, 24, 70, 12, 0.4, torch.float32)
    given.gate[1, 3] = float("nan")
    y = dense_input(given.gate, given.down_t, bias, 0.5)
    torch.testing.assert_close(
        y, sparse_input_definition(given.gate, given.down_t, bias, 0.5), equal_nan=True
    )


def test_the_border() -> None:
    """Denser, or more tokens: matrices sooner; all neurons: always."""
    densities = (0.0, 0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0)
    borders = [most_tokens(density) for density in densities]
    assert borders == sorted(borders, reverse=True)
    assert (borders[0], borders[-1]) == (MOST_TOKENS, 0)
    assert most_tokens(None) == most_tokens(UNKNOWN) > 1
    for density, border in zip(densities, borders, strict=True):
        assert border == MOST_TOKENS or relative_cost(density, border + 1) >= 1
        assert border == 0 or relative_cost(density, border) < 1


def test_one_token_costs_its_own_rows() -> None:
    for density in (0.02, 0.1, 0.5):
        assert relative_cost(density, 1) == pytest.approx(1.1 * density)
        assert relative_cost(density, 2) > relative_cost(density, 1)


@pytest.mark.parametrize(
    ("density", "capacity"),
    [(0.0, 31), (0.005, 31), (0.05, 31), (None, 63), (0.1, 63), (0.3, 127), (1.0, 127)],
)
def test_the_smallest_words_that_hold_a_tile(density: float | None, capacity: int) -> None:
    shape = shape_for(5632, density)
    assert (shape.hidden, shape.tile, shape.capacity) == (5632, 256, capacity)


@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan")])
def test_a_density_is_a_share(density: float) -> None:
    with pytest.raises(ValueError, match="must be a share from 0 to 1"):
        SparseMlpSpec(8, 8, 8, Activation("relu"), density=density)
    with pytest.raises(ValueError, match="must be a share from 0 to 1"):
        SparseInputSpec(8, 8, density=density)
