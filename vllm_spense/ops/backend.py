"""What a back end is, and what several of them share.

A back end turns the loaded checkpoint tensors into the tensors it computes on, once (``prepare``), and
runs one operator on them per forward (``apply``). Prepared shapes and dtypes depend on the spec
alone, so reloading weights can copy into the old storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from vllm_spense.ops.linear import full_weight
from vllm_spense.ops.quantize import quantize_per_token
from vllm_spense.ops.spec import LinearSpec

Tensors = dict[str, torch.Tensor]


class Backend(Protocol):
    """One way to run a layer; stateless."""

    name: str

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        """None when this back end can run the layer there, else the reason in one line."""

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """From checkpoint tensors to run-time tensors.

        Given are both regions and the metadata, empty ones included, and in FP8 the scales; no bias.
        Takes ownership: the inputs' memory may be overwritten and be the result's.
        The tensor ``weight_packed`` must be among them: vLLM's LoRA code looks for it.
        """

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """``x [M, K]`` to ``y [M, N]`` in x's dtype."""


def regions(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """A layer's tensors and extents, in the order in which functions of a whole weight take them."""
    return (
        *(tensors[name] for name in ("sparse_values", "sparse_meta", "dense_weight")),
        *(list(spec.sparse_sizes), list(spec.dense_sizes), spec.split == "output"),
    )


def decompressed(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[N, K]`` of a layer's checkpoint tensors: stored values, zeros written out, no scale."""
    return full_weight(*regions(spec, tensors))


def activations(spec: LinearSpec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    return quantize_per_token(x) if spec.quantize_activations else (x, None)


def scale_only(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {"weight_scale": tensors["weight_scale"]} if "weight_scale" in tensors else {}
