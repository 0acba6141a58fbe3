"""The transformers network that a model directory describes, and its tensors' names in the files."""

from vllm_spense.network.build import auto_class, language_head, logits_at, scored_positions
from vllm_spense.network.names import SpenseNames, module_names, spense_names, stored_names

__all__ = [
    "SpenseNames",
    "auto_class",
    "language_head",
    "logits_at",
    "module_names",
    "scored_positions",
    "spense_names",
    "stored_names",
]
