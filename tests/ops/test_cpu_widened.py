"""The fp32 matrix in parts, bit for bit against the plain one."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.format import FP8_DTYPE
from vllm_spense.format.sparse24 import LEGAL_NIBBLES
from vllm_spense.ops import LinearArguments
from vllm_spense.ops.linear.cpu import widened_weight
from vllm_spense.ops.linear.reference import full_weight

NAN = (0x7F, 0xFF)
NUMBERS = torch.tensor([byte for byte in range(256) if byte not in NAN], dtype=torch.uint8)
META = torch.tensor([a | b << 4 for a in LEGAL_NIBBLES for b in LEGAL_NIBBLES], dtype=torch.uint8)


def draw(choices: torch.Tensor, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Random ``[rows, columns]`` in which, if it is large enough, every choice is."""
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns
    index = torch.cat(
        [torch.randperm(len(choices), generator=generator) for _ in range(count // len(choices) + 1)]
    )
    return choices[index[:count]].view(rows, columns)


def layer(sparse: list[int], dense: list[int], other: int, output_split: bool) -> LinearArguments:
    """What both functions take; ``other``: K of an output split, N of an input split."""
    shape = (sum(sparse), other) if output_split else (other, sum(sparse))
    rest = (sum(dense), other) if output_split else (other, sum(dense))
    values = draw(NUMBERS, shape[0], shape[1] // 2, 0).view(FP8_DTYPE)
    meta = draw(META, shape[0], shape[1] // 8, 1)
    return LinearArguments(
        values, meta, draw(NUMBERS, *rest, 2).view(FP8_DTYPE), None, None, sparse, dense, output_split
    )


CASES = {
    "gate and up": layer([24, 40], [16, 0], 72, True),
    "only dense, K no multiple of 8": layer([0], [19], 28, True),
    "only sparse": layer([33], [0], 40, True),
    "one row": layer([1], [1], 8, True),
    "down": layer([56], [21], 37, False),
    "down, only dense": layer([0], [30], 19, False),
    "down, only sparse": layer([64], [0], 5, False),
    "wide": layer([8], [3], 4104, True),
}


@pytest.mark.parametrize("part", [1, 100, 1000, 1 << 19])
@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_bits(arguments: LinearArguments, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_spense.ops.linear.cpu._PART", part)
    wanted = full_weight(arguments).float()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
    try:
        got = widened_weight(arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))


def test_every_number() -> None:
    numbers = NUMBERS.view(FP8_DTYPE)[None]
    empty = (
        torch.empty(0, len(NUMBERS) // 2, dtype=FP8_DTYPE),
        torch.empty(0, len(NUMBERS) // 8, dtype=torch.uint8),
    )
    got = widened_weight(LinearArguments(*empty, numbers, None, None, [0], [1], True))
    assert torch.equal(got.view(torch.int32), numbers.float().view(torch.int32))


@pytest.mark.parametrize("nibble", LEGAL_NIBBLES)
def test_every_pair_of_places(nibble: int) -> None:
    """Two different numbers, the second negative: both come to their places and signs stay with them."""
    values = torch.tensor([[1.5, -0.25, -3.0, 2.0]]).to(FP8_DTYPE)
    meta = torch.tensor([[nibble | nibble << 4]], dtype=torch.uint8)
    wanted = [0.0] * 8
    for group, pair in enumerate([(1.5, -0.25), (-3.0, 2.0)]):
        wanted[4 * group + nibble % 4], wanted[4 * group + nibble // 4] = pair
    empty = torch.empty(0, 8, dtype=FP8_DTYPE)
    layer = LinearArguments(values, meta, empty, None, None, [1], [0], True)
    assert widened_weight(layer).tolist() == [wanted]


def test_columns_of_a_larger_matrix() -> None:
    """Views that are not contiguous, as a tensor-parallel slice may be."""
    down = CASES["down"]
    wide = [torch.cat([tensor, tensor], dim=1)[:, : tensor.shape[1]] for tensor in down[:3]]
    assert not wide[0].is_contiguous()
    views = LinearArguments(*wide, *down[3:])
    assert torch.equal(widened_weight(views), full_weight(down).float())
