"""Measure the quality of dense and pruned checkpoints. Needs transformers."""

from vllm_spense.evaluation.agreement import Agreement
from vllm_spense.evaluation.continuation import Continuation
from vllm_spense.evaluation.loading import load_model, load_tokenizer
from vllm_spense.evaluation.measure import Evaluation, evaluate

__all__ = ["Agreement", "Continuation", "Evaluation", "evaluate", "load_model", "load_tokenizer"]
