"""Find the parts of a transformers model that pruning touches.

An MLP is one or two *inner* linears that read the same input, something elementwise, and *down*: a GLU
with gate and up (Llama, Mistral, Qwen, Gemma, Phi-3, GLM-4 …) or a plain MLP (Phi, Starcoder2, Nemotron,
OPT …). Routed experts stay as they are. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm_spense.format import CheckpointError, Layout
from vllm_spense.models.families import MIXERS, MLP_FORMS, MLP_HOLDERS, family_of, stays_as_stored
from vllm_spense.models.split import checkpoint_name

_ACTIVATIONS = ("act_fn", "activation_fn", "act")
_SUPPORTED = (
    "supported are models whose decoder layers hold attention and one MLP of plain linears (gate_proj, "
    "up_proj and down_proj; up_proj and down_proj; fc1 and fc2; c_fc and c_proj), like Llama, Mistral, Qwen, "
    "Gemma, Phi, GLM-4, Granite, OLMo, SmolLM3, EXAONE 4, Cohere and OPT, and the shared experts and "
    "ordinary MLPs of Qwen2-MoE and Qwen3-MoE (docs/models.md lists them)"
)


class UnsupportedModelError(ValueError):
    """The model has no MLPs of the supported form."""


@dataclass(frozen=True)
class MlpShape:
    """Extents of an MLP: ``inner`` linears [intermediate, hidden], and down [outputs, intermediate]."""

    hidden: int
    intermediate: int
    outputs: int
    inner: int

    def layouts(self, dense: int) -> tuple[Layout, Layout]:
        """Layouts of an inner linear and of down, ``dense`` indices dense; ``ValueError`` where none fits."""
        sparse = self.intermediate - dense
        rows = Layout("output", self.intermediate, self.hidden, sparse)
        if not sparse:  # the one spelling of a dense layer
            return rows, Layout("output", self.outputs, self.intermediate, 0)
        return rows, Layout("input", self.outputs, self.intermediate, sparse)


@dataclass(frozen=True)
class Mlp:
    """One prunable MLP. ``inner``: full checkpoint name to linear [I, K], gate before up; ``down`` [K, I].

    ``activation`` is that of gate, or of a plain MLP's values; None if it was not found.
    The intermediate dimension I may be permuted: nothing but these linears holds parameters along it.
    """

    name: str
    inner: dict[str, nn.Linear]
    down_name: str
    down: nn.Linear
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def intermediate(self) -> int:
        return self.down.in_features

    @property
    def shape(self) -> MlpShape:
        outputs, intermediate = self.down.weight.shape
        return MlpShape(self.reader.in_features, intermediate, outputs, len(self.inner))

    @property
    def reader(self) -> nn.Linear:
        """The inner linear that is called first; all of them read its input."""
        return next(iter(self.inner.values()))


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: its module, its name in the checkpoint, and the linears to prune or to round.

    ``mlp`` is None where nothing is prunable (routed experts alone). ``dense`` maps full names to the
    linears outside of MLP and experts that FP8 checkpoints round, ``plain`` to those that they do not.
    ``attention_block`` is what mixes the tokens, linear attention too. ``experts``: the module of the routed
    experts, if any.
    """

    name: str
    module: nn.Module
    attention_block: nn.Module
    mlp: Mlp | None
    dense: dict[str, nn.Linear]
    plain: dict[str, nn.Linear]
    experts: nn.Module | None = None

    @property
    def outside(self) -> dict[str, nn.Linear]:
        """All linears outside of MLP and experts."""
        return {**self.dense, **self.plain}


def decoder(model: nn.Module) -> nn.Module:
    """The part of a causal language model that embeds tokens and runs the layers, without the head."""
    base = getattr(model, "base_model", model)
    base = getattr(base, "language_model", base)  # of a multimodal wrapper
    base = getattr(base, "decoder", base)  # OPT nests it once more
    if not isinstance(getattr(base, "layers", None), nn.ModuleList):
        raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder layers; {_SUPPORTED}")
    return base


def decoder_layers(model: nn.Module, stored: Mapping[str, str] | None = None) -> list[DecoderLayer]:
    """All decoder layers in order; raises :class:`UnsupportedModelError` naming the first misfit.

    ``stored``: the checkpoint's names of modules that it calls otherwise than the model.
    """
    base = decoder(model)
    layers = base.layers
    assert isinstance(layers, nn.ModuleList)
    names = {module: (stored or {}).get(name, name) for name, module in model.named_modules()}
    kind = getattr(getattr(base, "config", None), "model_type", "")
    found = [_layer(names[module], module, kind) for module in layers]
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder layers")
    if all(layer.mlp is None for layer in found):
        raise UnsupportedModelError(
            f"{type(model).__name__}: every layer is a mixture of experts without a shared expert, and "
            "routed experts are not pruned, so there is nothing to prune"
        )
    return found


