"""The Spense checkpoint format: the one place where pruner, plugin and kernels meet.

Needs torch, safetensors and pydantic; imports neither vLLM nor transformers.
"""

from vllm_spense.format.checkpoint import Checkpoint
from vllm_spense.format.codecs.base import dequantize
from vllm_spense.format.codecs.fp8 import FP8_DTYPE, FP8_MAX, quantize_per_channel
from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.layout import Axis, Layout, Split
from vllm_spense.format.linear import Codecs, LinearFormat, pack_linear
from vllm_spense.format.schema import ModuleSpec, SpenseCheckpointConfig, parse_config
from vllm_spense.format.sparse24 import compress, decompress
from vllm_spense.format.writer import CheckpointWriter

__all__ = [
    "FP8_DTYPE",
    "FP8_MAX",
    "Axis",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "Codecs",
    "Layout",
    "ModuleSpec",
    "SpenseCheckpointConfig",
    "Split",
    "LinearFormat",
    "compress",
    "decompress",
    "dequantize",
    "pack_linear",
    "parse_config",
    "quantize_per_channel",
]
