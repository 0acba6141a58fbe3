"""``SpenseConfig``: what vLLM builds from ``quantization_config``, and which layer gets which method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_spense.format.bitsandbytes import METHOD, is_bitsandbytes
from vllm_spense.format.errors import REPRUNE, CheckpointError
from vllm_spense.format.schema import AnyCheckpointConfig, parse_config
from vllm_spense.models.families import ACTIVATION_SPARSE, FUSED, MLP_SPLITS, stays_as_stored
from vllm_spense.serving import compat
from vllm_spense.serving.checks import check_directory
from vllm_spense.serving.summary import LoadSummary

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_spense.serving.layers.method import SpenseMethod

logger = compat.init_logger(__name__)

ONLINE_DENSE_RATIO = 0.5
ONLINE_SPLITS = {"gate_up_proj": "output", **MLP_SPLITS}

DRAFT_PREFIX = "draft_model."
"""What vLLM puts before the names of all layers of a draft model (speculative decoding)."""

DECODER_PREFIX = "model."
"""What vLLM puts before the names of a decoder's layers, and embedding models leave out in their files."""


def is_activation_sparse(hf_config: Any) -> bool:
    """Whether a model is served under an architecture of ours, whose MLPs skip neurons."""
    return any(name in ACTIVATION_SPARSE for name in getattr(hf_config, "architectures", None) or ())


class PluginConfig(compat.QuantizationConfig):
    """What our configurations share: the names of the file's modules, and which of them form a layer.

    Picklable: vLLM sends it to its engine and worker processes.
    """

    modules: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.summary = LoadSummary()
        self.modules = {}

    @classmethod
    def get_name(cls) -> Any:
        return "spense"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # none: a model without quantization_config means load-time mode

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def shard_names(self, prefix: str) -> list[str]:
        """Checkpoint names of the layers that vLLM fuses under ``prefix``.

        Embedding models are often stored without the prefix that vLLM's names have. Models that are fused on
        disk (Phi-3) map a layer to itself; a Spense checkpoint holds its parts.
        """
        prefix = prefix.removeprefix(DRAFT_PREFIX)
        if not any(name.startswith(DECODER_PREFIX) for name in self.modules):
            prefix = prefix.removeprefix(DECODER_PREFIX)
        parent, _, last = prefix.rpartition(".")

        def full(parts: Sequence[str]) -> list[str]:
            return [f"{parent}.{part}" if parent else part for part in parts]

        names = full(self.packed_modules_mapping.get(last, [last]))
        parts = full(FUSED.get(last, ()))
        separate = names == [prefix] and prefix not in self.modules and any(p in self.modules for p in parts)
        return parts if separate else names


class SpenseConfig(PluginConfig):
    """Spense checkpoint served by vLLM, or, without a checkpoint configuration, load-time mode."""

    def __init__(self, checkpoint: AnyCheckpointConfig | None = None) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.modules = {} if checkpoint is None else dict(checkpoint.modules)
        self.model_type = ""
        self.values_are_keys = False
        self.activation_sparse = False

    def __repr__(self) -> str:
        kind = "load-time" if self.checkpoint is None else f"{len(self.modules)} modules"
        return f"SpenseConfig({kind})"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PluginConfig:
        from vllm_spense.serving.bitsandbytes import BitsAndBytesConfig

        if is_bitsandbytes({"quantization_config": config}):
            return BitsAndBytesConfig(config)
        return cls(parse_config(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """bitsandbytes' checkpoints are ours where they are given to us, or where nobody else takes them."""
        if not is_bitsandbytes({"quantization_config": hf_quant_cfg}):
            return None
        ours = user_quant == "spense" or (user_quant is None and METHOD not in compat.quantization_methods())
        return "spense" if ours else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **_: Any
    ) -> None:
        """Check a local checkpoint's headers and hashes before anything is loaded from it."""
        if hf_config is not None:
            text = hf_config.get_text_config()
            self.model_type = text.model_type
            self.values_are_keys = bool(getattr(text, "attention_k_eq_v", False))
            self.activation_sparse = is_activation_sparse(hf_config)
        directory = Path(model_name)
        if self.checkpoint is None:
            self._warn()
        elif directory.is_dir():
            check_directory(directory)

    def _warn(self) -> None:
        """Say what load-time mode does to a model."""
        if self.activation_sparse:
            logger.warning(
                "Spense load-time mode: attention and the gates of activation-sparse MLPs are rounded to FP8 "
                "without calibration, up and down stay as they are. Nothing is pruned."
            )
            return
        logger.warning(
            "Spense load-time mode: the model is not pruned by calibration. MLP weights are cut to "
            "2:4 by magnitude (dense ratio %.2f) and all linear layers are rounded to FP8. This "
            "shows speed, NOT quality; run `spense prune` for a checkpoint that keeps its accuracy.",
            ONLINE_DENSE_RATIO,
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> compat.QuantizeMethodBase | None:
        """Linear layers get a Spense or an unquantized method; everything else vLLM's default (None)."""
        if not isinstance(layer, compat.LinearBase):
            return None
        if self.checkpoint is None:
            method = self._online_method(layer, prefix)
        else:
            method = self._stored_method(self.checkpoint, prefix)
        if method is None:
            self.summary.skip(layer)
            return compat.UnquantizedLinearMethod()
        return method

    def _online_method(self, layer: torch.nn.Module, prefix: str) -> SpenseMethod | None:
        """What prunes a dense layer while it loads; None for one that is left as it is."""
        from vllm_spense.serving.layers.online import SpenseOnlineLinearMethod

        if stays_as_stored(prefix, self.model_type) or isinstance(layer, compat.ReplicatedLinear):
            return None  # routers and gates, read as .weight
        split = None if self.activation_sparse else ONLINE_SPLITS.get(prefix.rpartition(".")[2])
        return SpenseOnlineLinearMethod(prefix, split, ONLINE_DENSE_RATIO, self.summary)

    def _stored_method(self, checkpoint: AnyCheckpointConfig, prefix: str) -> SpenseMethod | None:
        """What loads and runs a layer of the checkpoint; None for one that it holds as plain tensors."""
        from vllm_spense.serving.layers.linear import SpenseLinearMethod

        names = self.shard_names(prefix)
        specs = {name: self.modules[name] for name in names if name in self.modules}
        if not specs:
            return None
        if self.values_are_keys and list(specs) == names[:2] and len(names) == 3:
            specs[names[2]] = specs[names[1]]  # vLLM loads k_proj twice
        if len(specs) < len(names):
            raise CheckpointError(
                f"vLLM fuses {', '.join(names)} into one layer, but only some of them are listed in "
                "quantization_config.modules",
                module=prefix,
                fix=REPRUNE,
            )
        codecs = {checkpoint.codecs_of(spec) for spec in specs.values()}
        if len(codecs) > 1:
            raise CheckpointError(
                f"vLLM fuses {', '.join(names)} into one layer, and they are stored in several codecs "
                f"({', '.join(sorted(c.name for c in codecs))})",
                module=prefix,
                fix=REPRUNE,
            )
        sizes = checkpoint.tensor_parallel_sizes
        return SpenseLinearMethod(prefix, specs, codecs.pop(), sizes, self.summary)
