"""The loader that transformers calls for ``quant_method: spense``: ordinary dense weights, at any dtype.

transformers reads the files, finds the places of the tensors, and moves them to their devices, as for every
checkpoint. Only this is ours: the tensors of a Spense layer become one weight, with the values that
``spense export`` writes. The loaded model is an ordinary one: it can be trained, adapted, saved and moved.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_spense.format import (
    Checkpoint,
    CheckpointError,
    Codecs,
    Layout,
    LinearFormat,
)
from vllm_spense.format.errors import REPRUNE
from vllm_spense.format.layout import META_GROUP
from vllm_spense.format.validate import check_headers, check_values
from vllm_spense.models.families import FUSED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_METHOD = "spense"


def register() -> None:
    """Put the loader into transformers' registry, once."""
    if _METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(_METHOD)(SpenseConfig)
        register_quantizer(_METHOD)(SpenseLoader)


class SpenseConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint while transformers loads it; the loaded model has none."""

    dequantize = True  # transformers then takes this config out of the model that it has loaded

    def __init__(self, /, **raw: Any) -> None:
        self.quant_method = _METHOD  # the rest is read, and checked, with the checkpoint


class SpenseLoader(HfQuantizer):
    """Turns the tensors of each Spense layer into the weight of the model's own linear layer.

    Raises :class:`CheckpointError` for a damaged checkpoint, and for one that does not fit the model;
    ``ValueError`` for tensor parallelism.
    """

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """bf16 where config.json names no dtype and transformers took that of the stored weights."""
        self.dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
        return self.dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("transformers names no weight files", fix=REPRUNE)
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "a Spense checkpoint is loaded whole, not cut by tp_plan or distributed_config. "
                "Fix: load what `spense export` makes"
            )
        self.checkpoint = Checkpoint(Path(checkpoint_files[0]).parent)
        check_headers(self.checkpoint)
        config = self.checkpoint.require_spense()
        for module, spec in config.modules.items():
            if spec.bias:  # all else that a layer holds goes through Decompress
                bias = {"bias": self.checkpoint.load(f"{module}.bias")}
                check_values(bias, config.codecs, module=module, file=self.checkpoint.directory)
        stored = config.all_codecs()
        if len(stored) > 1:  # transformers says of which parameter the tensors are, and not which they are
            raise CheckpointError(
                f"the layers have several codecs ({', '.join(c.name for c in stored)})",
                file=self.checkpoint.directory,
                fix="load what `spense export` makes",
            )
        self.expected = _expected(model, self.dtype)
        self.decompress = Decompress(self.checkpoint.directory, stored.pop(), self.expected)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Asked by transformers after 5.19: ours are read as stored, all others in the model's dtype."""
        ours = self.decompress in getattr(converter, "operations", ())
        return None if ours else super().get_new_dtype(converter, param, dtype)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Which stored tensors become which parameter, by the ends of names: transformers knows the rest."""
        ours = self.decompress.names
        sources = [(".weight", [f".{short}" for short in ours])]
        for fused, parts in FUSED.items():
            for kind, shorts in (("bias", ["bias"]), ("weight", ["weight", *ours])):
                if any(name.endswith(f".{fused}.{kind}") for name in self.expected):
                    stored = [f".{part}.{short}" for part in parts for short in shorts]
                    sources.insert(0, (f".{fused}.{kind}", stored))
        return [
            WeightConverter([re.escape(name) + "$" for name in names], [target], operations=[self.decompress])
            for target, names in sources
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.decompress.problem is not None:
            raise self.decompress.problem
        self._check_missing(model)
        for name, tensor in model.state_dict(keep_vars=True).items():
            shape, dtype = self.expected.get(name, (tensor.shape, tensor.dtype))
            if tensor.shape != shape:
                raise _misfit(self.checkpoint.directory, name, tuple(tensor.shape), tuple(shape))
            # transformers leaves what it renames in the stored dtype: experts, and all tensors for AutoModel
            if tensor.is_floating_point() and not tensor.is_meta and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        # what is left is undone by save_pretrained, which is right for all conversions but ours
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [
                c for c in conversions if self.decompress not in getattr(c, "operations", ())
            ]

    def _check_missing(self, model: PreTrainedModel) -> None:
        """Refuse random weights, except for a head that this class adds to the checkpoint's model."""
        missing = self.decompress.missing
        if missing is None:
            raise CheckpointError(
                f"no Spense layer of this checkpoint is part of {type(model).__name__}",
                file=self.checkpoint.directory,
                fix="load it with the class that config.json names under architectures, or as AutoModel",
            )
        ignored = model._keys_to_ignore_on_load_missing or ()
        same = type(model).__name__ in (self.checkpoint.config.get("architectures") or ())
        body = "" if same or model.base_model is model else f"{model.base_model_prefix}."
        for name in sorted(missing):
            if name.startswith(body) and not any(re.search(pattern, name) for pattern in ignored):
                raise CheckpointError(
                    "the tensor is missing", file=self.checkpoint.directory, tensor=name, fix=REPRUNE
                )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class Decompress(ConversionOps):
    """The stored tensors of one linear layer, or of the parts of a fused one, to its weight or bias.

    transformers would turn an exception into its report's own, so the first one waits in ``problem`` for the
    end of loading. ``missing`` is transformers' set of the parameters in no file, None before a first layer.
    """

    def __init__(
        self, directory: Path, codecs: Codecs, expected: dict[str, tuple[torch.Size, torch.dtype]]
    ) -> None:
        self.directory = directory
        self.codecs = codecs
        self.expected = expected
        self.problem: CheckpointError | None = None
        self.missing: set[str] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Short names of what is stored of a layer, but its bias."""
        return tuple(LinearFormat(Layout("output", 2, 8, 1), self.codecs).tensors())

    def __deepcopy__(self, memo: object) -> Decompress:
        return self  # transformers copies a converter for every tensor

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("a dense weight is not pruned again")

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Tensors by the pattern of their names, to the tensor of one parameter."""
        self.missing = missing_keys
        shape, dtype = self.expected[full_layer_name]
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for pattern in source_patterns:  # in the order of the fused rows
            if pattern in input_dict:
                part, _, short = re.sub(r"[\\$]", "", pattern).rpartition(".")
                parts.setdefault(part, {})[short] = input_dict[pattern][0]
        try:
            rows = [self._rows(tensors, full_layer_name, shape[-1]) for tensors in parts.values()]
            whole = torch.cat(rows).to(dtype) if len(rows) > 1 else rows[0].to(dtype)
            if whole.shape != shape:
                raise _misfit(self.directory, full_layer_name, tuple(whole.shape), tuple(shape))
        except CheckpointError as error:
            self.problem = self.problem or error
            whole = torch.zeros(shape, dtype=dtype)
        return {full_layer_name: whole}

    def _rows(self, tensors: dict[str, torch.Tensor], name: str, in_features: int) -> torch.Tensor:
        check_values(tensors, self.codecs, module=name, file=self.directory)
        for plain in ("weight", "bias"):
            if plain in tensors:
                return tensors[plain]
        scale = tensors.get("weight_scale")
        if scale is not None and scale.dtype != torch.float32:
            raise CheckpointError(
                f"transformers {transformers.__version__} rounds scales to {scale.dtype} when it reads them",
                fix="load what `spense export` makes, or use another version of transformers",
            )
        return LinearFormat(_layout(tensors, self.codecs, in_features), self.codecs).decode(tensors)


