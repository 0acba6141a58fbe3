"""The vLLM linear method of a Spense checkpoint: create, load, check."""

from __future__ import annotations

from typing import Any

import torch

from vllm_spense.format.linear import Codecs
from vllm_spense.format.schema import ModuleSpec
from vllm_spense.format.validate import check_values
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.cpu import ask_for_huge_pages
from vllm_spense.ops.linear.random import fill_random
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.serving import compat
from vllm_spense.serving.layers.method import SpenseMethod
from vllm_spense.serving.loading import LoadPlan, check_heads, make_loader, make_plan
from vllm_spense.serving.summary import LoadSummary


class SpenseLinearMethod(SpenseMethod):
    """Linear method of one vLLM layer, possibly fused from several checkpoint modules."""

    def __init__(
        self,
        prefix: str,
        specs: dict[str, ModuleSpec],
        codecs: Codecs,
        promised_sizes: list[int],
        summary: LoadSummary,
    ) -> None:
        super().__init__(prefix, summary)
        self.specs = specs
        self.codecs = codecs
        self.promised_sizes = promised_sizes
        self.plan: LoadPlan

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
        """Allocate exactly this rank's part of the checkpoint's tensors on the current device."""
        self.plan = make_plan(
            self.prefix,
            self.specs,
            self.codecs,
            self.promised_sizes,
            axis="output" if input_size_per_partition == input_size else "input",
            in_features=input_size,
            local_outputs=output_partition_sizes,
            rank=getattr(layer, "tp_rank", 0),
            size=getattr(layer, "tp_size", 1),
        )
        if isinstance(layer, compat.QKVParallelLinear):
            check_heads(self.plan, layer.head_size)
        for name in self.plan.names:
            data = torch.empty(self.plan.shape(name), dtype=self.plan.dtype(name))
            ask_for_huge_pages(data)
            parameter = compat.BasevLLMParameter(
                data=data,
                weight_loader=make_loader(self.plan, name, self.loaded),
            )
            layer.register_parameter(name, parameter)
        # vLLM registers the bias after this call with `layer.weight_loader`, which would cut it into
        # contiguous pieces; S and D of an output split must be cut separately.
        layer.weight_loader = make_loader(self.plan, "bias", self.loaded)
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = input_size_per_partition
        layer.output_size_per_partition = sum(output_partition_sizes)
        layer.orig_dtype = params_dtype
        self.created(layer, self.plan.names)

    def collect(self, layer: Any) -> tuple[LinearSpec, Tensors]:
        """The parameters as they are, complete and every value legal."""
        tensors: Tensors = {name: getattr(layer, name).data for name in self.plan.names}
        if self.dummy and not self.loaded:
            fill_random(tensors, getattr(layer, "bias", None))
        else:
            self.plan.check_complete(self.loaded)
        bias = getattr(layer, "bias", None)
        self.plan.check_bias(bias is not None)
        checked = tensors if bias is None else {**tensors, "bias": bias.data}
        check_values(checked, self.codecs, module=self.prefix)
        return self.plan.spec(), tensors
