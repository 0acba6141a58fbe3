"""A directory with plain weights whose config.json says which layers skip small inputs."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from vllm_spense.format.checkpoint import CONFIG_NAME, Checkpoint
from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.twell_config import RESPARSIFY, parse_twell_config


class TwellCheckpoint(Checkpoint):
    """Opened as a dense one is, for its weights are; ``thresholds`` is what config.json adds.

    Raises :class:`CheckpointError` for a threshold whose layer has no weight here, too.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.thresholds = parse_twell_config(self.config["quantization_config"], self.directory / CONFIG_NAME)
        for module in self.thresholds.inputs:
            if f"{module}.weight" not in self.tensors:
                raise CheckpointError(
                    "config.json has a threshold for this module, and no file has its weight",
                    file=self.directory,
                    module=module,
                    fix=RESPARSIFY,
                )

    def _parse(self, raw: object) -> None:
        """No layer is stored otherwise than in a dense model."""

    def require_spense(self) -> NoReturn:
        raise CheckpointError(
            "this checkpoint has thresholds for activations and plain weights, and no Spense layers",
            file=self.directory / CONFIG_NAME,
            fix="`spense eval` measures it, `spense inspect DIR --text FILE` shows its density, `vllm serve` "
            "runs it; for all else give the model that it was made from",
        )
