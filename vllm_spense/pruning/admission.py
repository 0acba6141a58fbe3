"""Whether a model can be pruned, from config.json and headers: what every plan asks first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_spense.format import CheckpointError
from vllm_spense.format.checkpoint import CONFIG_NAME, read_json
from vllm_spense.models.parts import DecoderLayer
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.layer import LayerPruner
from vllm_spense.pruning.source import SourceModel, layers_of, meta_network
from vllm_spense.sources import check_positions, check_tokenizer

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Admitted:
    """A model that can be pruned: its network on the meta device, its layers, the dtype of its weights."""

    network: Any
    layers: list[DecoderLayer]
    stored_dtype: torch.dtype


def admit(directory: Path, config: PruneConfig) -> Admitted:
    """The model in ``directory``, which may lack the weights; with weights there, their headers are checked.

    Raises what :class:`SourceModel` raises, and :class:`CheckpointError` for sizes that no layout fits and
    windows that do not fit the model.
    """
    if any(directory.glob("*.safetensors")):
        source = SourceModel(directory, torch.device("cpu"))
        found = Admitted(source.network, source.layers, source.stored_dtype)
        if config.calibration is not None:
            check_tokenizer(directory)
    else:
        dtype = _configured_dtype(directory)
        network = meta_network(directory, dtype)
        found = Admitted(network, layers_of(network, directory), dtype)
    if config.calibration is not None:
        check_positions(found.network.config, config.seq_len, directory)
    check_layouts(found.layers, config, directory)
    return found


def check_layouts(layers: list[DecoderLayer], config: PruneConfig, directory: Path) -> None:
    """Raises :class:`CheckpointError` for sizes that cannot be cut as ``config`` says."""
    pruner = LayerPruner(config, None)
    for index, layer in enumerate(layers):
        try:
            pruner.layouts(index, layer)
        except ValueError as error:
            raise CheckpointError(str(error), file=directory / CONFIG_NAME) from None


def _configured_dtype(directory: Path) -> torch.dtype:
    raw = read_json(directory / CONFIG_NAME)
    if raw.get("quantization_config") is not None:
        raise ValueError(f"{directory} is a Spense checkpoint already; prune the dense model instead")
    inside = raw.get("text_config")
    texts = (raw, inside if isinstance(inside, dict) else {})
    name = next((t[key] for t in texts for key in ("dtype", "torch_dtype") if t.get(key)), "bfloat16")
    if not isinstance(name, str) or name not in _DTYPES:
        raise CheckpointError(
            f"the weights' dtype is {str(name)[:80]!r}, expected one of {', '.join(_DTYPES)}",
            file=directory / CONFIG_NAME,
            fix="prune the unquantised model",
        )
    return _DTYPES[name]
