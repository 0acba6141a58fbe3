"""Measure the quality of dense and pruned checkpoints. Needs transformers."""

from vllm_spense.evaluation.loading import load_model, load_tokenizer
from vllm_spense.evaluation.perplexity import Perplexity, evaluate

__all__ = ["Perplexity", "evaluate", "load_model", "load_tokenizer"]
