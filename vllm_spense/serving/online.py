"""Load-time mode: ``--quantization spense`` on a dense checkpoint, pruned without data while it loads."""

from __future__ import annotations

from typing import Any

import torch

from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.layout import Axis, Layout, Split
from vllm_spense.format.linear import LinearFormat
from vllm_spense.ops.dispatch import LinearSpec, Tensors
from vllm_spense.ops.online import online_layout, prune_and_pack
from vllm_spense.serving import compat
from vllm_spense.serving.loading import Loaded, LoadPlan, ModuleSlice, shard_indices
from vllm_spense.serving.method import SpenseMethod
from vllm_spense.serving.summary import LoadSummary


class SpenseOnlineLinearMethod(SpenseMethod):
    """Loads a dense weight layer by layer, keeps two of four by magnitude, rounds to FP8.

    ``split`` None leaves the layer dense (FP8 only). Each tensor-parallel rank prunes its own slice.
    """

    uses_meta_device = True  # the dense weight exists for one layer at a time

    def __init__(self, prefix: str, split: str | None, dense_ratio: float, summary: LoadSummary) -> None:
        super().__init__(prefix, summary)
        self.split: Split = "input" if split == "input" else "output"
        self.dense_ratio = 1.0 if split is None else dense_ratio

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Register a meta ``weight [N, K]`` that vLLM materialises when its shards have arrived."""
        self.axis: Axis = "output" if input_size_per_partition == input_size else "input"
        self.rank = getattr(layer, "tp_rank", 0)
        self.size = getattr(layer, "tp_size", 1)
        self.widths = list(output_partition_sizes)
        weight = compat.BasevLLMParameter(
            data=torch.empty(sum(self.widths), input_size_per_partition, dtype=params_dtype, device="meta"),
            weight_loader=_make_dense_loader(self, self.loaded),
        )
        layer.register_parameter("weight", weight)
        layer.logical_widths = output_partition_sizes
        layer.orig_dtype = params_dtype
        compat.initialize_online_processing(layer)
        self.created(layer, ("weight",))

    def collect(self, layer: Any) -> tuple[LinearSpec, Tensors]:
        """The materialised weight, pruned and packed like a checkpoint's layer."""
        if not self.dummy:
            missing = set(range(len(self.widths))) - {i for _, i in self.loaded}
            if missing:
                raise CheckpointError(
                    f"part {min(missing)} of {len(self.widths)} was never loaded",
                    module=self.prefix,
                    tensor="weight",
                    fix="the checkpoint is incomplete; download it again",
                )
        plan, tensors = self._pack(layer.weight.data)
        return plan.spec(), tensors

    def _pack(self, weight: torch.Tensor) -> tuple[LoadPlan, Tensors]:
        slices, packed = [], []
        for rows in weight.split(self.widths):
            layout = online_layout(self.split, rows.shape[0], rows.shape[1], self.dense_ratio)
            slices.append(ModuleSlice(self.prefix, LinearFormat(layout), self.axis, 0, 1))
            try:
                packed.append(prune_and_pack(rows, layout))
            except ValueError as error:
                raise CheckpointError(
                    str(error), module=self.prefix, tensor="weight", fix="download the model again"
                ) from None
        plan = LoadPlan(self.prefix, tuple(slices))
        tensors: Tensors = {}
        for name in plan.names:
            tensors[name] = torch.empty(plan.shape(name), dtype=plan.dtype(name), device=weight.device)
            start = 0
            for part in packed:
                if name in part:
                    tensors[name].narrow(0, start, part[name].shape[0]).copy_(part[name])
                    start += part[name].shape[0]
        return plan, tensors


def _make_dense_loader(method: SpenseOnlineLinearMethod, loaded: Loaded):
    prefix, widths, axis = method.prefix, method.widths, method.axis
    rank, size = method.rank, method.size

    def spense_dense_loader(
        param: torch.nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: object = None
    ) -> None:
        indices = shard_indices(loaded_shard_id, len(widths), prefix)
        pieces = loaded_weight.split(
            _rows([widths[i] for i in indices], loaded_weight.shape[0], size, prefix)
        )
        for index, piece in zip(indices, pieces, strict=True):
            rows = widths[index]
            parts = size if axis == "input" else piece.shape[0] // rows
            full = Layout("output", piece.shape[0], piece.shape[1], 0)
            part = full.cut_region(piece, axis, rank * parts // size, parts)
            param.data.narrow(0, sum(widths[:index]), rows).copy_(part)
            loaded.add(("weight", index))

    return spense_dense_loader


def _rows(widths: list[int], rows: int, size: int, prefix: str) -> list[int]:
    """How many of the ``rows`` of a tensor on disk belong to each part of which a rank has ``widths``."""
    if len(widths) == 1:
        return [rows]
    found = [width * size for width in widths]
    if sum(found) > rows and len(found) == 3:  # ranks hold copies of key/value heads
        found[1:] = [(rows - found[0]) // 2] * 2
    if sum(found) != rows or min(found) < 1:
        raise CheckpointError(
            f"the tensor on disk has {rows} rows, the layer takes {' + '.join(map(str, found))}",
            module=prefix,
            tensor="weight",
            fix="get an intact copy of the model",
        )
    return found
