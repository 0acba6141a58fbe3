"""``torch.ops.spense.*``: the Spense linear layer, its reference definition and its back ends.

Importing it registers the operators, the CUDA one too; it needs torch and pydantic.
"""

from vllm_spense.ops.dispatch import Backend, LinearSpec, available_backends, select_backend
from vllm_spense.ops.linear import dense_linear, linear
from vllm_spense.ops.online import online_layout, prune_and_pack
from vllm_spense.ops.quantize import quantize_per_token, quantize_with_amax
from vllm_spense.ops.silu_mul import linear_silu_mul

__all__ = [
    "Backend",
    "LinearSpec",
    "available_backends",
    "dense_linear",
    "linear",
    "linear_silu_mul",
    "online_layout",
    "prune_and_pack",
    "quantize_per_token",
    "quantize_with_amax",
    "select_backend",
]
