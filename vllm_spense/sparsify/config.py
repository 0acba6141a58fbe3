"""What a run that sets thresholds is asked to do: checked once, at the border."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_spense.pruning.config import BOS, CALIBRATION, TEXT_COLUMN, Sources
from vllm_spense.text.bos import Bos


class SparsifyConfig(BaseModel):
    """Options of :func:`~.pipeline.sparsify`; raises ``pydantic.ValidationError`` (a ValueError)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibration: Sources = Field(description=CALIBRATION)
    sparsity: float = Field(
        default=0.5, gt=0, lt=1, description="Share of down's inputs to skip, over all layers"
    )
    allocation: Literal["loss", "uniform"] = Field(
        default="loss",
        description="More of it in layers that it costs little, as measured, or the same share in each layer",
    )
    num_samples: int = Field(default=16, ge=1, description="Windows that thresholds are taken from")
    loss_samples: int = Field(default=2, ge=1, description="Of these: windows that losses are measured on")
    seq_len: int = Field(default=512, ge=2, description="Tokens per window")
    bos: Bos = Field(default="auto", description=BOS)
    text_column: str | None = Field(default=None, description=TEXT_COLUMN)
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Of the choice of windows")
    overwrite: bool = Field(default=False, description="Replace an existing OUT")

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result: not where the text is and what may be replaced."""
        return self.model_dump(exclude={"calibration", "overwrite"})
