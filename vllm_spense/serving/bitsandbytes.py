"""What vLLM builds from the ``quantization_config`` of a bitsandbytes checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from vllm_spense.format.bitsandbytes import (
    CODECS,
    DOWNLOAD,
    STATE,
    BitsAndBytesCheckpoint,
    check_settings,
    grouped,
    nbytes_of,
    state_name,
)
from vllm_spense.format.checkpoint import TensorInfo
from vllm_spense.format.errors import CheckpointError
from vllm_spense.serving import compat
from vllm_spense.serving.checks import refuse_pickles
from vllm_spense.serving.config import PluginConfig
from vllm_spense.serving.layers.bitsandbytes import (
    STATE_PARAMETER,
    BitsAndBytesLinearMethod,
    StoredWeight,
    parameter_of,
)

_BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


class BitsAndBytesConfig(PluginConfig):
    """A checkpoint with 4-bit weights of bitsandbytes; which modules have them, its tensors' names tell."""

    def __init__(self, raw: dict[str, Any]) -> None:
        super().__init__()
        check_settings(raw)
        if not hasattr(compat.QuantizationConfig, "get_checkpoint_weight_mapper"):
            raise CheckpointError(
                "this vLLM cannot load what bitsandbytes stores beside weights",
                fix="install vLLM 0.32 or later",
            )
        self.plain: dict[str, StoredWeight] = {}

    def __repr__(self) -> str:
        return f"BitsAndBytesConfig({len(self.modules)} modules in 4 bits)"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitsAndBytesConfig:
        return cls(config)

    def get_checkpoint_weight_mapper(self) -> Any:
        """A parameter's name has no dots: what lies beside a weight lies beside it in the layer, too."""
        states = {f".weight.{STATE}{name}": f".{STATE_PARAMETER}" for name in CODECS}
        return compat.renamed(states | {f".weight.{part}": f".{parameter_of(part)}" for part in _BESIDE})

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **_: Any
    ) -> None:
        """Read the headers of all weights; of a local directory all that lies beside them is checked."""
        directory = Path(model_name)
        if directory.is_dir():
            refuse_pickles(directory)
            self.read(BitsAndBytesCheckpoint(directory).tensors)
        else:
            found = compat.safetensors_headers(model_name, revision).items()
            self.read({name: TensorInfo(directory, *header) for name, header in found})

    def read(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Take the modules from the headers of all tensors."""
        stored = grouped(tensors)
        for name, info in tensors.items():
            module, _, last = name.rpartition(".")
            if last != "weight":
                continue
            bias = f"{module}.bias" in tensors
            if module in stored:
                beside = {part: (of.shape, of.dtype) for part, of in stored[module].items() if part}
                state_name(module, beside)
                self.modules[module] = StoredWeight(module, nbytes_of(info), 0, beside, bias)
            elif len(info.shape) == 2:
                self.plain[module] = StoredWeight(module, 0, info.shape[0], {}, bias)
        if not self.modules:
            raise CheckpointError("no weight of the checkpoint is stored in 4 bits", fix=DOWNLOAD)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.plain = hf_to_vllm_mapper.apply_dict(self.plain)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> compat.QuantizeMethodBase | None:
        """Linear layers with 4-bit weights get our method, all others vLLM's own."""
        if not isinstance(layer, compat.LinearBase):
            self._only_linears(layer, prefix)
            return None
        names = self.shard_names(prefix)
        found = [self.modules.get(name) or self.plain.get(name) for name in names]
        modules = [module for module in found if module is not None]
        if not any(module.nbytes for module in modules):
            self.summary.skip(layer)
            return compat.UnquantizedLinearMethod()
        if len(modules) < len(names):
            missing = next(name for name, module in zip(names, found, strict=True) if module is None)
            self._refuse(f"vLLM fuses {', '.join(names)} into one layer, and this one is missing", missing)
        return BitsAndBytesLinearMethod(prefix, modules, self.summary)

    def _only_linears(self, layer: torch.nn.Module, prefix: str) -> None:
        """Nobody else in vLLM knows what 4-bit weights are."""
        experts = f"{prefix}." if "MoE" in type(layer).__name__ or "Experts" in type(layer).__name__ else None
        for name in self.modules:
            if name == prefix or (experts and name.startswith(experts)):
                self._refuse(f"{type(layer).__name__} with weights in 4 bits is not supported", name)

    def _refuse(self, problem: str, module: str) -> NoReturn:
        fix = "quantise only the linear layers of decoder layers (llm_int8_skip_modules)"
        raise CheckpointError(problem, module=module, fix=fix)
