"""What config.json says of a model whose activation leaves most of its MLPs' values at zero.

Gated ones, of the architectures in ``models/families.py``: SparseLM (arXiv 2603.23198), ProSparse
(arXiv 2402.13516), TurboSparse-Mistral and Bamboo (arXiv 2406.05955), and Llamas with ReLU or squared ReLU;
and those without a gate (OPT, Nemotron).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from vllm_spense.format.errors import CheckpointError
from vllm_spense.models.families import family_of
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.twell import MAX_HIDDEN

SPARSELM, PROSPARSE, BAMBOO = "llama_sparse_relu", "sparsellama", "bamboo"
"""Values of ``model_type`` that transformers does not know."""
PLAIN_LLAMA = ("llama", "mistral")
"""Values of ``model_type`` of ordinary models that may name one of our architectures."""

PROSPARSE_THRESHOLD = 0.01
"""FATReLU's, where the config has no ``hidden_act_param``: what the paper's models were trained to."""

RETRAIN = "train it with `spense recover --activation relu`, or get thresholds by `spense sparsify`"
_BY_NAME = ("relu", "relu2", "fatrelu", "drelu")
_PLAIN = ("relu", "relu2")
_NAME_FIELDS = ("activation_function", "hidden_act", "hidden_activation")
"""What families call the field with their activation's name."""


@dataclass(frozen=True)
class ActivationSparse:
    """A model's gated MLPs: their activation, ``neurons`` (intermediate values) of each, and ``density``, the
    measured share of active ones per layer; empty where the checkpoint does not say it."""

    activation: Activation
    neurons: int
    density: tuple[float, ...] = ()


def activation_sparse(config: Mapping[str, Any], file: object = "config.json") -> ActivationSparse:
    """The MLPs of a model of one of our architectures; one :class:`CheckpointError` says why it has none."""
    model_type = config.get("model_type")
    if model_type == SPARSELM:
        activation = _sparselm(config, file)
    elif model_type == BAMBOO:
        if config.get("hidden_act") not in ("relu", "drelu"):
            _refuse(file, "hidden_act", config.get("hidden_act"), "'relu', of gate and of up", RETRAIN)
        activation = Activation("drelu")
    elif model_type in (PROSPARSE, *PLAIN_LLAMA):
        activation = _by_name(config, file)
    else:
        known = ", ".join((SPARSELM, PROSPARSE, BAMBOO, *PLAIN_LLAMA))
        _refuse(file, "model_type", model_type, f"one of {known}", "serve it under its own architecture")
    neurons = config.get("intermediate_size")
    if type(neurons) is not int or not 0 < neurons <= MAX_HIDDEN:
        limit = f"a whole number from 1 to {MAX_HIDDEN}, which is what an index can name"
        _refuse(file, "intermediate_size", neurons, limit, "get an intact copy of the model")
    return ActivationSparse(activation, neurons, _density(config, file))


def plain_activation(config: Mapping[str, Any], file: object = "config.json") -> Activation:
    """The activation of MLPs without a gate; one :class:`CheckpointError` if it leaves no zeros."""
    model_type = config.get("model_type")
    name = next((config[field] for field in _NAME_FIELDS if config.get(field)), None)
    if not family_of(model_type).gated and name in _PLAIN:
        return Activation(name)
    if model_type in PLAIN_LLAMA and name in _BY_NAME:
        fix = 'serve it with --hf-overrides \'{"architectures": ["SparseLlamaForCausalLM"]}\' alone'
        problem = f"the MLPs of {model_type} have a gate"
    else:
        fix = RETRAIN
        problem = f"activation {name!r} of {model_type} leaves no zeros that its down layers could skip"
    raise CheckpointError(problem, file=file, fix=fix)


def renamed(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors by transformers' names, ``[N, K]``; what no model needs is left out.

    SparseLM's training code has other names, and gate and down transposed; trackers of its training, and the
    predictors that TurboSparse ships for approximate inference, are dropped.
    """
    for name, tensor in weights:
        if any(step in _DROPPED for step in name.split(".")):
            continue
        parent, _, last = name.rpartition(".")
        if last in _TRAINING_NAMES:
            linear, transposed = _TRAINING_NAMES[last]
            yield f"{parent}.{linear}.weight", tensor.t() if transposed else tensor
        else:
            yield name, tensor


_DROPPED = frozenset({"tracker", "metrics_accumulator", "predictor", "rotary_emb"})
_TRAINING_NAMES = {
    "gate_weight": ("gate_proj", True),
    "up_weight": ("up_proj", False),
    "down_weight": ("down_proj", True),
}


def _sparselm(config: Mapping[str, Any], file: object) -> Activation:
    """``hidden_act`` says silu and is not what the model was trained with: its module forces ReLU."""
    for field, needed in (("sparsity_gated_mlp", True), ("sparsity_baseline_run", False)):
        found = config.get(field, needed)
        if found is not needed:
            _refuse(file, field, found, f"{needed}", "serve another of the published models")
    size = config.get("sparsity_new_intermediate_size")
    if size is not None and size != config.get("intermediate_size"):
        expected = f"intermediate_size, {config.get('intermediate_size')!r}"
        _refuse(file, "sparsity_new_intermediate_size", size, expected, "get an intact copy of the model")
    return Activation("relu")


def _by_name(config: Mapping[str, Any], file: object) -> Activation:
    name = config.get("hidden_act")
    if name not in _BY_NAME:
        _refuse(file, "hidden_act", name, f"one of {', '.join(_BY_NAME)}", RETRAIN)
    if name != "fatrelu":
        return Activation(name)
    threshold = config.get("hidden_act_param")
    threshold = PROSPARSE_THRESHOLD if threshold is None else threshold
    if not _is_number(threshold) or not math.isfinite(threshold) or threshold < 0:
        fix = "get an intact copy of the model"
        _refuse(file, "hidden_act_param", threshold, "FATReLU's threshold, a number from 0 on", fix)
    return Activation(name, float(threshold))


def _density(config: Mapping[str, Any], file: object) -> tuple[float, ...]:
    density = config.get("sparsity_density")
    if density is None:
        return ()
    layers = config.get("num_hidden_layers")
    good = isinstance(density, list) and all(_is_number(d) and 0 <= d <= 1 for d in density)
    if not good or len(density) != layers:
        expected = f"a list of {layers} shares from 0 to 1, one per layer"
        _refuse(file, "sparsity_density", density, expected, "remove the field, or measure it again")
    return tuple(float(d) for d in density)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _refuse(file: object, field: str, found: object, expected: str, fix: str) -> NoReturn:
    raise CheckpointError(f"{field} is {found!r}, expected {expected}", file=file, fix=fix)
