"""Schema of ``quantization_config`` in a Spense checkpoint's config.json.

Version 1 has one codec for the whole file, FP8 or bf16, by its dtype's name in torch. Version 2 names a codec
for the file, for a module or for a region of one; it is written only where version 1 cannot say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from vllm_spense.format.codecs import BF16, FP8, Codec, codec_names
from vllm_spense.format.errors import REPRUNE, CheckpointError
from vllm_spense.format.layout import Layout, Split
from vllm_spense.format.linear import Codecs, LinearFormat

FORMAT_VERSIONS = (1, 2)
MAX_FEATURES = 1 << 24
"""No linear layer has more features on a side; a larger number is a damaged or hostile file."""

Extent = Annotated[int, Field(strict=True, ge=0, le=MAX_FEATURES)]
Name = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[A-Za-z0-9_.\-]+$")]
WeightDtype = Literal["float8_e4m3fn", "bfloat16"]
ActivationScheme = Literal["dynamic_per_token", "none"]
MAX_NESTING = 16
"""Levels that provenance may have: vLLM pickles the configuration for its workers, and pickle recurses."""
_VERSION_1: dict[WeightDtype, Codec] = {"float8_e4m3fn": FP8, "bfloat16": BF16}
"""Its names for codecs."""


def _scheme(codec: Codec) -> ActivationScheme:
    """What version 1 says of the inputs of a layer in ``codec``; their dtype is that of the weights."""
    return "none" if codec.activation_dtype is None else "dynamic_per_token"


def _known(name: str) -> str:
    if name not in codec_names():
        raise ValueError(f"unknown codec {name!r} (this release knows {', '.join(codec_names())})")
    return name


CodecName = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_known)]


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


class RegionCodecs(_Strict):
    """A codec for each region of a layer that has both."""

    sparse: CodecName
    dense: CodecName


class CodecModuleSpec(ModuleSpec):
    """The same, and its codec where it is not the file's."""

    codec: CodecName | RegionCodecs | None = None


TensorParallelSizes = Annotated[list[Annotated[int, Field(strict=True, ge=1, le=1024)]], Field(min_length=1)]
Provenance = Annotated[dict[str, Any], AfterValidator(_shallow)]


class _Modules(_Strict):
    """What both versions say of their ``modules``; fields are a version's own, for their order is on disk."""

    if TYPE_CHECKING:
        modules: Any

    def codecs_of(self, spec: ModuleSpec) -> Codecs:
        """Codecs of one of the modules."""
        raise NotImplementedError

    def linear(self, module: str) -> LinearFormat:
        """What is stored of one module."""
        spec = self.modules[module]
        return LinearFormat(spec.layout(), self.codecs_of(spec), spec.bias)

    def all_codecs(self) -> list[Codecs]:
        """The different ones among the modules, by their names."""
        return sorted({self.codecs_of(spec) for spec in self.modules.values()}, key=lambda c: c.name)


class SpenseCheckpointConfig(_Modules):
    """What a Spense checkpoint of version 1 says about itself; see docs/format.md for every key."""

    quant_method: Literal["spense"] = "spense"
    version: Literal[1] = 1
    weight_dtype: WeightDtype
    activation_scheme: ActivationScheme
    tensor_parallel_sizes: TensorParallelSizes
    ignore: list[Name] = []
    modules: dict[Name, ModuleSpec]
    provenance: Provenance = {}

    @model_validator(mode="after")
    def _consistent(self) -> SpenseCheckpointConfig:
        expected = _scheme(_VERSION_1[self.weight_dtype])
        if self.activation_scheme != expected:
            raise ValueError(f"activation_scheme must be {expected!r} for weight_dtype {self.weight_dtype!r}")
        _check_modules(self.modules, self.ignore)
        return self

    @property
    def codecs(self) -> Codecs:
        """Codecs of every module."""
        return Codecs(_VERSION_1[self.weight_dtype], _VERSION_1[self.weight_dtype])

    def codecs_of(self, spec: ModuleSpec) -> Codecs:
        """Codecs of one of the modules."""
        return self.codecs


