"""Check a whole Spense checkpoint: headers against the config, then every value a kernel would see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vllm_spense.format.checkpoint import CONFIG_NAME, Checkpoint, TensorInfo
from vllm_spense.format.errors import REPRUNE, CheckpointError
from vllm_spense.format.layout import TENSOR_NAMES
from vllm_spense.format.schema import ModuleSpec, SpenseCheckpointConfig
from vllm_spense.format.sparse24 import legal_meta_bytes

_STORED = {"float8_e4m3fn": ("F8_E4M3",), "bfloat16": ("BF16",)}
_BIAS_DTYPES = ("BF16", "F16", "F32")
_PLAIN_DTYPES = (*_BIAS_DTYPES, "F64", "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
"""Norms, embeddings, heads, buffers. An FP8 or FP4 tensor there lost its scale: engines cast it silently."""

_COUNTED = ("layers", "layer", "experts", "blocks", "labels")
_MOST_LABELS = 1 << 16
_CACHED_BYTES = 1 << 19
"""Looked at in one go on a CPU: stays in the cache."""


def expected_tensors(
    spec: ModuleSpec, weight_dtype: str
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and allowed safetensors dtypes of every tensor that one module must have."""
    layout = spec.layout()
    dtypes: dict[str, tuple[str, ...]] = {
        "sparse_values": _STORED[weight_dtype],
        "sparse_meta": ("U8",),
        "dense_weight": _STORED[weight_dtype],
        "weight_scale": ("F32",),
        "bias": _BIAS_DTYPES,
    }
    names: list = [*layout.regions()]
    if weight_dtype == "float8_e4m3fn":
        names.append("weight_scale")
    if spec.bias:
        names.append("bias")
    return {name: (layout.shape(name), dtypes[name]) for name in names}


def check_headers(checkpoint: Checkpoint) -> None:
    """Names, shapes and dtypes of all tensors, and the promised sizes, against the config.

    Nothing is read but headers.

    Raises :class:`CheckpointError` at the first missing, unexpected or mis-shaped tensor.
    """
    config = checkpoint.require_spense()
    check_sharding(config, checkpoint.directory / CONFIG_NAME)
    check_counts(checkpoint)
    tensors = checkpoint.tensors
    for module, spec in config.modules.items():
        expected = expected_tensors(spec, config.weight_dtype)
        for short, (shape, dtypes) in expected.items():
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
    for name, info in tensors.items():
        module, _, short = name.rpartition(".")
        if module in config.modules:
            if short not in expected_tensors(config.modules[module], config.weight_dtype):
                raise CheckpointError(
                    "unexpected tensor for a module with these extents",
                    file=info.file,
                    module=module,
                    tensor=short,
                    fix=REPRUNE,
                )
        elif short in TENSOR_NAMES and short != "bias":
            raise CheckpointError(
                "the tensor belongs to a module that quantization_config.modules does not list",
                file=info.file,
                module=module,
                tensor=short,
                fix=REPRUNE,
            )
        else:
            _check_header(info, None, name, info.shape, _PLAIN_DTYPES)


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


def check_values(tensors: Mapping[str, torch.Tensor], *, module: str, file: str | Path | None = None) -> None:
    """Every value of one module: legal metadata, no NaN or infinity, positive finite scales.

    Runs on any device with one reduction and one host sync per tensor; raises
    :class:`CheckpointError`.
    """
    for short, tensor in tensors.items():
        if not tensor.numel():
            continue
        bad = _bad_values(short, tensor)
        if bad is not None:
            where, what = bad
            raise CheckpointError(
                f"{what} at flat index {where}", file=file, module=module, tensor=short, fix=REPRUNE
            )


def _bytes_are_legal(short: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor of bytes is known to be legal, in a tenth of the time of finding out where it is not.

    e4m3: seven low bits that are all ones are NaN. Metadata: with x the first and y the second position of a
    nibble, y + 7 - x has its eighth if and only if x < y.
    """
    if tensor.element_size() > 1 or not tensor.is_contiguous():
        return False
    flat = tensor.view(-1).view(torch.uint8)
    # on a CPU in parts that stay in its cache, elsewhere in one reduction with one host sync
    parts = flat.split(_CACHED_BYTES) if tensor.device.type == "cpu" else [flat]
    if short == "sparse_meta":
        return all(map(_metadata_is_legal, parts))
    return tensor.dtype == torch.float8_e4m3fn and not any(map(_has_nan, parts))


def _metadata_is_legal(meta: torch.Tensor) -> bool:
    """Both nibbles of a byte at a time: no sum or difference leaves its nibble."""
    eights = ((meta >> 2) & 0x33).add_(0x77).sub_(meta & 0x33).bitwise_and_(0x88)
    return int(eights.amin()) == 0x88


def _has_nan(e4m3: torch.Tensor) -> bool:
    return int((e4m3 & 0x7F).amax()) == 0x7F


def _bad_values(short: str, tensor: torch.Tensor) -> tuple[int, str] | None:
    if _bytes_are_legal(short, tensor):
        return None
    if short == "sparse_meta":
        bad = ~legal_meta_bytes().to(tensor.device)[tensor.int()]
        what = "an illegal 2:4 metadata nibble (legal: 4 8 9 C D E)"
    elif short == "weight_scale":
        bad = ~(torch.isfinite(tensor) & (tensor > 0))
        what = "a scale that is not finite and positive"
    elif tensor.dtype == torch.float8_e4m3fn:
        bad = (tensor.view(torch.uint8) & 0x7F) == 0x7F
        what = "an FP8 NaN"
    else:
        bad = ~torch.isfinite(tensor)
        what = "NaN or infinity"
    flat = bad.flatten()
    if not bool(flat.any()):
        return None
    return int(flat.to(torch.uint8).argmax()), what


def check_sharding(config: SpenseCheckpointConfig, file: Path | None = None) -> None:
    """Every promised tensor-parallel size must cut each hybrid module's own split axis evenly."""
    for module, spec in config.modules.items():
        layout = spec.layout()
        for size in config.tensor_parallel_sizes:
            if layout.sparse and not layout.shardable(layout.split, size):
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
        check_values(checkpoint.module_tensors(module), module=module, file=checkpoint.directory)
        progress(module)
    for name in checkpoint.plain_tensors():
        tensor = checkpoint.load(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError("NaN or infinity", file=checkpoint.directory, tensor=name, fix=REPRUNE)