def _layout(tensors: dict[str, torch.Tensor], codecs: Codecs, in_features: int) -> Layout:
    """What the shapes say: they have been checked. ``in_features`` decides where both splits would fit."""
    meta, dense = tensors.get("sparse_meta"), tensors.get("dense_weight")
    sparse_columns = 0 if meta is None else META_GROUP * meta.shape[1]
    if dense is None:
        assert meta is not None
        return Layout("output", meta.shape[0], sparse_columns, meta.shape[0])
    columns = dense.shape[1] * dense.element_size() * 8 // codecs.dense.bits
    if (columns - 1) in (in_features, in_features - sparse_columns):  # half of the last byte is filled up
        columns -= 1
    if meta is None:
        return Layout("output", dense.shape[0], columns, 0)
    if sparse_columns == columns and (meta.shape[0] != dense.shape[0] or columns == in_features):
        return Layout("output", meta.shape[0] + dense.shape[0], columns, meta.shape[0])
    return Layout("input", dense.shape[0], sparse_columns + columns, sparse_columns)


def _expected(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of everything in the loaded model, where some classes keep parameters in fp32."""
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else model.dtype_plan  # 5.0
    planned = [(re.compile(pattern.replace("*", ".*")), wanted) for pattern, wanted in plan.items()]
    return {
        name: (tensor.shape, next((d for p, d in planned if p.search(name)), tensor.dtype))
        for name, tensor in model.state_dict().items()
    }


def _misfit(directory: Path, name: str, stored: Sequence[int], model: Sequence[int]) -> CheckpointError:
    return CheckpointError(
        f"shape {list(stored)} in the files, {list(model)} in the model",
        file=directory,
        tensor=name,
        fix=f"config.json must be the checkpoint's own; else {REPRUNE}",
    )
