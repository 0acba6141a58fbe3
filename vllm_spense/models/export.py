"""Spense checkpoint -> an ordinary dense checkpoint with the zeros written out, for any other engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_spense.format.bitsandbytes import open_checkpoint
from vllm_spense.format.checkpoint import Checkpoint
from vllm_spense.format.codecs import FP8, INT8, Codec, FourBit
from vllm_spense.format.codecs.four_bit import BLOCK
from vllm_spense.format.schema import AnyCheckpointConfig, parse_config
from vllm_spense.format.validate import check_headers, check_values
from vllm_spense.format.writer import CheckpointWriter
from vllm_spense.models.fused import fused_groups

ExportFormat = Literal["bfloat16", "float32", "fp8", "int8", "spense-dense"]
W8A8: dict[str, Codec] = {"fp8": FP8, "int8": INT8}
"""Formats that keep the stored values, which must be in that codec."""


def export(
    directory: str | Path,
    out: str | Path,
    *,
    format: ExportFormat = "bfloat16",
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda module: None,
) -> Path:
    """Write a dense Hugging Face checkpoint with the same function as the Spense one.

    ``bfloat16``/``float32``: plain weights (stored value times scale, rounded once; float32 is exact).
    ``fp8``, ``int8``: the stored values and scales, unrounded, in the compressed-tensors layout that stock
    vLLM runs with per-token activations of that dtype: the same W8A8 arithmetic without this plugin.
    ``spense-dense``: a Spense checkpoint without 2:4 regions, the dense twin that gives bit-identical
    results through the same operators (to tell a format problem from a kernel problem).
    A directory of bitsandbytes' becomes the same: ``bfloat16`` has the bits of its ``dequantize_4bit``, and
    ``spense-dense`` its codes, where blocks and table are those of our codec.
    Raises :class:`CheckpointError` for a damaged source, ``ValueError`` for a format that cannot hold it.
    """
    checkpoint = open_checkpoint(directory)
    config = checkpoint.require_spense()
    stored = config.all_codecs()
    if format in W8A8 and any(codecs.single is not W8A8[format] for codecs in stored):
        names = ", ".join(codecs.name for codecs in stored)
        raise ValueError(f"{directory} holds {names} weights: export it as bfloat16")
    if format == "spense-dense":
        _refuse_variants(checkpoint, config)
    check_headers(checkpoint)
    with CheckpointWriter(out, overwrite=overwrite, inputs=[directory]) as writer:
        writer.write_config(_dense_config(checkpoint, format))
        writer.copy_side_files(checkpoint.directory)
        writer.write_text("README.md", _card(checkpoint, format))
        # Other engines want the architecture's own linears; the twin stays a Spense checkpoint.
        model_type = "" if format == "spense-dense" else str(checkpoint.config.get("model_type"))
        for name, parts in fused_groups(checkpoint.plain_tensors(), model_type).items():
            writer.add(name, _joined([checkpoint.load(part) for part in parts]))
        for module, parts in fused_groups(config.modules, model_type).items():
            _export_module(checkpoint, module, parts, format, writer)
            for part in parts:
                progress(part)
    return Path(out)


def _refuse_variants(checkpoint: Checkpoint, config: AnyCheckpointConfig) -> None:
    """``ValueError`` for a module of others' in a form of our codec that config.json cannot name."""
    for module in config.modules:
        if (found := checkpoint.linear(module).codecs.single) is config.linear(module).codecs.single:
            continue
        assert isinstance(found, FourBit)
        whole = f"blocks of {found.block} values" if found.block != BLOCK else "a table of its own"
        raise ValueError(
            f"{checkpoint.directory}: {module} has {whole}, and Spense checkpoints have blocks of {BLOCK} "
            f"within a row and the usual table: export it as bfloat16"
        )


def _export_module(
    checkpoint: Checkpoint, module: str, parts: list[str], format: ExportFormat, writer: CheckpointWriter
) -> None:
    exported = [_dense_tensors(checkpoint, part, format) for part in parts]
    for short in exported[0]:
        writer.add(f"{module}.{short}", _joined([tensors[short] for tensors in exported]))


def _dense_tensors(checkpoint: Checkpoint, module: str, format: ExportFormat) -> dict[str, torch.Tensor]:
    """The tensors of one module by short name; outputs are the first dimension of each."""
    linear, tensors = checkpoint.linear(module), checkpoint.module_tensors(module)
    check_values(tensors, linear.codecs, module=module, file=checkpoint.directory)
    if format == "spense-dense":
        try:
            dense = linear.spelled_out(tensors)
        except ValueError as error:
            raise ValueError(f"{module}: {error}. Export as bfloat16") from None
    elif format in W8A8:
        spelled = linear.spelled_out(tensors)
        dense = {"weight": spelled["dense_weight"], "weight_scale": spelled["weight_scale"][:, None]}
    else:
        dense = {"weight": linear.decode(tensors).to(getattr(torch, format))}
    return dense | ({"bias": tensors["bias"]} if "bias" in tensors else {})


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts of a fused linear stacked along the outputs."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dense_config(checkpoint: Checkpoint, format: ExportFormat) -> dict[str, Any]:
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if format == "spense-dense":
        config["quantization_config"] = _without_sparsity(checkpoint.require_spense()).model_dump()
        return config
    if format in W8A8:
        config["quantization_config"] = w8a8_config(W8A8[format], checkpoint.require_spense().ignore)
        return config
    config["dtype"] = format
    config.pop("torch_dtype", None)
    return config


def w8a8_config(codec: Codec, ignore: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` of stock vLLM's dense FP8 or INT8: scales per channel and per token."""
    kind = "float" if codec.dtype.is_floating_point else "int"
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": common | {"strategy": "channel", "dynamic": False},
                "input_activations": common | {"strategy": "token", "dynamic": True},
            }
        },
    }


def _without_sparsity(config: AnyCheckpointConfig) -> AnyCheckpointConfig:
    """The same modules with empty 2:4 regions; ``ValueError`` for one whose regions have two codecs."""
    modules = {}
    for name, spec in config.modules.items():
        codecs = config.linear(name).codecs
        if codecs.single is None:
            raise ValueError(f"{name} holds {codecs.name} weights, as no dense layer can: export as bfloat16")
        layout = spec.layout().without_sparsity
        modules[name] = spec.model_copy(update={"split": "output", "sparse": 0, "dense": layout.dense})
    return parse_config(config.model_copy(update={"modules": modules}).model_dump())


def _card(checkpoint: Checkpoint, format: ExportFormat) -> str:
    return (
        f"# Dense export of {checkpoint.directory.name}\n\n"
        f"Written by `spense export` ({format}). The weights are those of a Spense checkpoint with its "
        "zeros written out; the order of the MLPs' intermediate dimension and of the heads is that "
        "checkpoint's.\n"
    )
