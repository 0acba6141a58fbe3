"""What a pruning run is asked to do: checked once, at the border."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from vllm_spense.format.codecs import FourBit, codec
from vllm_spense.format.linear import Codecs
from vllm_spense.text.bos import Bos

Method = Literal["obs", "wanda", "magnitude"]
Selection = Literal["spensegpt", "spensegpt+", "fisher", "consensus"]
GRADIENT_SELECTIONS = ("fisher", "consensus")
"""Selections that rest on a gradient pass."""
Allocation = Literal["uniform", "bytes", "time"]
Preset = Literal["guided", "spensegpt+", "spensegpt", "sparsegpt", "wanda", "magnitude"]
Order = Literal["natural", "energy"]
Targets = Literal["mlp", "mlp+attention"]
Sources = str | Annotated[tuple[str, ...], Field(min_length=1)]

CALIBRATION = (
    "Text: .txt, .jsonl, .json, .parquet, .gz of these, a folder, - or a hub dataset; repeat for more"
)
TEXT_COLUMN = "Of rows; text, messages, conversations, or prompt and completion if not given"
BOS = "Start windows with the BOS token; auto: where serving does"
"""Descriptions of options about text, which recovery and evaluation have, too."""

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


def _codec(name: str) -> str:
    return codec(name).name


WeightDtype = Annotated[str, AfterValidator(_codec)]
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
PRESET_FIELDS = {"preset", "dense_ratio", *_PAPER}
"""Fields whose value depends on the preset where it is not given."""

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

    The descriptions of the fields are what ``spense prune --help`` and docs/pruning.md say. Selections by
    Fisher costs, and budgets, rest on a gradient pass; a budget is only taken if it does better than the same
    ratio everywhere, and these selections if they do better than SpenseGPT+'s (:mod:`.choice.pilot`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Preset = Field(default="guided", description="Named settings that the other options override")
    method: Method = Field(default="obs", description="2:4 solver")
    selection: Selection = Field(
        default="consensus",
        description="How dense indices are chosen: the last ones, by SpenseGPT+'s score, by what 2:4 on them "
        "would cost the loss (fisher), or by the mean of both ranks",
    )
    allocation: Allocation = Field(
        default="bytes",
        description="The same dense share in each layer, or one budget of bytes or of decode time",
    )
    refit: int = Field(default=4, ge=0, le=1000, description="Least-squares iterations on kept weights")
    refine: int = Field(default=4, ge=0, le=1000, description="Rounds of choosing better pairs")
    regroup: int = Field(
        default=4, ge=0, le=1000, description="Rounds of dealing down's 2:4 columns to better groups of four"
    )
    order: Order = Field(
        default="energy",
        description="In which OBS visits the groups of columns; energy: the largest inputs first",
    )
    joint: int = Field(
        default=2,
        ge=0,
        le=1000,
        description="Iterations that fit gate and up to the MLP's intermediate values",
    )
    gradient_samples: int = Field(default=16, ge=1, description="Windows of the gradient pass")
    pilot_samples: int = Field(
        default=8,
        ge=0,
        description="Windows on which layers are compared; 0: by the gradient alone, untested",
    )
    dense_ratio: float = Field(
        default=0.5, ge=0, le=1, description="Dense share of the MLPs; 0 is strict 2:4"
    )
    targets: Targets = Field(
        default="mlp", description="What is pruned: MLPs, or the linears of attention, too"
    )
    attention_dense_ratio: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Dense share of key/value heads, rounded to whole ones; that of the MLPs if not given",
    )
    calibration: Sources | None = Field(default=None, description=CALIBRATION)
    num_samples: int = Field(default=64, ge=1, description="Calibration windows")
    seq_len: int = Field(default=512, ge=2, description="Tokens per window")
    bos: Bos = Field(default="auto", description=BOS)
    text_column: str | None = Field(default=None, description=TEXT_COLUMN)
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Of the choice of windows")
    weight_dtype: WeightDtype = Field(default="fp8", description="Stored weights")
    sparse_dtype: WeightDtype | None = Field(default=None, description="Those of 2:4 regions, if others")
    dense_dtype: WeightDtype | None = Field(
        default=None, description="Those of the dense regions of what is pruned, if others"
    )
    damping: float = Field(
        default=0.01, gt=0, le=1, description="Share of the Hessian's mean diagonal that is added to it"
    )
    block_size: int = Field(default=128, ge=4, multiple_of=4, description="Columns that OBS prunes at a time")
    alignment: int = Field(default=64, ge=1, description="The number of dense indices is a multiple of it")
    max_tp: int = Field(default=8, ge=1, le=1024, description="Largest tensor-parallel size to allow for")
    strict: bool = Field(default=False, description="Turn warnings into errors")
    overwrite: bool = Field(default=False, description="Replace an existing OUT")
    cache_activations: Literal["host", "disk"] = Field(
        default="host", description="Where hidden states wait: memory, or files beside OUT"
    )
    resume: bool = Field(default=False, description="Continue an unfinished run into OUT, if there is one")
    restart: bool = Field(default=False, description="Discard an unfinished run into OUT")

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
        younger = {"bos": "auto", "text_column": None, "sparse_dtype": None, "dense_dtype": None}
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
        prunes = min(self.dense_ratio, self.attention_ratio) < 1
        solves = self.method != "magnitude" and (prunes or self.compensates)
        return self.scores_indices or self.scores_heads or self.needs_gradient or solves

    @property
    def codecs(self) -> Codecs:
        """How the regions of what is pruned are stored; all else is stored in ``weight_dtype``."""
        sparse, dense = self.sparse_dtype or self.weight_dtype, self.dense_dtype or self.weight_dtype
        return Codecs(codec(sparse), codec(dense))

    @property
    def compensates(self) -> bool:
        """Whether weights make up for each other's rounding: OBS's do, where it is coarse."""
        return self.method == "obs" and any(
            isinstance(region, FourBit) for region in (self.codecs.sparse, self.codecs.dense)
        )

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
