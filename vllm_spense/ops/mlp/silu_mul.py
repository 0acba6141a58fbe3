"""gate_up with SiLU·mul in its epilogue: an option for models that call it instead of layer and activation.

The unfused way writes [gate | up] and reads it again for the activation, then reads the result twice to
quantise it (largest value, rounding). This operator writes ``silu(gate) · up`` and each token's largest
value, so that quantising for the down layer is one pass (``quantize_with_amax``).
"""

from __future__ import annotations

import functools

import torch

from vllm_spense.ops import extension
from vllm_spense.ops.linear.arguments import LinearArguments
from vllm_spense.ops.linear.configs import KernelConfig, candidates, estimate, pairs
from vllm_spense.ops.linear.op import linear, operator
from vllm_spense.ops.linear.reference import OUT_DTYPES, reference_linear
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.ops.linear.table import bucket


def silu_mul(gate_up: torch.Tensor, out_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``silu(gate) · up`` of ``[M, 2 I]`` in fp32, rounded once, and the largest absolute value per token."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    y = (torch.nn.functional.silu(gate) * up).to(out_dtype)
    return y, y.float().abs().amax(dim=-1, keepdim=True)


def _reference(
    x: torch.Tensor, x_scale: torch.Tensor | None, layer: LinearArguments, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(layer, out_dtype)
    return silu_mul(reference_linear(x, x_scale, layer, torch.float32), out_dtype)


def _fake(
    x: torch.Tensor, x_scale: torch.Tensor | None, layer: LinearArguments, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty((x.shape[0], layer.sparse_sizes[0] + layer.dense_sizes[0]), dtype=out_dtype)
    return y, x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _cuda(
    x: torch.Tensor, x_scale: torch.Tensor | None, layer: LinearArguments, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(layer, out_dtype)
    properties = torch.cuda.get_device_properties(x.device)
    capability = (properties.major, properties.minor)
    if capability != (9, 0) or layer.layout != "blocked" or extension.why_not_loaded():
        return silu_mul(linear(x, x_scale, layer, torch.float32), out_dtype)
    y, amax = _fake(x, x_scale, layer, out_dtype)
    amax.zero_()
    if y.numel():
        config = paired_config(layer.spec(x.shape[1]), x.shape[0], properties.multi_processor_count)
        if layer.bias is not None:
            layer = layer._replace(bias=layer.bias.to(out_dtype))
        shards = layer.compiled()[:-1]  # an output split, always
        shape = (config.tile_tokens, config.cluster, config.multicast)
        torch.ops.spense.linear_silu_mul_sm90(x.contiguous(), x_scale, *shards, *shape, True, y, amax)
    return y, amax


_linear_silu_mul = operator("linear_silu_mul", "(Tensor, Tensor)", cpu=_reference, cuda=_cuda, fake=_fake)


def linear_silu_mul(
    x: torch.Tensor, x_scale: torch.Tensor, layer: LinearArguments, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(y [M, I], amax [M, 1])`` of a merged gate_up layer; arguments as in ``spense::linear``.

    The layer is an output split of two shards with equal regions, gate first; ``ValueError`` otherwise.
    Differs from layer and activation in sequence by one rounding less: [gate | up] stays in fp32.
    """
    return _linear_silu_mul(x, x_scale, *layer.flat(), out_dtype)


@functools.lru_cache(maxsize=4096)
def paired_config(spec: LinearSpec, tokens: int, processors: int) -> KernelConfig:
    """The configuration with the lowest estimate among those that are compiled for pairs of gate and up."""
    legal = [c for c in candidates(spec, bucket(tokens), (9, 0), cutlass=False) if pairs(c)]
    return min(legal, key=lambda c: (estimate(spec, tokens, c, processors), c))


def _check(layer: LinearArguments, out_dtype: torch.dtype) -> None:
    sparse, dense = layer.sparse_sizes, layer.dense_sizes
    if not layer.output_split or len(sparse) != 2 or sparse[0] != sparse[1] or dense[0] != dense[1]:
        raise ValueError(f"gate and up must have equal regions, not {sparse} and {dense}")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"output dtype {out_dtype} must be one of {OUT_DTYPES}")
