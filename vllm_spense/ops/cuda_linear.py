"""``spense::linear`` on CUDA devices: the compiled kernels, chosen by shape and number of tokens."""

from __future__ import annotations

import torch

from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.ops import extension
from vllm_spense.ops.kernel_config import KernelConfig
from vllm_spense.ops.linear import linear, reference_linear
from vllm_spense.ops.spec import LinearSpec
from vllm_spense.ops.tuning import choose


def run(
    config: KernelConfig,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    sparse_values: torch.Tensor,
    sparse_meta: torch.Tensor,
    dense_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    sparse_sizes: list[int],
    dense_sizes: list[int],
    output_split: bool,
    y: torch.Tensor,
    overlap: bool = True,
) -> None:
    """Run one kernel configuration into ``y [M, N]``. Arguments as in :func:`linear`, block layout.

    With ``overlap`` weights may be read before the kernel in front of this one has ended (programmatic
    dependent launch), so another kernel must stand between whatever writes weights and this call: in a
    model, the one that makes x.
    """
    layer = (x, x_scale, sparse_values, sparse_meta, dense_weight, weight_scale, bias)
    sizes = (sparse_sizes, dense_sizes, output_split)
    if config.kernel == "sm90":
        shape = (config.tile_rows, config.tile_tokens, config.cluster, config.multicast)
        torch.ops.spense.linear_sm90(*layer, *sizes, *shape, overlap, y)
    else:
        major, _ = torch.cuda.get_device_capability(x.device)
        large = int(config.tile_rows * config.tile_tokens >= 128 * 256)
        torch.ops.spense.linear_cutlass(*layer, *sizes, 10 * major, large, overlap, y)


@linear.register_kernel("cuda")
def cuda_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    sparse_values: torch.Tensor,
    sparse_meta: torch.Tensor,
    dense_weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    sparse_sizes: list[int],
    dense_sizes: list[int],
    output_split: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The kernels for block-layout FP8 layers; the definition for canonical tensors."""
    if sparse_meta.dim() != 3:
        return reference_linear(
            *(x, x_scale, sparse_values, sparse_meta, dense_weight, weight_scale, bias),
            *(sparse_sizes, dense_sizes, output_split, out_dtype),
        )
    if x_scale is None or weight_scale is None:
        raise ValueError("the CUDA kernels need FP8 activations and weights with their scales")
    if reason := extension.why_not_loaded():
        raise RuntimeError(reason)
    split = "output" if output_split else "input"
    spec = LinearSpec(
        *(split, weight_scale.numel(), x.shape[1]),
        *(tuple(sparse_sizes), tuple(dense_sizes), UNIFORM_FP8),
    )
    config = choose(spec, max(x.shape[0], 1), x.device)
    # The CUTLASS epilogues store bf16 only; another dtype is converted from it.
    stored = torch.bfloat16 if config.kernel == "cutlass" else out_dtype
    y = torch.empty((x.shape[0], spec.out_features), dtype=stored, device=x.device)
    if y.numel():
        if bias is not None:
            bias = bias.to(stored)
        run(
            config,
            *(x.contiguous(), x_scale, sparse_values, sparse_meta, dense_weight, weight_scale, bias),
            *(sparse_sizes, dense_sizes, output_split, y),
        )
    return y.to(out_dtype)
