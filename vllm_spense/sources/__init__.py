"""Dense model directories: what they are, what they are called, and why one is refused."""

from vllm_spense.sources.directory import check_source, check_tensors, check_tokenizer
from vllm_spense.sources.names import BaseModel, base_model

__all__ = ["BaseModel", "base_model", "check_source", "check_tensors", "check_tokenizer"]
