"""What a recovery run is asked to do: checked once, at the border."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_spense.pruning.config import BOS, CALIBRATION, TEXT_COLUMN, Sources
from vllm_spense.text.bos import Bos

Objective = Literal["both", "distill", "tokens"]
Train = Literal["mlp", "all"]


class RecoveryConfig(BaseModel):
    """Options of :func:`vllm_spense.recovery.recover`; raises ``pydantic.ValidationError`` (a ValueError).

    A step reads ``batch`` fresh windows of ``seq_len`` tokens. Pruning's own ``seed`` would choose pruning's
    windows again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibration: Sources = Field(description=CALIBRATION)
    objective: Objective = Field(
        default="distill",
        description="Learn the dense model's distributions, the text's next tokens, or both",
    )
    train: Train = Field(default="mlp", description="MLPs and norms, or the linears of attention, too")
    steps: int = Field(default=100, ge=1, description="Training steps")
    learning_rate: float = Field(
        default=1e-4,
        gt=0,
        le=1,
        description="The highest, between a linear warm-up and a cosine decay to zero",
    )
    batch: int = Field(default=1, ge=1, description="Windows per step")
    seq_len: int = Field(default=512, ge=2, description="Tokens per window")
    bos: Bos = Field(default="auto", description=BOS)
    text_column: str | None = Field(default=None, description=TEXT_COLUMN)
    seed: int = Field(
        default=1, ge=0, lt=1 << 63, description="Of the choice of windows; other ones than pruning's"
    )
    overwrite: bool = Field(default=False, description="Replace an existing OUT")

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result: not where the text is and what may be replaced.

        Younger ones are left out where they are as usual, as in all records from before they were options.
        """
        aside = {"calibration", "overwrite"}
        younger = {"bos": "auto", "text_column": None}
        aside |= {name for name, usual in younger.items() if getattr(self, name) == usual}
        return self.model_dump(exclude=aside)

    @property
    def tokens(self) -> int:
        """Tokens that the whole run reads."""
        return self.steps * self.batch * self.seq_len
