"""Dense, Spense and 4-bit directories as transformers models, for measuring quality on any machine.

Spense and 4-bit layers compute on their decompressed matrix with the project's own operators, so the
numbers are those of the format's definition and need no vLLM.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vllm_spense import sources
from vllm_spense.evaluation.gates import own_activation, use
from vllm_spense.evaluation.thresholds import apply_thresholds
from vllm_spense.format import Checkpoint, CheckpointError
from vllm_spense.format.bitsandbytes import open_checkpoint
from vllm_spense.format.checkpoint import CONFIG_NAME
from vllm_spense.format.errors import REPRUNE, RESAVE
from vllm_spense.format.twell_checkpoint import TwellCheckpoint
from vllm_spense.format.validate import check_headers, check_values
from vllm_spense.models.fused import left_out, model_parameter
from vllm_spense.network import SpenseNames, auto_class, spense_names
from vllm_spense.ops import dense_linear
from vllm_spense.ops.activations import quantized
from vllm_spense.sources import building, check_source, check_tensors, load_config

Activations = Literal["checkpoint", "none"]


class StoredLinear(nn.Module):
    """A linear layer on stored values: ``weight [N, K]`` fp32 unscaled, ``scale [N]`` or None (bf16).

    ``activation_dtype``: what activations are rounded to per token, as the codec says; None: nothing.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        activation_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.activation_dtype = activation_dtype
        self.register_buffer("weight", weight.float())
        self.register_buffer("scale", None if scale is None else scale.float())
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]`` in x's dtype."""
        flat = x.reshape(-1, x.shape[-1])
        values, x_scale = quantized(flat, self.activation_dtype)
        y = dense_linear(values, x_scale, self.weight, self.scale, self.bias, x.dtype)
        return y.view(*x.shape[:-1], -1)


def load_model(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    activations: Activations = "checkpoint",
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A transformers model for evaluation; ``dtype`` is that of activations and plain weights.

    ``activations="none"`` leaves activations unquantised (weights only). No code from the directory is
    run. Thresholds of the checkpoint are applied to the inputs that they are for. Raises
    :class:`CheckpointError` (a ``ValueError``) for damaged or unsupported directories, also where a tensor of
    the model is missing. Warns of tensors that the model does not use.
    """
    check_source(directory, as_stored=True)
    checkpoint = open_checkpoint(directory)
    check_tensors(checkpoint)
    if checkpoint.quantization is None:
        model = _load_dense(checkpoint, dtype)
    else:
        model = _load_spense(checkpoint, dtype, activations)
    if isinstance(checkpoint, TwellCheckpoint):
        apply_thresholds(model, checkpoint.thresholds.inputs, checkpoint.directory)
    return model.to(device).eval()


def load_tokenizer(directory: str | Path) -> Any:
    """The directory's tokenizer, without running code from it."""
    check_source(directory, as_stored=True)
    return sources.load_tokenizer(Path(directory))


def _load_dense(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    config = load_config(checkpoint.directory, borrow=True)
    config.__dict__.pop("quantization_config", None)  # thresholds alone: the weights are plain
    activation = own_activation(checkpoint.config, checkpoint.directory / CONFIG_NAME)
    if activation is not None:
        config.hidden_act = "relu"  # which transformers can build with; the right one comes later
    with _quiet_report(), building(checkpoint.directory):
        model, found = auto_class(config).from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused here
            output_loading_info=True,
        )
    for name, stored, needed in sorted(found["mismatched_keys"]):
        raise CheckpointError(
            f"shape {list(stored)}, but the model of config.json needs {list(needed)}",
            file=checkpoint.directory,
            tensor=name,
            fix=RESAVE,
        )
    for name in sorted(found["missing_keys"]):  # transformers fills them with random numbers
        problem = "the model of config.json needs this tensor, and it is missing"
        raise CheckpointError(problem, file=checkpoint.directory, tensor=name, fix=RESAVE)
    if found["unexpected_keys"]:
        warnings.warn(left_out(found["unexpected_keys"], checkpoint.directory), stacklevel=3)
    if activation is not None:
        use(activation, model)
    return model


@contextmanager
def _quiet_report() -> Iterator[None]:
    """While open, transformers does not print its table of missing and unexpected tensors."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load_spense(checkpoint: Checkpoint, dtype: torch.dtype, activations: Activations) -> nn.Module:
    quantization = checkpoint.require_spense()
    check_headers(checkpoint)
    config = load_config(checkpoint.directory)
    del config.quantization_config
    model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    names = spense_names(model, checkpoint)
    _load_plain(checkpoint, model, names)
    as_stored = activations == "checkpoint"
    for name, parts in names.modules.items():
        owner, child, found = _shape(model, name)
        specs = [quantization.modules[part] for part in parts]
        expected = (sum(spec.out_features for spec in specs), specs[0].in_features)
        if found != expected:
            raise CheckpointError(
                f"the model's layer has shape {list(found)}, the config says {list(expected)}",
                file=checkpoint.directory,
                module=name,
                fix=REPRUNE,
            )
        setattr(owner, child, _stored_linear(checkpoint, parts, as_stored))
    model.tie_weights()
    return model


def _load_plain(checkpoint: Checkpoint, model: nn.Module, names: SpenseNames) -> None:
    """Everything but the Spense linears, from the tensors that belong to no Spense module."""
    unused = set(names.plain.values())

    def load(name: str) -> torch.Tensor:
        stored = names.plain[name]
        unused.discard(stored)
        return checkpoint.load(stored)

    state: dict[str, torch.Tensor] = {}
    lost = set()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name in model.state_dict():
        if name.rpartition(".")[0] in names.modules:
            continue
        value = model_parameter(name, names.plain, load)
        if value is not None:
            state[name] = value
        elif name not in tied:
            lost.add(name)
    if lost | unused:
        raise CheckpointError(
            "the tensor is missing or unknown to the model",
            file=checkpoint.directory,
            tensor=sorted(lost | unused)[0],
            fix=REPRUNE,
        )
    model.load_state_dict(state, strict=False)


def _shape(model: nn.Module, name: str) -> tuple[nn.Module | None, str, tuple[int, ...]]:
    """Owner, attribute and weight shape of a linear; the shape is () where the model has none."""
    parent, _, child = name.rpartition(".")
    try:
        owner: Any = model.get_submodule(parent)
        return owner, child, tuple(owner.get_submodule(child).weight.shape)
    except AttributeError:
        return None, child, ()


def _stored_linear(checkpoint: Checkpoint, parts: list[str], as_stored: bool) -> StoredLinear:
    """The rows of all ``parts`` as one layer: scales are per row, so fusing them changes no value.

    ``as_stored``: round activations as the codec of all parts says, if it is the same.
    """
    weights, scales, biases, dtypes = [], [], [], set()
    for name in parts:
        linear, tensors = checkpoint.linear(name), checkpoint.module_tensors(name)
        check_values(tensors, linear.codecs, module=name, file=checkpoint.directory)
        weight, scale = linear.values(tensors)
        weights.append(weight.float())
        scales.append(scale)
        biases += [tensors["bias"]] if "bias" in tensors else []
        dtypes.add(linear.codecs.activation_dtype)
    bias = torch.cat(biases) if biases else None
    dtype = dtypes.pop() if as_stored and len(dtypes) == 1 else None
    if all(scale is None for scale in scales):
        return StoredLinear(torch.cat(weights), None, bias, dtype)
    ones = [torch.ones(len(w)) if s is None else s for w, s in zip(weights, scales, strict=True)]
    return StoredLinear(torch.cat(weights), torch.cat(ones), bias, dtype)
