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

    ``calibration``: a text file, or a dataset name ``org/name``. ``objective``: KL divergence from the
    dense model's next-token distributions, cross entropy with the text's own next tokens, or their mean.
    ``train``: the MLPs' kept weights and all norms, or those of attention, too. A step reads ``batch`` fresh
    windows of ``seq_len`` tokens. ``bos``: whether they start with the model's BOS token; ``auto``: where
    serving puts it there, too. ``seed`` chooses them; pruning's own would choose pruning's windows again.
    ``learning_rate``: the highest, between a linear warm-up over the first tenth of ``steps`` and a
    cosine decay to zero.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibration: str
    objective: Objective = "distill"
    train: Train = "mlp"
    steps: Positive = 100
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    batch: Positive = 1
    seq_len: Annotated[int, Field(ge=2)] = 512
    bos: Bos = "auto"
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 1
    overwrite: bool = False

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result: not where the text is and what may be replaced.

        ``bos`` is left out where it is the usual one, as in all records from before it was an option.
        """
        aside = {"calibration", "overwrite"}
        return self.model_dump(exclude=aside | ({"bos"} if self.bos == "auto" else set()))

    @property
    def tokens(self) -> int:
        """Tokens that the whole run reads."""
        return self.steps * self.batch * self.seq_len