class SpenseCheckpointConfig2(_Modules):
    """The same of version 2: ``codec`` is that of all modules that name none."""

    quant_method: Literal["spense"] = "spense"
    version: Literal[2] = 2
    codec: CodecName
    tensor_parallel_sizes: TensorParallelSizes
    ignore: list[Name] = []
    modules: dict[Name, CodecModuleSpec]
    provenance: Provenance = {}

    @model_validator(mode="after")
    def _consistent(self) -> SpenseCheckpointConfig2:
        _check_modules(self.modules, self.ignore)
        return self

    @property
    def codecs(self) -> Codecs:
        """Codecs of the modules that name none."""
        return Codecs.of(self.codec)

    def codecs_of(self, spec: ModuleSpec) -> Codecs:
        """Codecs of one of the modules."""
        own = spec.codec if isinstance(spec, CodecModuleSpec) else None
        return Codecs.of(own.model_dump() if isinstance(own, RegionCodecs) else own or self.codec)


AnyCheckpointConfig = SpenseCheckpointConfig | SpenseCheckpointConfig2


def checkpoint_config(
    codec: Codec,
    *,
    own: Mapping[str, Codecs] | None = None,
    tensor_parallel_sizes: list[int],
    modules: dict[str, ModuleSpec],
    ignore: list[str],
    provenance: dict[str, Any],
) -> AnyCheckpointConfig:
    """The configuration of a checkpoint in ``codec``, in the oldest version that can say it.

    ``own``: the codecs of modules, where others may be needed.
    """
    others = {name: codecs for name, codecs in (own or {}).items() if codecs != Codecs(codec, codec)}
    rest: dict[str, Any] = {
        "tensor_parallel_sizes": tensor_parallel_sizes,
        "ignore": ignore,
        "modules": {
            name: spec.model_dump() | ({"codec": _spelled(others[name])} if name in others else {})
            for name, spec in modules.items()
        },
        "provenance": provenance,
    }
    for weight_dtype, known in _VERSION_1.items():
        if known is codec and not others:
            return SpenseCheckpointConfig(weight_dtype=weight_dtype, activation_scheme=_scheme(codec), **rest)
    return SpenseCheckpointConfig2(codec=codec.name, **rest)


def _spelled(codecs: Codecs) -> str | dict[str, str]:
    return codecs.name if codecs.single else {"sparse": codecs.sparse.name, "dense": codecs.dense.name}


def _check_modules(modules: Mapping[str, ModuleSpec], ignore: list[str]) -> None:
    both = sorted(set(ignore) & set(modules))
    if both:
        raise ValueError(f"{both[0]} stands in both modules and ignore")
    if not modules:
        raise ValueError("modules must not be empty")


def parse_config(raw: object, file: object = "config.json") -> AnyCheckpointConfig:
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
    if type(version) is not int or version not in FORMAT_VERSIONS:
        raise CheckpointError(
            f"format version {version!r} is not supported (this release reads 1 and 2)",
            file=file,
            fix="install the vllm-spense release that wrote the checkpoint",
        )
    fix = "docs/format.md lists every key; make the checkpoint again with `spense prune`"
    if version == 1:
        return validated(SpenseCheckpointConfig, raw, file, fix)
    return validated(SpenseCheckpointConfig2, raw, file, fix)


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], raw: object, file: object, fix: str) -> Model:
    """``raw`` as ``model``; one :class:`CheckpointError` names the first mistakes and counts the others."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = [
            f"quantization_config.{'.'.join(map(str, e['loc']))}: {e['msg']}"
            for e in error.errors(include_url=False, include_input=False)
        ]
        more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
        raise CheckpointError("; ".join(found[:5]) + more, file=file, fix=fix) from None
