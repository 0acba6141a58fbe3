"""The vLLM linear method of a Spense checkpoint: create, load, check, prepare, apply."""

from __future__ import annotations

from typing import Any

import torch

from vllm_spense.format.schema import ModuleSpec, SpenseCheckpointConfig
from vllm_spense.format.validate import check_values
from vllm_spense.ops.dispatch import LinearSpec
from vllm_spense.ops.random_weights import fill_random
from vllm_spense.serving import compat
from vllm_spense.serving.loading import Loaded, LoadPlan, check_heads, make_loader, make_plan
from vllm_spense.serving.runtime import Runtime, make_runtime

_DONE = "_already_called_process_weights_after_loading"


class SpenseLinearMethod(compat.LinearMethodBase):
    """Linear method of one vLLM layer, possibly fused from several checkpoint modules."""

    def __init__(self, prefix: str, specs: dict[str, ModuleSpec], config: SpenseCheckpointConfig) -> None:
        self.prefix = prefix
        self.specs = specs
        self.config = config
        self.loaded: Loaded = set()
        self.dummy = compat.load_format() == "dummy"
        self.plan: LoadPlan
        self.spec: LinearSpec
        self.runtime: Runtime

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
            self.config.torch_dtype,
            self.config.tensor_parallel_sizes,
            axis="output" if input_size_per_partition == input_size else "input",
            in_features=input_size,
            local_outputs=output_partition_sizes,
            rank=getattr(layer, "tp_rank", 0),
            size=getattr(layer, "tp_size", 1),
        )
        if isinstance(layer, compat.QKVParallelLinear):
            check_heads(self.plan, layer.head_size)
        self.spec = self.plan.spec()
        for name in self.plan.names:
            parameter = compat.BasevLLMParameter(
                data=torch.empty(self.plan.shape(name), dtype=self.plan.dtype(name)),
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

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check completeness and every value, then turn the tensors into what the back end runs on."""
        if getattr(layer, _DONE, False):
            return
        tensors: dict[str, torch.Tensor] = {name: getattr(layer, name).data for name in self.plan.names}
        if self.dummy and not self.loaded:
            fill_random(tensors, getattr(layer, "bias", None))
        else:
            self.plan.check_complete(self.loaded)
        check_values(tensors, module=self.prefix)
        self.runtime = make_runtime(self.spec, tensors, layer)
        install(layer, self.runtime.prepare(tensors), self.plan.names)
        self.runtime.finish(layer)
        self.loaded.clear()  # a reload must bring everything again
        setattr(layer, _DONE, True)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., K]`` to ``y [..., N]`` in x's dtype."""
        return self.runtime.apply(layer, x, bias)


def install(layer: Any, prepared: dict[str, torch.Tensor], loaded_names: tuple[str, ...]) -> None:
    """Replace the loaded parameters by the run-time tensors, so that sleep and reload find them."""
    for name in loaded_names:
        delattr(layer, name)
    for name, tensor in prepared.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
