"""Every byte at every place against a plain look at the values; where the first bad one is."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.format import FP8_DTYPE, CheckpointError
from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.format.sparse24 import LEGAL_NIBBLES
from vllm_spense.format.validate import check_values

LEGAL_META = {low | high << 4 for low in LEGAL_NIBBLES for high in LEGAL_NIBBLES}
NAN = {0x7F, 0xFF}


def refused_at(short: str, values: torch.Tensor) -> int | None:
    try:
        check_values({short: values}, UNIFORM_FP8, module="m")
    except CheckpointError as error:
        return int(str(error).split("at flat index ")[1].split(".")[0])
    return None


@pytest.mark.parametrize("size", [16, 19])
@pytest.mark.parametrize("short", ["sparse_meta", "dense_weight"])
def test_every_byte_at_every_place(short: str, size: int) -> None:
    meta = short == "sparse_meta"
    legal = LEGAL_META if meta else set(range(256)) - NAN
    neighbours = sorted(legal)[:: len(legal) // size][:size]
    for place in (0, 3, 7, 8, size - 1):
        for byte in range(256):
            values = torch.tensor(neighbours, dtype=torch.uint8)
            values[place] = byte
            found = refused_at(short, values if meta else values.view(FP8_DTYPE))
            assert found == (None if byte in legal else place), (byte, place)


@pytest.mark.parametrize("short", ["sparse_meta", "dense_weight"])
def test_a_bad_byte_in_any_part(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_spense.format.linear._CACHED_BYTES", 16)
    monkeypatch.setattr("vllm_spense.format.codecs.fp8._CACHED_BYTES", 16)
    for place in range(40):  # two and a half parts of 16 bytes
        values = torch.full((40,), 0x44, dtype=torch.uint8)
        dtype = torch.uint8 if short == "sparse_meta" else FP8_DTYPE
        assert refused_at(short, values.view(dtype)) is None
        values[place] = 0x7F
        assert refused_at(short, values.view(dtype)) == place


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_views_into_a_larger_tensor(offset: int) -> None:
    """What lies outside of the view does not count, wherever it starts."""
    stored = torch.full((64,), 0x7F, dtype=torch.uint8)
    stored[offset : offset + 24] = 1
    view = stored[offset : offset + 24]
    assert refused_at("sparse_values", view.view(FP8_DTYPE)) is None
    stored[offset + 13] = 0xFF
    assert refused_at("sparse_values", view.view(FP8_DTYPE)) == 13
    columns = torch.ones(8, 16, dtype=torch.uint8)
    columns[:, 8:] = 0x7F
    assert refused_at("dense_weight", columns[:, :8].view(FP8_DTYPE)) is None
