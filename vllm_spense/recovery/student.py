"""A checkpoint as a transformers model whose kept weights can be trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_spense.evaluation import load_model
from vllm_spense.format import Checkpoint, Layout, dequantize
from vllm_spense.models.families import MLP_SPLITS, in_attention
from vllm_spense.models.fused import fused_groups
from vllm_spense.models.parts import decoder
from vllm_spense.network import SpenseNames, language_head, spense_names, stored_names
from vllm_spense.recovery.config import Train
from vllm_spense.recovery.gates import open_with_relu


@dataclass(frozen=True)
class Trained:
    """A trainable ``parameter`` (fp32) and the checkpoint's names of its rows.

    ``parts``: modules of a Spense checkpoint, or plain tensors, with the number of rows of each; more
    than one where the architecture fuses what the checkpoint keeps apart.
    """

    parameter: nn.Parameter
    parts: dict[str, int]

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each part's name and its rows of the parameter as it is now, on the CPU."""
        rows = self.parameter.detach().cpu().split(list(self.parts.values()))
        yield from zip(self.parts, rows, strict=True)


@dataclass(frozen=True)
class Student:
    """The ``model`` (fp32, in evaluation mode: without dropout) and what is ``trained`` of it."""

    model: nn.Module
    trained: list[Trained]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [trained.parameter for trained in self.trained]


def load_student(
    checkpoint: Checkpoint, train: Train, device: torch.device, *, relu: bool = False
) -> Student:
    """The stored values, dequantised, as a model; activations are not rounded. ``relu``: with ReLU gates,
    whatever they were (:func:`~vllm_spense.recovery.gates.open_with_relu`).

    Trainable are the MLPs' linears and the norms' weights, with ``train="all"`` attention's linears too.
    Gradients of zeros in a 2:4 region are zero, so AdamW without weight decay leaves these exactly zero.
    Embeddings, head, biases, routers, routed experts and all that is not the text decoder's do not change.
    Raises :class:`CheckpointError` for damaged directories, ``ValueError`` for models without a head.
    """
    model: Any = load_model(checkpoint.directory, activations="none", device=device).requires_grad_(False)
    language_head(model)
    if relu:
        open_with_relu(model)
    if checkpoint.quantization is None:
        names = SpenseNames({}, stored_names(model, checkpoint.tensors))
    else:
        names = spense_names(model, checkpoint)
    trained = []
    for name, modules in names.modules.items():
        layouts = {module: checkpoint.layout(module) for module in modules}
        linear = _linear(model.get_submodule(name))
        model.set_submodule(name, linear)
        if _is_linear_to_train(modules[0], train):
            parameter = _trainable(linear.weight)
            _fix_zeros(parameter, list(layouts.values()))
            rows = {module: layout.out_features for module, layout in layouts.items()}
            trained.append(Trained(parameter, rows))
    text = next(name for name, module in model.named_modules() if module is decoder(model))
    kind = model.config.get_text_config().model_type
    for name, parts in fused_groups((n for n in names.plain if n.startswith(text)), kind).items():
        tensors = [names.plain[part] for part in parts]
        module, _, short = tensors[0].rpartition(".")
        is_norm = "norm" in module.rpartition(".")[2]
        if short == "weight" and (is_norm or _is_linear_to_train(module, train)):
            rows = {tensor: checkpoint.tensors[tensor].shape[0] for tensor in tensors}
            trained.append(Trained(_trainable(model.get_parameter(name)), rows))
    return Student(model, trained)


def _is_linear_to_train(module: str, train: Train) -> bool:
    """Whether the linear ``module`` (or plain MLP matrix of a checkpoint) belongs to what is trained."""
    *path, last = module.split(".")
    if in_attention(module):
        return train == "all" and last != "conv1d"
    return "experts" not in path and last in MLP_SPLITS


def _linear(stored: Any) -> nn.Linear:
    """An ordinary fp32 linear with the value of a ``StoredLinear``."""
    weight = dequantize(stored.weight, stored.scale)
    linear = nn.Linear(weight.shape[1], weight.shape[0], stored.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if stored.bias is not None:
        linear.bias = nn.Parameter(stored.bias.float(), requires_grad=False)
    return linear


def _trainable(parameter: Any) -> nn.Parameter:
    parameter.requires_grad_()
    return parameter


def _fix_zeros(weight: nn.Parameter, layouts: list[Layout]) -> None:
    """Mask the gradient of ``weight``, the ``layouts`` one below the other: zeros of 2:4 regions get none."""
    zeros = weight.detach() == 0
    for part, layout in zip(zeros.split([x.out_features for x in layouts]), layouts, strict=True):
        rows, columns = layout.sparse_shape
        part[rows:] = False
        part[:, columns:] = False
    weight.register_hook(lambda gradient: gradient.masked_fill(zeros, 0))
