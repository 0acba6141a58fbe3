"""What a pruning run is asked to do: checked once, at the border."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["obs", "wanda", "magnitude"]
Selection = Literal["spensegpt", "spensegpt+"]
WeightDtype = Literal["fp8", "bf16"]
Positive = Annotated[int, Field(ge=1)]


class PruneConfig(BaseModel):
    """Options of :func:`vllm_spense.pruning.prune`; raises ``pydantic.ValidationError`` (a ValueError).

    ``dense_ratio``: part of the intermediate dimension that stays dense; 0 is strict 2:4 everywhere in
    the MLP, 1 leaves it dense. ``calibration``: a text file, or a dataset name ``org/name``.
    ``damping``: part of the Hessian's mean diagonal that is added to it. ``alignment``: the dense count
    is a multiple of it. ``max_tp``: the largest tensor-parallel size to promise if the extents allow
    it. ``strict``: an ill-conditioned Hessian is an error, not a warning.

    ``cache_activations``: where hidden states wait for their layer, in host memory or in mapped files.
    ``resume`` continues an unfinished run into the same directory if there is one, ``restart`` discards it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = "obs"
    selection: Selection = "spensegpt+"
    dense_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    calibration: str | None = None
    num_samples: Positive = 64
    seq_len: Annotated[int, Field(ge=2)] = 512
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    weight_dtype: WeightDtype = "fp8"
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    block_size: Annotated[int, Field(ge=4, multiple_of=4)] = 128
    alignment: Positive = 64
    max_tp: Annotated[int, Field(ge=1, le=1024)] = 8
    strict: bool = False
    overwrite: bool = False
    cache_activations: Literal["host", "disk"] = "host"
    resume: bool = False
    restart: bool = False

    @model_validator(mode="after")
    def _calibrated(self) -> PruneConfig:
        if self.needs_calibration and self.calibration is None:
            raise ValueError(
                f"method {self.method!r} with selection {self.selection!r} needs calibration text: "
                "give a text file (--calibration FILE); only --method magnitude "
                "--selection spensegpt works without"
            )
        return self

    @model_validator(mode="after")
    def _one_way_on(self) -> PruneConfig:
        if self.resume and self.restart:
            raise ValueError("--resume continues an unfinished run and --restart discards it: choose one")
        return self

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result: not where text and files are or how a run is carried out."""
        aside = {"calibration", "overwrite", "cache_activations", "resume", "restart"}
        return self.model_dump(exclude=aside)

    @property
    def needs_calibration(self) -> bool:
        """Whether input statistics decide anything at this method, selection and dense ratio."""
        selects = self.selection == "spensegpt+" and 0 < self.dense_ratio < 1
        solves = self.method != "magnitude" and self.dense_ratio < 1
        return selects or solves
