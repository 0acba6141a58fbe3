"""From a dense Hugging Face model to a Spense checkpoint. Needs transformers."""

from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.pipeline import PruneReport, prune
from vllm_spense.pruning.progress import PruneProgress

__all__ = ["PruneConfig", "PruneProgress", "PruneReport", "prune"]
