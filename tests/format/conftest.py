"""One tiny valid Spense checkpoint per weight dtype; tests copy it before they damage it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_llama, make_spense


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_spense(tiny_llama: Path) -> Path:
    """FP8, with biases, in one weight file."""
    return make_spense(tiny_llama, tiny_llama.parent / "spense")


@pytest.fixture(scope="session")
def tiny_spense_bf16(tiny_llama: Path) -> Path:
    return make_spense(tiny_llama, tiny_llama.parent / "spense-bf16", weight_dtype="bfloat16")
