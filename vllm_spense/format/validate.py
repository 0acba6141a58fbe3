"""Check a whole checkpoint: headers against the config, then every value a kernel would see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vllm_spense.format.checkpoint import CONFIG_NAME, Checkpoint, TensorInfo
from vllm_spense.format.codecs import tensor_names
from vllm_spense.format.errors import REPRUNE, CheckpointError
from vllm_spense.format.linear import Codecs, LinearFormat, illegal_value
from vllm_spense.format.schema import AnyCheckpointConfig

_BIAS_DTYPES = ("BF16", "F16", "F32")
_PLAIN_DTYPES = (*_BIAS_DTYPES, "F64", "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
"""Norms, embeddings, heads, buffers. An FP8 or FP4 tensor there lost its scale: engines cast it silently."""

_COUNTED = ("layers", "layer", "experts", "blocks", "labels")
_MOST_LABELS = 1 << 16
_SAFETENSORS = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
}
"""Its names for what codecs store."""


def expected_tensors(linear: LinearFormat) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and allowed safetensors dtypes of every tensor that one module must have."""
    held = linear.held().items()
    return {name: (stored.shape, tuple(_SAFETENSORS[d] for d in stored.dtypes)) for name, stored in held}


def check_headers(checkpoint: Checkpoint) -> None:
    """Names, shapes and dtypes of all tensors, and the promised sizes, against the config.

    Nothing is read but headers.

    Raises :class:`CheckpointError` at the first missing, unexpected or mis-shaped tensor.
    """
    config = checkpoint.require_spense()
    check_sharding(config, checkpoint.directory / CONFIG_NAME)
    check_counts(checkpoint)
    if not checkpoint.foreign:
        _check_modules(checkpoint, config)
    for name in checkpoint.plain_tensors():
        info = checkpoint.tensors[name]
        _check_header(info, None, name, info.shape, _PLAIN_DTYPES)


def _check_modules(checkpoint: Checkpoint, config: AnyCheckpointConfig) -> None:
    """Every module has its tensors, and no other is called like one of a module."""
    tensors = checkpoint.tensors
    expected = {module: expected_tensors(config.linear(module)) for module in config.modules}
    for module, parts in expected.items():
        for short, (shape, dtypes) in parts.items():
            info = tensors.get(f"{module}.{short}")
            if info is None:
                raise CheckpointError(
                    f"the tensor is missing (expected {dtypes[0]} {list(shape)})",
                    file=checkpoint.directory,
                    module=module,
                    tensor=short,
                    fix=REPRUNE,
                )
            _check_header(info, module, short, shape, dtypes)
    ours = tensor_names()
    for name, info in tensors.items():
        module, _, short = name.rpartition(".")
        if module in expected:
            if short not in expected[module]:
                raise CheckpointError(
                    "unexpected tensor for a module with these extents",
                    file=info.file,
                    module=module,
                    tensor=short,
                    fix=REPRUNE,
                )
        elif short in ours:
            raise CheckpointError(
                "the tensor belongs to a module that quantization_config.modules does not list",
                file=info.file,
                module=module,
                tensor=short,
                fix=REPRUNE,
            )


def _check_header(
    info: TensorInfo, module: str | None, short: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    if info.shape != shape:
        problem = f"shape {list(info.shape)}, expected {list(shape)}"
    elif info.dtype not in dtypes:
        problem = f"dtype {info.dtype}, expected {' or '.join(dtypes)}"
    else:
        return
    raise CheckpointError(problem, file=info.file, module=module, tensor=short, fix=REPRUNE)


def check_values(
    tensors: Mapping[str, torch.Tensor], codecs: Codecs, *, module: str, file: str | Path | None = None
) -> None:
    """Every value of one module: legal metadata, no NaN or infinity, positive finite scales.

    Runs on any device with one reduction and one host sync per tensor; raises
    :class:`CheckpointError`.
    """
    for short, tensor in tensors.items():
        bad = illegal_value(short, tensor, codecs)
        if bad is not None:
            where, what = bad
            raise CheckpointError(
                f"{what} at flat index {where}", file=file, module=module, tensor=short, fix=REPRUNE
            )


def check_sharding(config: AnyCheckpointConfig, file: Path | None = None) -> None:
    """Every promised tensor-parallel size must cut each hybrid module's own split axis evenly."""
    for module in config.modules:
        linear = config.linear(module)
        layout = linear.layout
        for size in config.tensor_parallel_sizes:
            if layout.sparse and not linear.shardable(layout.split, size):
                raise CheckpointError(
                    f"tensor_parallel_sizes promises {size}, but {layout.sparse} sparse + "
                    f"{layout.dense} dense {layout.split} features cannot be cut that way",
                    file=file,
                    module=module,
                    fix=REPRUNE,
                )


def check_counts(checkpoint: Checkpoint) -> None:
    """Layers, experts and labels that config.json counts: building a model takes time and memory for each.

    Every layer and expert has a tensor of its own, so more of them than tensors are a contradiction.
    A bound counts nothing: Qwen2's ``max_window_layers`` is 28 in models of any depth.
    """

    def walk(node: Mapping[str, object]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value)
            last = key.rpartition("_")[2]
            limit = _MOST_LABELS if last == "labels" else len(checkpoint.tensors)
            counted = last in _COUNTED and not key.startswith("max_")
            if counted and isinstance(value, (int, float)) and value > limit:
                raise CheckpointError(
                    f"{key} is {str(value)[:20]}, more than the {limit} that this checkpoint can have",
                    file=checkpoint.directory / CONFIG_NAME,
                    fix=REPRUNE,
                )

    walk({k: v for k, v in checkpoint.config.items() if k != "quantization_config"})


def check_checkpoint(checkpoint: Checkpoint, progress: Callable[[str], None] = lambda module: None) -> None:
    """Headers, sharding promises and all values of a checkpoint; ``progress`` gets module names."""
    config = checkpoint.require_spense()
    check_headers(checkpoint)
    for module in config.modules:
        codecs = checkpoint.linear(module).codecs
        check_values(checkpoint.module_tensors(module), codecs, module=module, file=checkpoint.directory)
        progress(module)
    for name in checkpoint.plain_tensors():
        tensor = checkpoint.load(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError("NaN or infinity", file=checkpoint.directory, tensor=name, fix=REPRUNE)
