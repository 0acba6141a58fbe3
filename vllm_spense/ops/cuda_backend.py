"""The back end of the compiled CUDA kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.ops import cuda_linear, extension
from vllm_spense.ops.backend import Tensors, activations
from vllm_spense.ops.linear import linear
from vllm_spense.ops.repack import PITCH, block_metadata, pad_pitch
from vllm_spense.ops.spec import LinearSpec
from vllm_spense.ops.tuning import usable

__all__ = ["CudaBackend", "cuda_linear"]
MAX_SHARDS = 4  # kMaxShards of kernels/linear/arguments.h


class CudaBackend:
    """Compressed weights in the kernels' layout, one fused kernel per layer."""

    name = "cuda"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"runs on CUDA devices, not on {device.type}"
        if spec.codecs != UNIFORM_FP8:
            return "the kernels take FP8 weights"
        if not spec.hybrid:
            return "there is no 2:4 region: a dense kernel is the right one"
        if spec.in_features % PITCH:
            return f"in_features {spec.in_features} must be a multiple of {PITCH} (TMA row pitch)"
        if len(spec.sparse_sizes) > MAX_SHARDS:
            return f"{len(spec.sparse_sizes)} fused shards, at most {MAX_SHARDS} are compiled"
        return extension.why_not_loaded() or usable(spec, device)

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return {
            "sparse_values": pad_pitch(tensors["sparse_values"]),
            "sparse_meta": block_metadata(tensors["sparse_meta"]),
            "weight_packed": pad_pitch(tensors["dense_weight"]),
            "weight_scale": tensors["weight_scale"],
        }

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        xq, xs = activations(spec, x)
        return linear(
            *(xq, xs, tensors["sparse_values"], tensors["sparse_meta"], tensors["weight_packed"]),
            *(tensors["weight_scale"], bias, list(spec.sparse_sizes), list(spec.dense_sizes)),
            *(spec.split == "output", x.dtype),
        )
