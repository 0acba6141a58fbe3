"""What a pruning run is asked to do: checked once, at the border."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_spense.text.bos import Bos

Method = Literal["obs", "wanda", "magnitude"]
Selection = Literal["spensegpt", "spensegpt+", "fisher", "consensus"]
GRADIENT_SELECTIONS = ("fisher", "consensus")
"""Selections that rest on a gradient pass."""
Allocation = Literal["uniform", "bytes", "time"]
Preset = Literal["guided", "spensegpt+", "spensegpt", "sparsegpt", "wanda", "magnitude"]
Order = Literal["natural", "energy"]
Targets = Literal["mlp", "mlp+attention"]
WeightDtype = Literal["fp8", "bf16"]
Positive = Annotated[int, Field(ge=1)]


_PAPER: dict[str, Any] = {
    "method": "obs",
    "selection": "spensegpt+",
    "allocation": "uniform",
    "refit": 0,
    "refine": 0,
    "regroup": 0,
    "order": "natural",
    "joint": 0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "guided": {},
    "spensegpt+": _PAPER,
    "spensegpt": _PAPER | {"selection": "spensegpt"},
    "sparsegpt": _PAPER | {"dense_ratio": 0.0},
    "wanda": _PAPER | {"method": "wanda", "dense_ratio": 0.0},
    "magnitude": _PAPER | {"method": "magnitude", "selection": "spensegpt", "dense_ratio": 0.0},
}
"""Named settings; ``guided`` is the fields' own defaults. The paper's are exactly those of arXiv 2606.10445;
the last three prune strictly."""

RETIRED: dict[str, dict[str, Any]] = {
    "order": {"search_damping": False, "asymmetric": 0.0},
    "joint": {"rounding": "nearest"},
}
"""Options that there once were (docs/experiments.md), behind the one that they followed, with the value that
every run has now. Records keep them: equal runs write equal bytes, and unfinished ones with other values are
not continued."""


class PruneConfig(BaseModel):
    """Options of :func:`vllm_spense.pruning.prune`; raises ``pydantic.ValidationError`` (a ValueError).

    ``preset`` fills in what is not given (:data:`PRESETS`). It is ``guided``, unless ``method`` or
    ``selection`` is given: these start from the paper's ``spensegpt+``.

    ``dense_ratio``: part of the intermediate dimension that stays dense; 0 is strict 2:4 everywhere in
    the MLP, 1 leaves it dense. ``allocation``: the same ratio in every layer, or one budget of bytes or
    of predicted decode time for all. ``selection`` ``fisher``, ``consensus`` (mean of an index's ranks
    by Fisher and by SpenseGPT+) and such a budget rest on a gradient pass over the beginnings of the first
    ``gradient_samples`` windows. A budget is shared out by what each layer's 2:4 does to the
    model's answers on the last ``pilot_samples`` windows, and is only taken if it does better than the same
    ratio everywhere on as many others; these selections must do better than SpenseGPT+'s there, too
    (:mod:`.pilot`). 0: by the gradient pass alone, untested.

    ``refit``: iterations of least squares on the kept weights; ``refine``: rounds in which better pairs are
    chosen. ``regroup``: rounds of dealing the 2:4 columns of down to better groups of four. ``order``
    ``energy``: OBS visits the groups with the largest inputs first. ``joint``: iterations that fit gate and
    up to the MLP's intermediate values. All of these are about linears with a 2:4 region.

    ``targets`` ``mlp+attention`` prunes the projections of attention, too. ``attention_dense_ratio``
    (default: ``dense_ratio``) is the part of its key/value heads that stays dense in every layer, with all
    query heads that belong to them, rounded to whole heads.

    ``calibration``: text, as one source or several: files, folders, ``-`` or datasets of the hub
    (:mod:`vllm_spense.text.sources`). ``text_column``: of rows; by default the first known one. ``bos``:
    whether windows start with the model's BOS token; ``auto``: where serving puts it there, too.
    ``damping``: part of the Hessian's mean diagonal that is added to it. ``alignment``: the dense count
    is a multiple of it. ``max_tp``: the largest tensor-parallel size to promise if the extents allow
    it. ``strict``: every warning is an error.

    ``cache_activations``: where hidden states wait for their layer, in host memory or in mapped files.
    ``resume`` continues an unfinished run into the same directory if there is one, ``restart`` discards it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Preset = "guided"
    method: Method = "obs"
    selection: Selection = "consensus"
    allocation: Allocation = "bytes"
    refit: Annotated[int, Field(ge=0, le=1000)] = 4
    refine: Annotated[int, Field(ge=0, le=1000)] = 4
    regroup: Annotated[int, Field(ge=0, le=1000)] = 4
    order: Order = "energy"
    joint: Annotated[int, Field(ge=0, le=1000)] = 2
    gradient_samples: Positive = 16
    pilot_samples: Annotated[int, Field(ge=0)] = 8
    dense_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    targets: Targets = "mlp"
    attention_dense_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    calibration: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    num_samples: Positive = 64
    seq_len: Annotated[int, Field(ge=2)] = 512
    bos: Bos = "auto"
    text_column: str | None = None
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

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        default = "spensegpt+" if {"method", "selection"} & set(given) else "guided"
        preset = given.get("preset", default)
        return PRESETS.get(preset, {}) | {"preset": preset} | given

    @model_validator(mode="after")
    def _refined_obs(self) -> PruneConfig:
        if self.refine and not self.refit:
            raise ValueError("refine chooses pairs between least squares: give refit iterations, too")
        if (self.refit or self.refine) and self.method != "obs":
            raise ValueError(f"refit and refine improve method 'obs', not {self.method!r}")
        others = ("regroup", "joint")
        given = [name for name in others if getattr(self, name)]
        given += ["order"] if self.order != "natural" else []
        if given and self.method != "obs":
            raise ValueError(f"{', '.join(given)}: only for method 'obs', not {self.method!r}")
        return self

    @model_validator(mode="after")
    def _targeted(self) -> PruneConfig:
        if self.attention_dense_ratio is not None and self.targets == "mlp":
            raise ValueError("attention_dense_ratio needs targets 'mlp+attention'")
        return self

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
        """The options that decide the result: not where text and files are or how a run is carried out.

        Younger ones are left out where they are as usual, as in all records from before they were options.
        Retired ones (:data:`RETIRED`) keep their place.
        """
        aside = {"calibration", "strict", "overwrite", "cache_activations", "resume", "restart"}
        younger = {"bos": "auto", "text_column": None}
        aside |= set() if self.needs_pilot else {"pilot_samples"}
        aside |= {name for name, usual in younger.items() if getattr(self, name) == usual}
        record: dict[str, Any] = {}
        for name, value in self.model_dump(exclude=aside).items():
            record[name] = value
            record |= RETIRED.get(name, {})
        return record

    @property
    def needs_calibration(self) -> bool:
        """Whether input statistics decide anything at this method, selection and dense ratio."""
        solves = self.method != "magnitude" and min(self.dense_ratio, self.attention_ratio) < 1
        return self.scores_indices or self.scores_heads or self.needs_gradient or solves

    @property
    def attention_ratio(self) -> float:
        """Part of attention that stays dense: all of it unless it is a target."""
        if self.targets == "mlp":
            return 1.0
        return self.dense_ratio if self.attention_dense_ratio is None else self.attention_dense_ratio

    @property
    def scores_heads(self) -> bool:
        """Whether each layer ranks its own groups of heads, by SpenseGPT+'s score."""
        return self.selection != "spensegpt" and 0 < self.attention_ratio < 1

    @property
    def scores_indices(self) -> bool:
        """Whether each layer ranks its own indices by SpenseGPT+'s score."""
        return self.selection == "spensegpt+" and 0 < self.dense_ratio < 1

    @property
    def needs_pilot(self) -> bool:
        """Whether layers are compared by crude prunings of them."""
        return self.pilot_samples > 0 and self.allocation != "uniform" and 0 < self.dense_ratio < 1

    @property
    def needs_gradient(self) -> bool:
        """Whether the whole model's indices are compared by what they cost in loss."""
        return (
            self.selection in GRADIENT_SELECTIONS or self.allocation != "uniform"
        ) and 0 < self.dense_ratio < 1
