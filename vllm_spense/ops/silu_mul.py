"""gate_up with SiLU·mul in its epilogue: an option for models that call it instead of layer and activation.

The unfused way writes [gate | up] and reads it again for the activation, then reads the result twice to
quantise it (largest value, rounding). This operator writes ``silu(gate) · up`` and each token's largest
value, so that quantising for the down layer is one pass (``quantize_with_amax``).
"""

from __future__ import annotations

import functools

import torch

from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.ops import extension
from vllm_spense.ops.kernel_config import KernelConfig, candidates, estimate, pairs
from vllm_spense.ops.linear import OUT_DTYPES, linear, reference_linear
from vllm_spense.ops.spec import LinearSpec
from vllm_spense.ops.tuning import bucket


def silu_mul(gate_up: torch.Tensor, out_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``silu(gate) · up`` of ``[M, 2 I]`` in fp32, rounded once, and the largest absolute value per token."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    y = (torch.nn.functional.silu(gate) * up).to(out_dtype)
    return y, y.float().abs().amax(dim=-1, keepdim=True)


@torch.library.custom_op("spense::linear_silu_mul", mutates_args=(), device_types="cpu")
def linear_silu_mul(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    sparse_values: torch.Tensor,
    sparse_meta: torch.Tensor,
    dense_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    sparse_sizes: list[int],
    dense_sizes: list[int],
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(y [M, I], amax [M, 1])`` of a merged gate_up layer; arguments as in ``spense::linear``.

    The layer is an output split of two shards with equal regions, gate first; ``ValueError`` otherwise.
    Differs from layer and activation in sequence by one rounding less: [gate | up] stays in fp32.
    """
    _check(sparse_sizes, dense_sizes, out_dtype)
    layer = (x, x_scale, sparse_values, sparse_meta, dense_weight, weight_scale, bias)
    return silu_mul(reference_linear(*layer, sparse_sizes, dense_sizes, True, torch.float32), out_dtype)


@linear_silu_mul.register_fake
def _(
    x,
    x_scale,
    sparse_values,
    sparse_meta,
    dense_weight,
    weight_scale,
    bias,
    sparse_sizes,
    dense_sizes,
    out_dtype,
):
    y = x.new_empty((x.shape[0], sparse_sizes[0] + dense_sizes[0]), dtype=out_dtype)
    return y, x.new_empty((x.shape[0], 1), dtype=torch.float32)


@linear_silu_mul.register_kernel("cuda")
def _(
    x,
    x_scale,
    sparse_values,
    sparse_meta,
    dense_weight,
    weight_scale,
    bias,
    sparse_sizes,
    dense_sizes,
    out_dtype,
):
    _check(sparse_sizes, dense_sizes, out_dtype)
    layer = (x, x_scale, sparse_values, sparse_meta, dense_weight, weight_scale, bias)
    properties = torch.cuda.get_device_properties(x.device)
    capability = (properties.major, properties.minor)
    if capability != (9, 0) or sparse_meta.dim() != 3 or extension.why_not_loaded():
        return silu_mul(linear(*layer, sparse_sizes, dense_sizes, True, torch.float32), out_dtype)
    spec = LinearSpec(
        *("output", weight_scale.numel(), x.shape[1], tuple(sparse_sizes), tuple(dense_sizes)),
        UNIFORM_FP8,
    )
    y = torch.empty((x.shape[0], spec.out_features // 2), dtype=out_dtype, device=x.device)
    amax = torch.zeros((x.shape[0], 1), device=x.device)
    if y.numel():
        config = paired_config(spec, x.shape[0], properties.multi_processor_count)
        if bias is not None:
            bias = bias.to(out_dtype)
        torch.ops.spense.linear_silu_mul_sm90(
            *(x.contiguous(), *layer[1:6], bias, sparse_sizes, dense_sizes),
            *(config.tile_tokens, config.cluster, config.multicast, True, y, amax),
        )
    return y, amax


@functools.lru_cache(maxsize=4096)
def paired_config(spec: LinearSpec, tokens: int, processors: int) -> KernelConfig:
    """The configuration with the lowest estimate among those that are compiled for pairs of gate and up."""
    legal = [c for c in candidates(spec, bucket(tokens), (9, 0), cutlass=False) if pairs(c)]
    return min(legal, key=lambda c: (estimate(spec, tokens, c, processors), c))


def _check(sparse_sizes: list[int], dense_sizes: list[int], out_dtype: torch.dtype) -> None:
    if len(sparse_sizes) != 2 or sparse_sizes[0] != sparse_sizes[1] or dense_sizes[0] != dense_sizes[1]:
        raise ValueError(f"gate and up must have equal regions, not {sparse_sizes} and {dense_sizes}")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"output dtype {out_dtype} must be one of {OUT_DTYPES}")
