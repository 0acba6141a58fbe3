"""Schema of ``quantization_config`` in a Spense checkpoint's config.json (format version 1)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from vllm_spense.format.errors import REPRUNE, CheckpointError
from vllm_spense.format.layout import Layout, Split

FORMAT_VERSION = 1
MAX_FEATURES = 1 << 24
"""No linear layer has more features on a side; a larger number is a damaged or hostile file."""

Extent = Annotated[int, Field(strict=True, ge=0, le=MAX_FEATURES)]
Name = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[A-Za-z0-9_.\-]+$")]
WeightDtype = Literal["float8_e4m3fn", "bfloat16"]
MAX_NESTING = 16
"""Of the provenance: vLLM pickles the configuration for its workers, and pickle recurses."""
TORCH_DTYPE: dict[str, torch.dtype] = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "bfloat16": torch.bfloat16,
}


def _shallow(provenance: dict[str, Any]) -> dict[str, Any]:
    level: list[Any] = [provenance]
    for _ in range(MAX_NESTING):
        inner = [i for node in level for i in (node.values() if isinstance(node, dict) else node)]
        level = [i for i in inner if isinstance(i, (dict, list))]
        if not level:
            return provenance
    raise ValueError(f"nested more than {MAX_NESTING} deep")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModuleSpec(_Strict):
    """Exact extents of one linear layer; a dense layer has ``split: output, sparse: 0``."""

    split: Split
    out_features: Extent
    in_features: Extent
    sparse: Extent
    dense: Extent
    bias: StrictBool = False

    @model_validator(mode="after")
    def _consistent(self) -> ModuleSpec:
        layout = self.layout()
        if layout.dense != self.dense:
            raise ValueError(
                f"sparse {self.sparse} + dense {self.dense} must be the {layout.extent} {self.split} features"
            )
        return self

    def layout(self) -> Layout:
        return Layout(self.split, self.out_features, self.in_features, self.sparse)

    @classmethod
    def of(cls, layout: Layout, bias: bool) -> ModuleSpec:
        return cls(
            split=layout.split,
            out_features=layout.out_features,
            in_features=layout.in_features,
            sparse=layout.sparse,
            dense=layout.dense,
            bias=bias,
        )


class SpenseCheckpointConfig(_Strict):
    """What a Spense checkpoint says about itself; see docs/format.md for every key."""

    quant_method: Literal["spense"] = "spense"
    version: Literal[1] = 1
    weight_dtype: WeightDtype
    activation_scheme: Literal["dynamic_per_token", "none"]
    tensor_parallel_sizes: Annotated[
        list[Annotated[int, Field(strict=True, ge=1, le=1024)]], Field(min_length=1)
    ]
    ignore: list[Name] = []
    modules: dict[Name, ModuleSpec]
    provenance: Annotated[dict[str, Any], AfterValidator(_shallow)] = {}

    @model_validator(mode="after")
    def _consistent(self) -> SpenseCheckpointConfig:
        expected = "dynamic_per_token" if self.weight_dtype == "float8_e4m3fn" else "none"
        if self.activation_scheme != expected:
            raise ValueError(f"activation_scheme must be {expected!r} for weight_dtype {self.weight_dtype!r}")
        both = sorted(set(self.ignore) & set(self.modules))
        if both:
            raise ValueError(f"{both[0]} stands in both modules and ignore")
        if not self.modules:
            raise ValueError("modules must not be empty")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPE[self.weight_dtype]


def parse_config(raw: object, file: object = "config.json") -> SpenseCheckpointConfig:
    """Validate a ``quantization_config`` dictionary; one :class:`CheckpointError` names every mistake."""
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"quantization_config must be an object, not {type(raw).__name__}", file=file, fix=REPRUNE
        )
    if raw.get("quant_method") != "spense":
        raise CheckpointError(
            f"quantization_config.quant_method is {raw.get('quant_method')!r}, expected 'spense'",
            file=file,
            fix="point at a directory that `spense prune` wrote",
        )
    version = raw.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"format version {version!r} is not supported (this release reads {FORMAT_VERSION})",
            file=file,
            fix="install the vllm-spense release that wrote the checkpoint",
        )
    try:
        return SpenseCheckpointConfig.model_validate(raw)
    except ValidationError as error:
        found = [
            f"quantization_config.{'.'.join(map(str, e['loc']))}: {e['msg']}"
            for e in error.errors(include_url=False, include_input=False)
        ]
        more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
        raise CheckpointError(
            "; ".join(found[:5]) + more,
            file=file,
            fix="docs/format.md lists every key; make the checkpoint again with `spense prune`",
        ) from None
