"""The back ends for activation-sparse MLPs, and for layers behind them, on Hopper: compiled kernels.

As in :mod:`.sparse_mlp_triton_kernel` a gate is packed, rows of up are read for the neurons that are left,
then rows of down. Where the gate is an FP8 layer, its own kernel can have packed it (:mod:`.packed_gate`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch.library import custom_op

from vllm_spense.ops import extension
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.mlp import sparse_input
from vllm_spense.ops.mlp.activation import KINDS, Activation
from vllm_spense.ops.mlp.many_tokens import dense_input, dense_mlp, most_tokens, shape_for
from vllm_spense.ops.mlp.sparse_input import SparseInputSpec
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpSpec, empty_output, transposed
from vllm_spense.ops.mlp.sparse_mlp_triton import why_not_packed
from vllm_spense.ops.mlp.twell import MAX_HIDDEN, TwellShape

INPUT = len(KINDS)
"""Number of the kernels' kind for inputs of a plain layer; those of activations are their places in KINDS."""
MULTIPLE = 8
"""Of every size: the kernels read 16 bytes at a time."""


def packed(gate: torch.Tensor, shape: TwellShape, threshold: float, kind: int) -> torch.Tensor:
    """:func:`.twell.pack` of what ``gate [M, hidden]`` bf16 lets through."""
    words = gate.new_empty((gate.shape[0], shape.tiles, shape.words), dtype=torch.int32)
    torch.ops.spense.pack_twell(gate, shape.tile, shape.share, kind, threshold, words)
    return words


def multiply_packed(
    x: torch.Tensor,
    words: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    up_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: Activation,
    shape: TwellShape,
) -> torch.Tensor:
    """``y [M, N]`` from a packed gate; ``gate`` is read for tiles alone that have overflowed."""
    y = x.new_empty((x.shape[0], down_t.shape[1]))
    up_bias, bias = _as(x, up_bias), _as(x, bias)
    how = shape.tile, shape.share, KINDS.index(activation.kind), activation.threshold
    torch.ops.spense.sparse_mlp_packed(gate, words, x, up, up_bias, down_t, bias, *how, y)
    return y


@custom_op("spense::cuda_sparse_mlp", mutates_args=(), device_types="cuda")
def _cuda_sparse_mlp(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    up_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    threshold: float,
    density: float | None,
) -> torch.Tensor:
    act = Activation(activation, threshold)
    if x.shape[0] > most_tokens(density):
        return dense_mlp(x, gate, up, down_t, up_bias, bias, act)
    x, gate, shape = x.contiguous(), gate.contiguous(), shape_for(gate.shape[1], density)
    words = packed(gate, shape, threshold, KINDS.index(activation))
    return multiply_packed(x, words, gate, up, down_t, up_bias, bias, act, shape)


_cuda_sparse_mlp.register_fake(empty_output)


@custom_op("spense::cuda_sparse_input_linear", mutates_args=(), device_types="cuda")
def _cuda_sparse_input(
    x: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    density: float | None,
) -> torch.Tensor:
    if x.shape[0] > most_tokens(density):
        return dense_input(x, weight_t, bias, threshold)
    x, shape = x.contiguous(), shape_for(x.shape[1], density)
    words = packed(x, shape, threshold, INPUT)
    y = x.new_empty((x.shape[0], weight_t.shape[1]))
    how = shape.tile, shape.share, INPUT, threshold
    nothing = None, None, None
    torch.ops.spense.sparse_mlp_packed(x, words, *nothing, weight_t, _as(x, bias), *how, y)
    return y


_cuda_sparse_input.register_fake(sparse_input.empty_output)


def _as(x: torch.Tensor, vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.to(x.dtype)


@functools.cache
def _why_not_on(index: int) -> str | None:
    """Loads the kernels, so that no launch in a graph capture has to; what the driver says if it cannot."""
    if not hasattr(torch.ops.spense, "load_sparse_mlp"):
        return "the CUDA extension is older than these kernels"
    try:
        with torch.cuda.device(index):
            torch.ops.spense.load_sparse_mlp()
    except RuntimeError as error:
        return f"the CUDA kernels do not run under this driver: {str(error).splitlines()[0]}"
    return None


def _why_not(dtype: torch.dtype, device: torch.device, **sizes: int) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return f"runs on NVIDIA GPUs, not on {'ROCm' if torch.version.hip else device.type}"
    if dtype != torch.bfloat16:
        return f"the kernels take bf16, not {dtype}"
    for name, size in sizes.items():
        if size % MULTIPLE:
            return f"{name} {size} must be a multiple of {MULTIPLE}"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"the kernels are compiled for compute capability 9.0, not {capability[0]}.{capability[1]}"
    return extension.why_not_loaded() or _why_not_on(device.index or 0)


class SparseMlpCudaBackend:
    """up and down transposed, in bf16."""

    name = "cuda"

    def why_not(self, spec: SparseMlpSpec, device: torch.device) -> str | None:
        sizes = {name: getattr(spec, name) for name in ("in_features", "neurons", "out_features")}
        return why_not_packed(spec) or _why_not(spec.dtype, device, **sizes)

    def prepare(self, spec: SparseMlpSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return transposed(tensors)

    def apply(
        self, spec: SparseMlpSpec, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        biases = tensors.get("up_bias"), tensors.get("bias")
        how = spec.activation.kind, spec.activation.threshold, spec.density
        return _cuda_sparse_mlp(x, gate, tensors["up"], tensors["down_t"], *biases, *how)


class SparseInputCudaBackend:
    """The weight transposed, in bf16."""

    name = "cuda"

    def why_not(self, spec: SparseInputSpec, device: torch.device) -> str | None:
        if spec.in_features > MAX_HIDDEN:
            return f"{spec.in_features} inputs are beyond the {MAX_HIDDEN} that a word can name"
        return _why_not(spec.dtype, device, in_features=spec.in_features, out_features=spec.out_features)

    def prepare(self, spec: SparseInputSpec, weight: torch.Tensor) -> Tensors:
        return {"weight_packed": weight.t().contiguous()}

    def apply(
        self,
        spec: SparseInputSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return _cuda_sparse_input(x, tensors["weight_packed"], bias, spec.threshold, spec.density)
