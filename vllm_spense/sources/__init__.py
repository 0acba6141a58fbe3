"""Dense model directories: what they are, what they are called, and why one is refused."""

from vllm_spense.sources.architecture import (
    building,
    check_positions,
    check_windows,
    load_config,
    positions,
    refusal,
)
from vllm_spense.sources.directory import check_source, check_tensors
from vllm_spense.sources.names import BaseModel, base_model
from vllm_spense.sources.tokenizer import check_tokenizer, load_tokenizer

__all__ = [
    "BaseModel",
    "base_model",
    "building",
    "check_positions",
    "check_source",
    "check_tensors",
    "check_tokenizer",
    "check_windows",
    "load_config",
    "load_tokenizer",
    "positions",
    "refusal",
]
