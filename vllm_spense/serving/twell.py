"""``TwellConfig``: linear layers that skip small inputs, as a checkpoint says or behind a plain ReLU MLP."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.twell_config import METHOD, RESPARSIFY, TwellCheckpointConfig, parse_twell_config
from vllm_spense.models.families import MLP_FORMS, in_attention
from vllm_spense.serving import compat
from vllm_spense.serving.config import PluginConfig, is_activation_sparse
from vllm_spense.serving.summary import SparsitySummary

DOWN = frozenset(down for _, down in MLP_FORMS)


class TwellConfig(PluginConfig):
    """A checkpoint with thresholds, or, without one, ``--quantization twell`` on a model with plain ReLU
    MLPs, whose down layers skip zeros: nothing changes but the time."""

    def __init__(self, checkpoint: TwellCheckpointConfig | None = None) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.modules = {}
        if checkpoint is not None:
            self.modules = {n: (t, checkpoint.density.get(n)) for n, t in checkpoint.inputs.items()}
        self.has_own_mlps = False
        density = () if checkpoint is None else checkpoint.density.values()
        self.sparsity = SparsitySummary("down layers", density)

    def __repr__(self) -> str:
        kind = "plain ReLU" if self.checkpoint is None else f"{len(self.modules)} modules"
        return f"TwellConfig({kind})"

    @classmethod
    def get_name(cls) -> Any:
        return METHOD

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # what runs a layer, the back ends say

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TwellConfig:
        return cls(parse_twell_config(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **_: Any
    ) -> None:
        """Refuse a model without zeros, and thresholds of layers that the checkpoint does not have."""
        from vllm_spense.ops.mlp.published import plain_activation  # not where vLLM registers us

        self.has_own_mlps = is_activation_sparse(hf_config)
        if self.checkpoint is not None:
            self._check_inputs(compat.safetensors_headers(model_name, revision))
        elif hf_config is not None and not self.has_own_mlps:
            plain_activation(hf_config.get_text_config().to_dict())

    def _check_inputs(self, stored: Collection[str]) -> None:
        """Every module that has a threshold has a weight; ``stored`` is empty where weights are made up."""
        for module in self.modules:
            if self.has_own_mlps:
                why = "inputs names a layer of a model that skips neurons by its activation"
            elif stored and f"{module}.weight" not in stored:
                why = "inputs names a layer that no file holds"
            else:
                continue
            raise CheckpointError(why, module=module, fix=RESPARSIFY)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> compat.QuantizeMethodBase | None:
        """Down layers get a method that skips, all other linear layers an unquantized one."""
        from vllm_spense.serving.layers.sparse_input import SparseInputLinearMethod

        if not isinstance(layer, compat.LinearBase):
            return None
        skipped = self._stored(prefix) if self.checkpoint else self._plain(prefix)
        if skipped is None:
            return compat.UnquantizedLinearMethod()
        return SparseInputLinearMethod(prefix, *skipped, self.sparsity)

    def _plain(self, prefix: str) -> tuple[float, None] | None:
        skips = prefix.rpartition(".")[2] in DOWN and not in_attention(prefix) and not self.has_own_mlps
        return (0.0, None) if skips else None

    def _stored(self, prefix: str) -> tuple[float, float | None] | None:
        """Threshold and density of a layer that has one."""
        names = self.shard_names(prefix)
        if len(names) == 1:
            return self.modules.get(names[0])
        for name in names:
            if name in self.modules:
                fix = "give thresholds to layers that vLLM does not fuse, like down_proj"
                raise CheckpointError(f"vLLM makes one layer of {', '.join(names)}", module=name, fix=fix)
        return None
