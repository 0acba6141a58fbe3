"""Train a pruned checkpoint for a few minutes towards its dense original. Needs transformers."""

from vllm_spense.recovery.config import RecoveryConfig
from vllm_spense.recovery.pipeline import RecoveryReport, recover
from vllm_spense.recovery.training import RecoveryError, RecoveryProgress

__all__ = ["RecoveryConfig", "RecoveryError", "RecoveryProgress", "RecoveryReport", "recover"]
