"""Find the parts of a transformers model that pruning touches.

Works for decoders built like Llama: ``layers[i].mlp`` computes ``down(act(gate(x)) · up(x))`` from three
``nn.Linear`` (Llama, Mistral, Qwen2, Qwen3, SmolLM, Gemma …). Everything else is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
_SUPPORTED = "supported are Llama-style models (Llama, Mistral, Qwen2, Qwen3, SmolLM2, Gemma)"


class UnsupportedModelError(ValueError):
    """The model has no MLPs of the supported form."""


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: its module, its name in the checkpoint, its two blocks and linear layers.

    ``attention`` maps full names to the linears outside of the MLP.
    """

    name: str
    module: nn.Module
    attention_block: nn.Module
    mlp: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    attention: dict[str, nn.Linear]

    def mlp_names(self) -> tuple[str, str, str]:
        """Full checkpoint names of gate, up and down."""
        gate, up, down = (f"{self.name}.mlp.{short}" for short in MLP_NAMES)
        return gate, up, down


def decoder(model: nn.Module) -> nn.Module:
    """The part of a causal language model that embeds tokens and runs the layers, without the head."""
    base = getattr(model, "base_model", model)
    if not isinstance(getattr(base, "layers", None), nn.ModuleList):
        raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder layers; {_SUPPORTED}")
    return base


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """All decoder layers in order; raises :class:`UnsupportedModelError` naming the first misfit."""
    layers = decoder(model).layers
    assert isinstance(layers, nn.ModuleList)
    names = {module: name for name, module in model.named_modules()}
    found = [_layer(names[module], module) for module in layers]
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder layers")
    return found


def _layer(name: str, module: nn.Module) -> DecoderLayer:
    mlp, attention_block = getattr(module, "mlp", None), getattr(module, "self_attn", None)
    if mlp is None or attention_block is None:
        raise UnsupportedModelError(f"{name} has no mlp or no self_attn; {_SUPPORTED}")
    if hasattr(mlp, "experts"):
        raise UnsupportedModelError(f"{name}.mlp is a mixture of experts; {_SUPPORTED}")
    linears = []
    for short in MLP_NAMES:
        linear = getattr(mlp, short, None)
        if type(linear) is not nn.Linear:
            has = ", ".join(child for child, _ in mlp.named_children())
            raise UnsupportedModelError(
                f"{name}.mlp has no plain linear {short} (it has: {has}); {_SUPPORTED}"
            )
        linears.append(linear)
    attention = {
        f"{name}.{child}": linear
        for child, linear in module.named_modules()
        if type(linear) is nn.Linear and not child.startswith("mlp.")
    }
    gate, up, down = linears
    return DecoderLayer(name, module, attention_block, mlp, gate, up, down, attention)
