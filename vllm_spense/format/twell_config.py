"""Schema of ``quantization_config`` with ``quant_method: twell``: linear layers that skip small inputs.

Weights lie in the checkpoint as in any other, in its dtype; the config says which layers skip inputs, below
what. ``spense sparsify`` writes it for models whose activation leaves no zeros (TEAL, arXiv 2408.14690).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.schema import Name, Provenance, validated

METHOD: Final = "twell"
VERSION: Final = 1
RESPARSIFY = "docs/format.md lists every key; make the checkpoint again with `spense sparsify`"

Threshold = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Density = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


class TwellCheckpointConfig(BaseModel):
    """What such a checkpoint says about itself.

    ``inputs``: by module (``model.layers.0.mlp.down_proj``), the largest absolute value of an input that is
    taken as zero; 0 skips zeros only. ``density``: by module, the share of inputs above it, where it was
    measured. ``provenance``: how the checkpoint was made, free in form.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["twell"] = METHOD
    version: Literal[1] = VERSION
    inputs: dict[Name, Threshold] = Field(min_length=1)
    density: dict[Name, Density] = {}
    provenance: Provenance = {}

    @model_validator(mode="after")
    def _consistent(self) -> TwellCheckpointConfig:
        unknown = sorted(set(self.density) - set(self.inputs))
        if unknown:
            raise ValueError(f"density names {unknown[0]}, which is not among inputs")
        return self


def parse_twell_config(raw: object, file: object = "config.json") -> TwellCheckpointConfig:
    """Validate a ``quantization_config`` dictionary; one :class:`CheckpointError` names every mistake."""
    if not isinstance(raw, dict) or raw.get("quant_method") != METHOD:
        raise CheckpointError(
            f"quantization_config must be an object with quant_method {METHOD!r}",
            file=file,
            fix="point at a directory that `spense sparsify` wrote",
        )
    version = raw.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"version {version!r} of {METHOD} is not supported (this release reads {VERSION})",
            file=file,
            fix="install the vllm-spense release that wrote the checkpoint",
        )
    return validated(TwellCheckpointConfig, raw, file, RESPARSIFY)


def is_twell(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a checkpoint with thresholds."""
    raw = config.get("quantization_config")
    return isinstance(raw, dict) and raw.get("quant_method") == METHOD
