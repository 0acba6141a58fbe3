"""The base of methods whose weights lie in files as anybody's do, and are arranged for a sparse kernel."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from vllm_spense.format.errors import CheckpointError
from vllm_spense.ops.backend import Tensors
from vllm_spense.serving import compat
from vllm_spense.serving.layers.method import DONE, install
from vllm_spense.serving.summary import SparsitySummary

INCOMPLETE = "the checkpoint is incomplete or another model's; download it again"


class PreparedMethod(compat.QuantizeMethodBase):
    """Loads its parameters, lets a back end prepare them, and holds what that made; a subclass says which."""

    def __init__(self, prefix: str, summary: SparsitySummary | None) -> None:
        self.prefix = prefix
        self.summary = summary
        self.dummy = compat.load_format() == "dummy"
        self.loaded: set[str] = set()
        self.names: dict[str, str] = {}
        self.prepared: tuple[str, ...] = ()

    def parameter(
        self,
        layer: Any,
        name: str,
        tensor: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        cut: tuple[int, int, int] | None,
    ) -> None:
        """Register ``name``, of which files have ``tensor`` in ``shape``.

        ``cut``: the axis that tensor parallelism splits, this rank and their number; None: all have all.
        """
        self.names[name] = tensor
        mine = list(shape)
        if cut is not None:
            mine[cut[0]] //= cut[2]
        loader = make_loader(self.loaded, name, f"{self.prefix}.{tensor}", shape, cut)
        data = torch.empty(mine, dtype=dtype)
        layer.register_parameter(name, compat.BasevLLMParameter(data=data, weight_loader=loader))

    @abstractmethod
    def prepare(self, tensors: Tensors, device: torch.device) -> Tensors:
        """Choose a back end for the device, and let it arrange the loaded tensors; takes ownership."""

    @property
    @abstractmethod
    def backend_name(self) -> str:
        """The one that was chosen."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace what was loaded by what the back end runs on."""
        if getattr(layer, DONE, False):
            return
        self._check_complete(layer)
        tensors: Tensors = {name: getattr(layer, name).data for name in self.names}
        device = next(iter(tensors.values())).device
        if device.type == "cpu":
            compat.request_amx()
        prepared = self.prepare(tensors, device)
        install(layer, prepared, tuple(self.names))
        self.prepared = tuple(prepared)
        self.loaded.clear()  # a reload must bring everything again
        setattr(layer, DONE, True)
        if self.summary is not None:
            self.summary.add(layer, self.prefix, self.backend_name)

    def tensors(self, layer: Any) -> Tensors:
        """What the back end runs on."""
        return {name: getattr(layer, name) for name in self.prepared}

    def _check_complete(self, layer: Any) -> None:
        """vLLM counts no arrivals; a linear layer's bias is its own, and reported to us by our loader."""
        if self.dummy and not self.loaded:
            return
        expected = dict(self.names)
        if getattr(layer, "bias", None) is not None:
            expected.setdefault("bias", "bias")
        missing = next((tensor for name, tensor in expected.items() if name not in self.loaded), None)
        if missing is not None:
            module, _, tensor = f"{self.prefix}.{missing}".rpartition(".")
            raise CheckpointError("was never loaded", module=module, tensor=tensor, fix=INCOMPLETE)


def make_loader(
    loaded: set[str], name: str, tensor: str, shape: tuple[int, ...], cut: tuple[int, int, int] | None
) -> Callable[..., None]:
    """The ``weight_loader`` of one parameter; it holds no layer (vLLM reloads)."""

    def spense_slice_loader(
        param: torch.nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: object = None
    ) -> None:
        found = f"{str(loaded_weight.dtype).removeprefix('torch.')} {list(loaded_weight.shape)}"
        if tuple(loaded_weight.shape) != shape or not is_plain(loaded_weight.dtype):
            module, _, last = tensor.rpartition(".")
            raise CheckpointError(
                f"{found}, expected bf16, fp16 or fp32 {list(shape)}",
                module=module,
                tensor=last,
                fix=INCOMPLETE,
            )
        part = loaded_weight
        if cut is not None:
            axis, rank, size = cut
            part = part.narrow(axis, rank * (shape[axis] // size), shape[axis] // size)
        param.data.copy_(part)
        loaded.add(name)

    return spense_slice_loader


def is_plain(dtype: torch.dtype) -> bool:
    """Whether values of this dtype need no scales."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32)


def wanted_backend() -> str | None:
    """The back end that the environment names for what skips neurons or inputs."""
    return os.environ.get("SPENSE_SPARSE_MLP") or None
