"""Shared fixtures: tiny checkpoints, the trained model's files, and runs of real vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tests.toy_codec  # noqa: F401  registered, so that every test of codecs has it
from tests.asset_paths import ASSETS
from tests.bitsandbytes_models import quantise_model
from tests.tiny import make_llama, make_spense

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def assets() -> Path:
    """Directory with SmolLM2-135M-Instruct and the Wikipedia split; `make setup` fetches it."""
    if not (ASSETS / "SmolLM2-135M-Instruct" / "config.json").is_file():
        pytest.fail(f"{ASSETS} lacks the trained model: run `make setup` (or set SPENSE_ASSETS)")
    return ASSETS


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_spense(tiny_llama: Path) -> Path:
    """FP8, with biases, in one weight file."""
    return make_spense(tiny_llama, tiny_llama.parent / "spense")


@pytest.fixture(scope="session")
def tiny_spense_bf16(tiny_llama: Path) -> Path:
    return make_spense(tiny_llama, tiny_llama.parent / "spense-bf16", codec="bf16")


@pytest.fixture(scope="session")
def tiny_bitsandbytes(tiny_llama: Path) -> Path:
    """NF4 with nested absmax, as transformers and bitsandbytes write it, in one weight file."""
    return quantise_model(tiny_llama, tiny_llama.parent / "bitsandbytes", bnb_4bit_use_double_quant=True)
