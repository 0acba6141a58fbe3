"""Which intermediate indices stay dense."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.pruning.choice.selection import dense_count, index_scores, permutation


@pytest.mark.parametrize(
    ("intermediate", "ratio", "alignment", "expected"),
    [
        (1536, 0.5, 64, 768),
        (1536, 0.25, 64, 384),
        (208, 0.5, 64, 128),
        (192, 0.5, 64, 128),  # 96 lies in the middle: more stays dense
        (200, 0.01, 64, 0),
        (200, 0.0, 64, 0),
        (201, 1.0, 64, 201),
        (190, 0.99, 64, 190),
        (1536, 0.4, 8, 616),
    ],
)
def test_dense_count(intermediate: int, ratio: float, alignment: int, expected: int) -> None:
    assert dense_count(intermediate, ratio, alignment) == expected


def test_dense_count_refuses_a_ragged_sparse_part() -> None:
    with pytest.raises(ValueError, match=r"intermediate size 100 .*leaves 100.*multiple of 8"):
        dense_count(100, 0.0, 64)


def test_index_scores_by_loops() -> None:
    torch.manual_seed(0)
    gate, up, down = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6)
    h_in, h_down = torch.rand(4, 4) + torch.eye(4), torch.rand(6, 6) + torch.eye(6)
    total = [0.0] * 6
    for projection, h, axis in ((gate, h_in, 0), (up, h_in, 0), (down, h_down, 1)):
        scores = []
        for i in range(6):
            cells = []
            for j in range(4):
                w, hj = (projection[i, j], h[j, j]) if axis == 0 else (projection[j, i], h[i, i])
                cells.append(abs(float(w)) * float(hj) ** 0.5)
            scores.append(sum(cells) / 4)
        mean = sum(scores) / 6
        total = [t + s / mean for t, s in zip(total, scores, strict=True)]
    torch.testing.assert_close(index_scores([gate, up], down, h_in, h_down), torch.tensor(total))


def test_permutation_puts_the_best_last_in_their_order() -> None:
    scores = torch.tensor([5.0, 1, 4, 2, 3, 0])
    assert permutation(scores, 6, 3).tolist() == [1, 3, 5, 0, 2, 4]
    assert permutation(None, 6, 3).tolist() == list(range(6))
    assert permutation(torch.ones(6), 6, 2).tolist() == list(range(6))  # ties: the later index
    for dense in (0, 6):
        assert permutation(scores, 6, dense).tolist() == list(range(6))
