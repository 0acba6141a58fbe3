"""``spense::linear`` and ``spense::dense_linear``, and the one schema of every operator on compressed layers.

``spense::linear`` computes on the compressed tensors of one (possibly fused) layer. ``spense::dense_linear``
is the same arithmetic on a matrix that was decompressed once at load: for CPUs and weights that our kernels
do not know (``cpu-fp32``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef, custom_op

from vllm_spense.ops.linear.arguments import SCHEMA, LinearArguments
from vllm_spense.ops.linear.reference import matmul_scaled, reference_linear

Compute = Callable[[torch.Tensor, Any, LinearArguments, torch.dtype], Any]
"""``(x, x_scale, layer, out_dtype)`` to the operator's result."""


def operator(name: str, returns: str, *, cpu: Compute, cuda: Compute, fake: Compute) -> CustomOpDef:
    """Register ``spense::name(x, x_scale, *layer.flat(), out_dtype)``, opaque to compilers.

    ``returns``: its result in the language of schemas; ``fake``: what shapes and dtypes the result has.
    """
    schema = f"(Tensor x, Tensor? x_scale, {SCHEMA}, ScalarType out_dtype) -> {returns}"
    defined = custom_op(f"spense::{name}", _flat(cpu), mutates_args=(), device_types="cpu", schema=schema)
    defined.register_kernel("cuda")(_flat(cuda))
    defined.register_fake(_flat(fake))
    return defined


def _flat(compute: Compute) -> Callable[..., Any]:
    def flat(x: torch.Tensor, x_scale: torch.Tensor | None, *rest: Any) -> Any:
        *layer, out_dtype = rest
        return compute(x, x_scale, LinearArguments.unflat(*layer), out_dtype)

    return flat


def empty_output(
    x: torch.Tensor, x_scale: torch.Tensor | None, layer: LinearArguments, out_dtype: torch.dtype
) -> torch.Tensor:
    """``y [M, N]``, not filled: where the operators' results go, and what their fakes give."""
    return x.new_empty((x.shape[0], layer.out_features), dtype=out_dtype)


def _cuda(
    x: torch.Tensor, x_scale: torch.Tensor | None, layer: LinearArguments, out_dtype: torch.dtype
) -> torch.Tensor:
    from vllm_spense.ops.linear.cuda import cuda_linear

    return cuda_linear(x, x_scale, layer, out_dtype)


_linear = operator("linear", "Tensor", cpu=reference_linear, cuda=_cuda, fake=empty_output)


def linear(
    x: torch.Tensor, x_scale: torch.Tensor | None, layer: LinearArguments, out_dtype: torch.dtype
) -> torch.Tensor:
    """``y [M, N] = x Wᵀ`` for a Spense weight (SpenseGPT, arXiv 2606.10445, section 3).

    ``x [M, K]``: e4m3, or int8 for int8 weights, with ``x_scale [M, 1]`` fp32, or float without a scale. On
    CUDA devices the compiled kernels run layers in the layout ``blocked``; everything else is
    :func:`reference_linear`.
    Raises ``ValueError`` for output dtypes other than bf16, fp16 and fp32.
    """
    return _linear(x, x_scale, *layer.flat(), out_dtype)


@custom_op("spense::dense_linear", mutates_args=(), device_types=("cpu", "cuda"))
def dense_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``y [M, N] = x Wᵀ`` on the decompressed matrix ``weight [N, K]`` fp32 (stored values, no scale).

    Same arithmetic as :func:`linear`; ``weight_scale``, ``bias``: ``[N]``.
    """
    return matmul_scaled(x, x_scale, weight, weight_scale, bias, out_dtype)


@dense_linear.register_fake
def _(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
