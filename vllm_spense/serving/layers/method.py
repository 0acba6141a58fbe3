"""The base of the linear methods: from a layer's loaded tensors to the layer as it runs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.serving import compat
from vllm_spense.serving.loading import Loaded
from vllm_spense.serving.runtime import Runtime, make_runtime
from vllm_spense.serving.summary import LayerFacts, LoadSummary

DONE = "_already_called_process_weights_after_loading"


class SpenseMethod(compat.LinearMethodBase):
    """Prepares a loaded layer once and runs it; a subclass creates its parameters and collects them."""

    def __init__(self, prefix: str, summary: LoadSummary) -> None:
        self.prefix = prefix
        self.summary = summary
        self.loaded: Loaded = set()
        self.dummy = compat.load_format() == "dummy"
        self.names: tuple[str, ...] = ()
        self.runtime: Runtime

    def created(self, layer: Any, names: tuple[str, ...]) -> None:
        """Every ``create_weights`` ends here: these parameters are to be loaded."""
        self.names = names
        self.summary.expect(layer)

    @abstractmethod
    def collect(self, layer: Any) -> tuple[LinearSpec, Tensors]:
        """The loaded layer as checkpoint tensors, checked; raises :class:`CheckpointError`."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace what was loaded by what the back end runs on."""
        if getattr(layer, DONE, False):
            return
        spec, tensors = self.collect(layer)
        self.runtime = make_runtime(spec, tensors, layer)
        prepared = self.runtime.prepare(tensors)
        install(layer, prepared, self.names)
        self.runtime.finish(layer)
        self.loaded.clear()  # a reload must bring everything again
        setattr(layer, DONE, True)
        size = sum(tensor.nbytes for tensor in prepared.values())
        self.summary.add(layer, LayerFacts(self.prefix, spec, self.runtime.name, self.runtime.fallback, size))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., K]`` to ``y [..., N]`` in x's dtype."""
        return self.runtime.apply(layer, x, bias)


def install(layer: Any, prepared: Tensors, loaded_names: tuple[str, ...]) -> None:
    """Replace the loaded parameters by the run-time tensors, so that sleep and reload find them."""
    for name in loaded_names:
        delattr(layer, name)
    for name, tensor in prepared.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
