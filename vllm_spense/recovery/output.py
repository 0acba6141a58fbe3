"""The files of a recovered checkpoint: the old ones with new values, and a note of how they came."""

from __future__ import annotations

import math
from typing import Any

import torch

from vllm_spense.format import Checkpoint, CheckpointWriter
from vllm_spense.pruning.card import CARD_NAME
from vllm_spense.pruning.fingerprint import versions
from vllm_spense.recovery.config import RecoveryConfig
from vllm_spense.recovery.gates import relu_config
from vllm_spense.recovery.student import Student
from vllm_spense.text import TextRecord

_OBJECTIVES = {
    "both": "towards the dense model's next-token distributions and the text's next tokens in equal parts",
    "distill": "towards the dense model's next-token distributions (KL divergence)",
    "tokens": "on the text's next tokens (cross entropy)",
}
_TRAINED = {
    "mlp": "the MLPs' kept weights and the norms",
    "all": "the kept weights of all linears and the norms",
}
_RELU = """\
The gates are ReLU in place of SiLU. With that, and with an L1 penalty of {penalty:g} on the sum of a token's
absolute hidden values, """
_PRUNED = """\
Zeros of the 2:4 regions stayed zeros. Losses per layer and the
evaluation above are from before."""
_DENSE = "What stands above is from before."


def write_rest(
    writer: CheckpointWriter, checkpoint: Checkpoint, config: RecoveryConfig, text: TextRecord
) -> None:
    """Write all files but the weights, which can be done before the training."""
    writer.write_config(_config(checkpoint, config, text))
    writer.copy_side_files(checkpoint.directory)
    writer.write_text(CARD_NAME, _card(checkpoint, config, text))


def write_density(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    config: RecoveryConfig,
    text: TextRecord,
    density: list[float],
) -> None:
    """config.json once more, with what share of its hidden values each layer uses: serving goes by that."""
    writer.write_config(_config(checkpoint, config, text) | {"sparsity_density": density})


def write_weights(
    writer: CheckpointWriter, checkpoint: Checkpoint, student: Student, config: RecoveryConfig
) -> None:
    """Write the tensors of ``checkpoint`` with the student's values, in the dtypes they have now.

    What was not trained is copied bit for bit. What was is rounded stochastically: a short run moves most
    weights by less than half a step of their dtype, and rounding to nearest would undo it. Raises
    ``ValueError`` for values that are not finite.
    """
    generator = torch.Generator().manual_seed(config.seed)
    values = dict(pair for trained in student.trained for pair in trained.values())
    for name in checkpoint.plain_tensors():
        stored = checkpoint.load(name)
        if name in values:
            stored = round_stochastically(values[name], stored.dtype, generator).to(stored.dtype)
        writer.add(name, stored)
    for module in [] if checkpoint.quantization is None else checkpoint.quantization.modules:
        for short, tensor in _module(checkpoint, module, values.get(module), generator).items():
            writer.add(f"{module}.{short}", tensor)


def _module(
    checkpoint: Checkpoint, name: str, value: torch.Tensor | None, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The tensors of one module by short name, with ``value [N, K]`` fp32 as its weight (None: its own)."""
    stored = checkpoint.module_tensors(name)
    if value is None:
        return stored
    linear = checkpoint.linear(name)
    values, scale = linear.values(stored)
    if not values.dtype.is_floating_point:  # whose range ends at the largest weight: its scale is a new one
        scale = linear.encode(value)["weight_scale"]
    unit = torch.ones(1, 1) if scale is None else scale[:, None]
    value = round_stochastically(value / unit, values.dtype, generator) * unit  # encode finds this scale
    return linear.encode(value, stored.get("bias"))


def round_stochastically(value: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """fp32 ``value`` up or down to the precision of ``dtype``, the nearer the likelier: right on average.

    Values that ``dtype`` holds, zeros among them, stay as they are. Below its normal range, where steps no
    longer shrink, its conversion still has to round. Integers of any size are rounded to.
    """
    if not dtype.is_floating_point:
        below = value.floor()
        return below + (torch.rand(value.shape, generator=generator) < value - below)
    dropped = round(math.log2(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps))
    noise = torch.randint(0, 1 << dropped, value.shape, generator=generator, dtype=torch.int32)
    return ((value.contiguous().view(torch.int32) + noise) & -(1 << dropped)).view(torch.float32)


def _config(checkpoint: Checkpoint, config: RecoveryConfig, text: TextRecord) -> dict[str, Any]:
    """config.json, whose provenance has one more entry in ``recovery``; a dense model's has none."""
    described = checkpoint.config if config.activation is None else relu_config(checkpoint.config)
    if (quantization := checkpoint.quantization) is None:
        return described
    entry = config.decisive() | {
        "tokens": config.tokens,
        "text": text.dump(),
        "versions": versions("vllm-spense", "torch", "transformers"),
    }
    before = quantization.provenance.get("recovery", [])
    provenance = quantization.provenance | {"recovery": [*before, entry]}
    dumped = quantization.model_copy(update={"provenance": provenance}).model_dump(mode="json")
    return described | {"quantization_config": dumped}


def _card(checkpoint: Checkpoint, config: RecoveryConfig, text: TextRecord) -> str:
    """The checkpoint's model card with a section on this run at its end."""
    directory = checkpoint.directory
    path = directory / CARD_NAME
    card = path.read_text(encoding="utf-8") if path.is_file() else f"# {directory.name}\n"
    rest = _DENSE if checkpoint.quantization is None else _PRUNED
    before = "After pruning, " if config.activation is None else _RELU.format(penalty=config.penalty)
    return f"""\
{card.rstrip()}

## Recovery

{before}{_TRAINED[config.train]} were trained {_OBJECTIVES[config.objective]}: {config.steps} steps,
{config.tokens} tokens of {text.names} (SHA-256 {text.sha256[:16]}…), learning rate
{config.learning_rate:g}. {rest}
"""
