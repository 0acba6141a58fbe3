"""A gate in FP8 whose kernel packs its output into TwELL's words: an option for MLPs that call it themselves.

The unfused way writes the gate's output, reads it and writes the words. Here the words are all that is
written, but for tiles that have overflowed, whose dense values come along (arXiv 2603.23198, section 3, where
they are lost).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.library import custom_op

from vllm_spense.ops import extension
from vllm_spense.ops.linear.arguments import SCHEMA, LinearArguments
from vllm_spense.ops.linear.configs import pairs, sm90_configs
from vllm_spense.ops.linear.op import linear
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.silu_mul import paired_config
from vllm_spense.ops.mlp.twell import TwellShape, pack

TILE = 128
"""Neurons of a tile: the rows of W of one block of the kernel."""


@custom_op(
    "spense::linear_twell",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor? x_scale, {SCHEMA}, float threshold, int share) -> (Tensor, Tensor)",
)
def _linear_twell(
    x: torch.Tensor, x_scale: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *flat, threshold, share = rest
    gate = linear(x, x_scale, LinearArguments.unflat(*flat), torch.bfloat16)
    passed = torch.where(Activation("fatrelu", threshold).active(gate.float()), gate, 0.0)
    return pack(passed, TwellShape(gate.shape[1], TILE, share)), gate


@_linear_twell.register_fake
def _fake(x: torch.Tensor, x_scale: torch.Tensor | None, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *flat, _, share = rest
    gate = x.new_empty((x.shape[0], LinearArguments.unflat(*flat).out_features), dtype=torch.bfloat16)
    tiles = -(-gate.shape[1] // TILE)
    return gate.new_empty((x.shape[0], tiles, TILE // share), dtype=torch.int32), gate


@_linear_twell.register_kernel("cuda")
def _cuda(x: torch.Tensor, x_scale: torch.Tensor | None, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *flat, threshold, share = rest
    layer = LinearArguments.unflat(*flat)
    if why_not(layer, x.device):
        from vllm_spense.ops.mlp.sparse_mlp_triton_kernel import pack as triton_pack

        gate = linear(x, x_scale, layer, torch.bfloat16)
        return triton_pack(gate, TwellShape(gate.shape[1], TILE, share), threshold), gate
    words, gate = _fake(x, x_scale, *rest)
    if gate.numel():
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        config = paired_config(layer.spec(x.shape[1]), x.shape[0], processors)
        if layer.bias is not None:
            layer = layer._replace(bias=layer.bias.to(gate.dtype))
        tile = config.tile_tokens, config.cluster, config.multicast
        given = x.contiguous(), x_scale, *layer.compiled(), *tile
        torch.ops.spense.linear_twell_sm90(*given, True, share, threshold, words, gate)
    return words, gate


def linear_twell(
    x: torch.Tensor, x_scale: torch.Tensor, layer: LinearArguments, activation: Activation, share: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(words [M, tiles, 128 / share] int32, gate [M, N] bf16)`` of a gate's layer; arguments as in
    ``spense::linear``.

    ``words``: :func:`.twell.pack` of what ``activation`` lets through of the gate, rounded to bf16. ``gate``
    is defined for tiles alone that have overflowed: what :func:`.sparse_mlp_cuda.multiply_packed` reads.
    """
    return _linear_twell(x, x_scale, *layer.flat(), activation.threshold, share)


def why_not(layer: LinearArguments, device: torch.device) -> str | None:
    """None when the Hopper kernel packs this layer's output itself, else the reason in one line."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "the kernel is compiled for compute capability 9.0"
    if layer.layout != "blocked":
        return f"the kernel takes layers in FP8 in the layout blocked, not {layer.layout}"
    if len(layer.sparse_sizes) > 1:
        return f"a gate is one shard, not {len(layer.sparse_sizes)}"
    if layer.output_split and layer.dense_sizes[0] and layer.sparse_sizes[0] % TILE:
        return f"{layer.sparse_sizes[0]} rows in 2:4 end within a tile of {TILE}"
    return extension.why_not_loaded() or _why_not_on(device.index or 0)


@functools.cache
def _why_not_on(index: int) -> str | None:
    """Loads the instances, so that no launch in a graph capture has to; what the driver says if it cannot."""
    if not hasattr(torch.ops.spense, "linear_twell_sm90"):
        return "the CUDA extension is older than this kernel"
    try:
        with torch.cuda.device(index):
            for config in filter(pairs, sm90_configs()):
                shape = config.tile_rows, config.tile_tokens, config.cluster, config.multicast
                extension.sm90_clusters(*shape, packed=True)
    except RuntimeError as error:
        return f"the CUDA kernels do not run under this driver: {str(error).splitlines()[0]}"
    return None