def mlp_shapes(layers: Sequence[DecoderLayer]) -> list[MlpShape | None]:
    """The extents of each layer's prunable MLP; None where there is none."""
    return [None if layer.mlp is None else layer.mlp.shape for layer in layers]


def layer_name(module: str) -> str:
    """Name of the decoder layer that a module's checkpoint name lies in."""
    path = module.split(".")
    number = next(i for i, step in enumerate(path) if step.isdigit())
    return ".".join(path[: number + 1])


def check_weights(layer: DecoderLayer) -> None:
    """Raises :class:`CheckpointError` naming the first tensor of ``layer`` with NaN or infinity."""
    for child, tensor in layer.module.named_parameters():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                "the source model's weight holds NaN or infinity",
                tensor=checkpoint_name(f"{layer.name}.{child}"),
                fix="get an intact copy of the source model",
            )


def _layer(name: str, module: nn.Module, kind: str) -> DecoderLayer:
    attention = next((found for key in MIXERS if (found := getattr(module, key, None)) is not None), None)
    path = next((f"{name}.{key}" for key in MLP_HOLDERS if hasattr(module, key)), name)
    if attention is None or (path == name and not family_of(kind).bare_mlp):
        raise UnsupportedModelError(
            f"{name} has no {' or '.join(MLP_HOLDERS)} or no {' or '.join(MIXERS)}; {_SUPPORTED}"
        )
    holder = module.get_submodule(path.removeprefix(name).lstrip("."))
    experts = getattr(holder, "experts", None)
    mlp: Mlp | None
    if experts is None:
        mlp = _mlp(path, holder, alone=holder is not module)
    elif not family_of(kind).routed:
        raise UnsupportedModelError(f"{path} is a mixture of experts ({kind}); {_SUPPORTED}")
    else:
        shared = getattr(holder, "shared_expert", None)
        mlp = None if shared is None else _mlp(f"{path}.shared_expert", shared)
    inside = () if mlp is None else (*mlp.inner, mlp.down_name)
    outside = {
        full: linear
        for full, linear in _linears(name, module).items()
        if full not in inside and (holder is module or not full.startswith(f"{path}."))
    }
    plain = {full: linear for full, linear in outside.items() if stays_as_stored(full, kind)}
    dense = {full: linear for full, linear in outside.items() if full not in plain}
    beside = getattr(module, "experts", None)  # Gemma 4's
    return DecoderLayer(name, module, attention, mlp, dense, plain, beside if experts is None else experts)


def _mlp(name: str, block: nn.Module, alone: bool = True) -> Mlp:
    """The MLP that ``block`` is (``alone``) or has among its children."""
    linears = _linears(name, block)
    for inner, last in MLP_FORMS:
        names = [f"{name}.{short}" for short in (*inner, last)]
        if not all(full in linears for full in names):
            continue
        parameters = {p for full in names for p in linears[full].parameters()}
        others = [p for p in block.parameters() if p not in parameters]
        if alone and any(p.numel() > 1 for p in others):  # a norm would have to be permuted too
            break
        inner_linears = {full: linears[full] for full in names[:-1]}
        return Mlp(name, inner_linears, names[-1], linears[names[-1]], _activation(block))
    has = ", ".join(child for child, _ in block.named_children())
    raise UnsupportedModelError(
        f"{name} is no MLP of plain linears in a known form (it has: {has}); {_SUPPORTED}"
    )


def _activation(block: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What ``block`` makes of gate's outputs, Falcon-H1's multiplier in front of it."""
    found = next((getattr(block, key) for key in _ACTIVATIONS if hasattr(block, key)), None)
    factor = getattr(block, "gate_multiplier", 1.0)
    return found if found is None or factor == 1.0 else lambda gate: found(gate * factor)


def _linears(name: str, module: nn.Module) -> dict[str, nn.Linear]:
    """Full checkpoint names of all plain linears in ``module``."""
    return {
        checkpoint_name(f"{name}.{child}"): linear
        for child, linear in module.named_modules()
        if type(linear) is nn.Linear
    }
