"""``SpenseConfig``: what vLLM builds from ``quantization_config``, and which layer gets which method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_spense.format.checkpoint import Checkpoint
from vllm_spense.format.errors import REPRUNE, CheckpointError
from vllm_spense.format.manifest import MANIFEST_NAME, check_manifest, is_loaded_file
from vllm_spense.format.schema import AnyCheckpointConfig, ModuleSpec, parse_config
from vllm_spense.format.validate import check_headers
from vllm_spense.models.families import FUSED, MLP_SPLITS, stays_as_stored
from vllm_spense.serving.summary import LoadSummary

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger(__name__)

ONLINE_DENSE_RATIO = 0.5
ONLINE_SPLITS = {"gate_up_proj": "output", **MLP_SPLITS}

DRAFT_PREFIX = "draft_model."
"""What vLLM puts before the names of all layers of a draft model (speculative decoding)."""

DECODER_PREFIX = "model."
"""What vLLM puts before the names of a decoder's layers, and embedding models leave out in their files."""

_verified: set[tuple[str, int]] = set()
"""Directories (with the manifest's mtime) already checked in this process: vLLM builds configs often."""


class SpenseConfig(QuantizationConfig):
    """Spense checkpoint served by vLLM, or, without a checkpoint configuration, load-time mode.

    Picklable: vLLM sends it to its engine and worker processes.
    """

    def __init__(self, checkpoint: AnyCheckpointConfig | None = None) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.summary = LoadSummary()
        self.modules: dict[str, ModuleSpec] = {} if checkpoint is None else dict(checkpoint.modules)
        self.model_type = ""
        self.values_are_keys = False
        if checkpoint is None:
            logger.warning(
                "Spense load-time mode: the model is not pruned by calibration. MLP weights are cut to "
                "2:4 by magnitude (dense ratio %.2f) and all linear layers are rounded to FP8. This "
                "shows speed, NOT quality; run `spense prune` for a checkpoint that keeps its accuracy.",
                ONLINE_DENSE_RATIO,
            )

    def __repr__(self) -> str:
        kind = "load-time" if self.checkpoint is None else f"{len(self.modules)} modules"
        return f"SpenseConfig({kind})"

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

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpenseConfig:
        return cls(parse_config(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **_: Any
    ) -> None:
        """Check a local checkpoint's headers and hashes before anything is loaded from it."""
        if hf_config is not None:
            text = hf_config.get_text_config()
            self.model_type = text.model_type
            self.values_are_keys = bool(getattr(text, "attention_k_eq_v", False))
        directory = Path(model_name)
        if self.checkpoint is None or not directory.is_dir():
            return
        if not any(directory.glob("*.safetensors")):
            pickled = [p for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
            if pickled:
                raise CheckpointError(
                    "pickled weights are never loaded", file=sorted(pickled)[0], fix="use safetensors files"
                )
            return  # configuration only, for --load-format dummy
        if sharded := sorted(directory.glob("model-rank-*.safetensors")):
            raise CheckpointError(
                "--load-format sharded_state is not supported: such files hold weights the way one back end "
                "arranged them",
                file=sharded[0],
                fix="serve the Spense checkpoint that they were saved from",
            )
        manifest = directory / MANIFEST_NAME
        if not manifest.is_file():
            raise CheckpointError(
                "the manifest is missing, so damaged or missing tensors could not be noticed",
                file=manifest,
                fix=f"`spense verify --update-manifest {directory}` checks all else and writes one",
            )
        key = (str(directory.resolve()), manifest.stat().st_mtime_ns)
        if key in _verified:
            return
        check_headers(Checkpoint(directory))
        check_manifest(directory, only=is_loaded_file)
        _verified.add(key)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Linear layers get a Spense or an unquantized method; everything else vLLM's default (None)."""
        from vllm_spense.serving import compat
        from vllm_spense.serving.linear import SpenseLinearMethod
        from vllm_spense.serving.online import SpenseOnlineLinearMethod

        if not isinstance(layer, compat.LinearBase):
            return None
        names = self.shard_names(prefix)
        if self.checkpoint is None:
            stays = stays_as_stored(prefix, self.model_type)
            if stays or isinstance(layer, compat.ReplicatedLinear):  # routers and gates, read as .weight
                self.summary.skip(layer)
                return compat.UnquantizedLinearMethod()
            split = ONLINE_SPLITS.get(prefix.rpartition(".")[2])
            return SpenseOnlineLinearMethod(prefix, split, ONLINE_DENSE_RATIO, self.summary)
        specs = {name: self.modules[name] for name in names if name in self.modules}
        if not specs:
            self.summary.skip(layer)
            return compat.UnquantizedLinearMethod()
        if self.values_are_keys and list(specs) == names[:2] and len(names) == 3:
            specs[names[2]] = specs[names[1]]  # vLLM loads k_proj twice
        if len(specs) < len(names):
            raise CheckpointError(
                f"vLLM fuses {', '.join(names)} into one layer, but only some of them are listed in "
                "quantization_config.modules",
                module=prefix,
                fix=REPRUNE,
            )
        codecs = {self.checkpoint.codecs_of(spec) for spec in specs.values()}
        if len(codecs) > 1:
            raise CheckpointError(
                f"vLLM fuses {', '.join(names)} into one layer, and they are stored in several codecs "
                f"({', '.join(sorted(c.name for c in codecs))})",
                module=prefix,
                fix=REPRUNE,
            )
        sizes = self.checkpoint.tensor_parallel_sizes
        return SpenseLinearMethod(prefix, specs, codecs.pop(), sizes, self.summary)

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
