"""What a recovery run is asked to do: checked once, at the border."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_spense.text.bos import Bos

Objective = Literal["both", "distill", "tokens"]
Train = Literal["mlp", "all"]
Positive = Annotated[int, Field(ge=1)]


class RecoveryConfig(BaseModel):
    """Options of :func:`vllm_spense.recovery.recover`; raises ``pydantic.ValidationError`` (a ValueError).

    ``calibration``: text, as for pruning, and its ``text_column``. ``objective``: KL divergence from the
    dense model's next-token distributions, cross entropy with the text's own next tokens, or their mean.
    ``train``: the MLPs' kept weights and all norms, or those of attention, too. A step reads ``batch`` fresh
    windows of ``seq_len`` tokens. ``bos``: whether they start with the model's BOS token; ``auto``: where
    serving puts it there, too. ``seed`` chooses them; pruning's own would choose pruning's windows again.
    ``learning_rate``: the highest, between a linear warm-up over the first tenth of ``steps`` and a
    cosine decay to zero.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibration: str | Annotated[tuple[str, ...], Field(min_length=1)]
    objective: Objective = "distill"
    train: Train = "mlp"
    steps: Positive = 100
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    batch: Positive = 1
    seq_len: Annotated[int, Field(ge=2)] = 512
    bos: Bos = "auto"
    text_column: str | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 1
    overwrite: bool = False

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
