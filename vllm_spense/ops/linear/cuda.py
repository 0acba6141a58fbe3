"""CUDA devices: the compiled kernels, chosen by shape and number of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.ops import extension
from vllm_spense.ops.activations import quantized
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.arguments import LinearArguments
from vllm_spense.ops.linear.configs import KernelConfig
from vllm_spense.ops.linear.op import empty_output, linear
from vllm_spense.ops.linear.reference import reference_linear
from vllm_spense.ops.linear.repack import PITCH, block
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.ops.linear.table import choose, usable

MAX_SHARDS = 4  # kMaxShards of the kernels


class CudaBackend:
    """Compressed weights in the layout ``blocked``, one fused kernel per layer."""

    name = "cuda"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"runs on CUDA devices, not on {device.type}"
        if spec.codecs != UNIFORM_FP8:
            return f"the kernels take FP8 weights, not {spec.codecs.title}"
        if not spec.hybrid:
            return "there is no 2:4 region: a dense kernel is the right one"
        if spec.in_features % PITCH:
            return f"in_features {spec.in_features} must be a multiple of {PITCH} (TMA row pitch)"
        if len(spec.sparse_sizes) > MAX_SHARDS:
            return f"{len(spec.sparse_sizes)} fused shards, at most {MAX_SHARDS} are compiled"
        return extension.why_not_loaded() or usable(spec, device)

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return block(LinearArguments.of(spec, tensors)).prepared()

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        xq, xs = quantized(x, spec.activation_dtype)
        return linear(xq, xs, LinearArguments.of(spec, tensors, bias, "blocked"), x.dtype)


def run(
    config: KernelConfig,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    layer: LinearArguments,
    y: torch.Tensor,
    overlap: bool = True,
) -> None:
    """Run one kernel configuration into ``y [M, N]``; ``layer``: ``blocked``, its bias in y's dtype.

    With ``overlap`` weights may be read before the kernel in front of this one has ended (programmatic
    dependent launch), so another kernel must stand between whatever writes weights and this call: in a
    model, the one that makes x.
    """
    if config.kernel == "sm90":
        shape = (config.tile_rows, config.tile_tokens, config.cluster, config.multicast)
        torch.ops.spense.linear_sm90(x, x_scale, *layer.compiled(), *shape, overlap, y)
    else:
        major, _ = torch.cuda.get_device_capability(x.device)
        large = int(config.tile_rows * config.tile_tokens >= 128 * 256)
        torch.ops.spense.linear_cutlass(x, x_scale, *layer.compiled(), 10 * major, large, overlap, y)


def cuda_linear(
    x: torch.Tensor, x_scale: torch.Tensor | None, layer: LinearArguments, out_dtype: torch.dtype
) -> torch.Tensor:
    """``spense::linear`` on CUDA devices: kernels for the layout ``blocked``, else the definition.

    ``ValueError`` without scales, ``RuntimeError`` without kernels.
    """
    if layer.layout != "blocked":
        return reference_linear(x, x_scale, layer, out_dtype)
    if x_scale is None or layer.weight_scale is None:
        raise ValueError("the CUDA kernels need FP8 activations and weights with their scales")
    if reason := extension.why_not_loaded():
        raise RuntimeError(reason)
    config = choose(layer.spec(x.shape[1]), max(x.shape[0], 1), x.device)
    # The CUTLASS epilogues store bf16 only; another dtype is converted from it.
    stored = torch.bfloat16 if config.kernel == "cutlass" else out_dtype
    y = empty_output(x, x_scale, layer, stored)
    if y.numel():
        if layer.bias is not None:
            layer = layer._replace(bias=layer.bias.to(stored))
        run(config, x.contiguous(), x_scale, layer, y)
    return y.to(out_dtype)
