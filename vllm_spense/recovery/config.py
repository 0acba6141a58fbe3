"""What a recovery run is asked to do: checked once, at the border."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_spense.pruning.config import BOS, CALIBRATION, TEXT_COLUMN, Sources
from vllm_spense.text.bos import Bos

Objective = Literal["both", "distill", "tokens"]
Train = Literal["mlp", "all"]
L1 = 2e-5
"""What the paper recommends (arXiv 2603.23198)."""


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
    activation: Literal["relu"] | None = Field(
        default=None, description="Replace the SiLU of the gates (Llama models; DIRECTORY may be dense)"
    )
    l1: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description=f"Of --activation: weight of a token's absolute hidden values, {L1:g} if not given",
    )
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

    @model_validator(mode="after")
    def _consistent(self) -> RecoveryConfig:
        if self.l1 is not None and self.activation is None:
            raise ValueError("l1 penalises the hidden values of ReLU gates: it needs --activation relu")
        return self

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result: not where the text is and what may be replaced.

        Younger ones are left out where they are as usual, as in all records from before they were options.
        """
        aside = {"calibration", "overwrite"}
        younger = {"bos": "auto", "text_column": None, "activation": None, "l1": None}
        aside |= {name for name, usual in younger.items() if getattr(self, name) == usual}
        penalty = {} if self.activation is None else {"l1": self.penalty}
        return self.model_dump(exclude=aside) | penalty

    @property
    def penalty(self) -> float:
        """Coefficient of the L1 penalty; 0 for none."""
        return 0.0 if self.activation is None else L1 if self.l1 is None else self.l1

    @property
    def tokens(self) -> int:
        """Tokens that the whole run reads."""
        return self.steps * self.batch * self.seq_len
