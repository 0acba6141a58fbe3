"""What GPU tests say about a wrong result."""

from __future__ import annotations

import re

import torch

from tests.gpu.diagnosis import probe_columns, wrong


def test_the_metric_sees_small_faults() -> None:
    expected = torch.randn(40, 640, generator=torch.Generator().manual_seed(0)).double()
    expected[7] *= 1e-3
    good = expected.bfloat16()
    assert wrong(good, expected) is None
    for damage in (
        lambda y: y[3].__setitem__(100, float("nan")),
        lambda y: y[3].__setitem__(100, y[3, 100] + 1),
        lambda y: y[7].mul_(-1),
        lambda y: y[:, 128:192].zero_(),
    ):
        y = good.clone()
        damage(y)
        assert wrong(y, expected) is not None
    y = good.clone()
    y[:, 128:192] = 0
    assert "slab of 64 rows: 2: 0.9" in (wrong(y, expected) or "")


def test_the_probe_names_the_column_that_is_there_instead() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(64, 32, generator=generator) * 8).to(torch.float8_e4m3fn).double()
    order = list(range(32))
    order[5], order[20] = 20, 5
    shuffled = weight[:, order]

    def call(x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ shuffled.T).bfloat16()

    text = probe_columns(call, weight, range(32), 8, boundary=16)
    assert "2 of 32 columns wrong" in text
    assert re.search(r"k=5 \(2:4\): .* most like k=20", text)
    assert re.search(r"k=20 \(dense\): .* most like k=5", text)
    shuffled = weight
    assert "all right" in probe_columns(call, weight, range(32), 8)
