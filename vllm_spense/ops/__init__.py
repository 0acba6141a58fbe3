"""Operators on Spense layers, a folder for each, and what they share.

Importing this package defines ``linear``, ``dense_linear``, ``triton_linear``, ``linear_silu_mul``,
``sparse_mlp`` and ``sparse_input_linear`` of ``torch.ops.spense``, on CPUs and CUDA
devices. That takes torch and pydantic; compiled kernels and Triton are loaded when a layer is to run on them.
"""

from vllm_spense.ops.activations import quantize_per_token, quantize_with_amax
from vllm_spense.ops.backend import Backend
from vllm_spense.ops.linear.arguments import LinearArguments
from vllm_spense.ops.linear.op import dense_linear
from vllm_spense.ops.linear.select import available_backends, select_backend
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.ops.mlp.silu_mul import linear_silu_mul
from vllm_spense.ops.mlp.sparse_input import sparse_input_linear
from vllm_spense.ops.mlp.sparse_mlp import sparse_mlp

__all__ = [
    "Backend",
    "LinearArguments",
    "LinearSpec",
    "available_backends",
    "dense_linear",
    "linear_silu_mul",
    "quantize_per_token",
    "quantize_with_amax",
    "select_backend",
    "sparse_input_linear",
    "sparse_mlp",
]
