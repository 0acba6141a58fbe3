"""A tiny random Llama with a tokenizer, and calibration text for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_llama
from tests.tiny_text import add_tokenizer, write_text


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, hidden 144, intermediate 208 (no multiples of 128), biases everywhere."""
    return add_tokenizer(make_llama(tmp_path_factory.mktemp("dense") / "model"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")
