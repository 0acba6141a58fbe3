"""The arguments that describe one linear layer to an operator, as one value.

Their order stands here alone: in :class:`LinearArguments` as the compiled operators take them, and in
``SCHEMA`` as the operators that are written in Python take them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.spec import LinearSpec

TensorLayout = Literal["checkpoint", "blocked", "strips"]
"""How weights lie: as on disk, or as the CUDA (``repack.py``) or CPU kernels (``cpu.py``) read them."""
PACKED = "weight_packed"
"""Name of ``dense_weight`` in a layer that is prepared; vLLM's LoRA code looks for it."""
SCHEMA = (
    "Tensor[] weights, Tensor? bias, "
    "SymInt[] sparse_sizes, SymInt[] dense_sizes, bool output_split, str layout"
)
"""What :meth:`LinearArguments.flat` gives, in the language of operator schemas."""


class LinearArguments(NamedTuple):
    """One (possibly fused) layer: its tensors, the extents of its regions and the layout of its weights.

    Tensors as in :class:`vllm_spense.format.Layout` (empty regions have a size of 0), or in another
    ``layout``; ``weight_scale``, ``bias``: ``[N]`` in output order; ``sparse_sizes``, ``dense_sizes``:
    extents per fused shard (output split) or one each (input split).
    """

    sparse_values: torch.Tensor
    sparse_meta: torch.Tensor
    dense_weight: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None
    sparse_sizes: list[int]
    dense_sizes: list[int]
    output_split: bool
    layout: TensorLayout = "checkpoint"

    @classmethod
    def of(
        cls,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        bias: torch.Tensor | None = None,
        layout: TensorLayout = "checkpoint",
    ) -> LinearArguments:
        """From the tensors of a checkpoint, or those that a back end has prepared in ``layout``."""
        return cls(
            tensors["sparse_values"],
            tensors["sparse_meta"],
            tensors[PACKED if PACKED in tensors else "dense_weight"],
            tensors.get("weight_scale"),
            bias,
            list(spec.sparse_sizes),
            list(spec.dense_sizes),
            spec.split == "output",
            layout,
        )

    def prepared(self) -> Tensors:
        """The weights by their names in a layer that is prepared; what :meth:`of` takes."""
        tensors = {
            "sparse_values": self.sparse_values,
            "sparse_meta": self.sparse_meta,
            PACKED: self.dense_weight,
        }
        return tensors if self.weight_scale is None else tensors | {"weight_scale": self.weight_scale}

    def flat(self) -> tuple[Any, ...]:
        """The arguments of ``SCHEMA``."""
        weights = [self.sparse_values, self.sparse_meta, self.dense_weight]
        if self.weight_scale is not None:
            weights.append(self.weight_scale)
        return weights, self.bias, self.sparse_sizes, self.dense_sizes, self.output_split, self.layout

    @classmethod
    def unflat(cls, weights: list[torch.Tensor], *rest: Any) -> LinearArguments:
        """Inverse of :meth:`flat`."""
        scale = weights[3] if len(weights) > 3 else None
        return cls(weights[0], weights[1], weights[2], scale, *rest)

    def compiled(self) -> tuple[Any, ...]:
        """The arguments of the compiled operators, each of which knows one layout."""
        return self[:-1]

    @property
    def out_features(self) -> int:
        """N; only for layouts that keep the number of rows (not ``strips``)."""
        if self.output_split:
            return sum(self.sparse_sizes) + sum(self.dense_sizes)
        return self.dense_weight.shape[0]

    def spec(self, in_features: int) -> LinearSpec:
        """Static facts of an FP8 layer, for ``x [M, in_features]``."""
        return _spec(
            "output" if self.output_split else "input",
            self.out_features,
            in_features,
            tuple(self.sparse_sizes),
            tuple(self.dense_sizes),
        )


_spec = functools.lru_cache(maxsize=4096)(LinearSpec)
