"""Tiny random models in the layouts of published activation-sparse ones, and what transformers says of them.

A channel of the hidden state is constant, and gates have a negative weight on it, so that few of the neurons
are active, as in the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import VOCAB
from tests.tiny_text import add_tokenizer
from tests.vllm_runs import Run, token_prompts
from vllm_spense.ops.mlp.activation import Activation

HIDDEN, INTER, LAYERS = 128, 208, 2
CONSTANT, DENSITIES = 4.0, (0.04, 0.2)
"""The constant channel's value in the embeddings, and the share of gates above zero, per layer."""
HOSTILE = "raise RuntimeError('code of a checkpoint was run')\n"


@dataclass(frozen=True)
class Layout:
    """A published model: its activation, and what its config.json says beside a Llama's; None: not there."""

    activation: Activation
    config: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    extra: tuple[str, ...] = ()


SPARSELM = {
    "architectures": ["SparseLlamaForCausalLM"],
    "model_type": "llama_sparse_relu",
    "hidden_act": "silu",
    "sparsity_new_intermediate_size": INTER,
    "sparsity_gated_mlp": True,
    "sparsity_l1_coeff": 2e-5,
    "sparsity_mlp_execution_logic": "training",
    "sparsity_baseline_run": False,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "rope_parameters": None,
}
ROPE = {"rope_type": "default", "rope_theta": 100000.0}
BIASED = {"attention_bias": True, "mlp_bias": True}
LAYOUTS = {
    "sparselm": Layout(
        Activation("relu"),
        SPARSELM | {"sparsity_density": [0.004, 0.02]},
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_parameters": ROPE},
        ("tracker.steps", "metrics_accumulator.l0"),
    ),
    "prosparse": Layout(
        Activation("fatrelu", 0.25),
        {
            "architectures": ["SparseLlamaForCausalLM"],
            "model_type": "sparsellama",
            "hidden_act": "fatrelu",
            "hidden_act_param": 0.25,
            "auto_map": {
                "AutoConfig": "configuration_sparsellama.SparseLlamaConfig",
                "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
            },
        },
        {"num_key_value_heads": 4},
    ),
    "bamboo": Layout(
        Activation("drelu"),
        {
            "architectures": ["BambooForCausalLM"],
            "model_type": "bamboo",
            "hidden_act": "relu",
            "sliding_window": None,
            "attention_bias": None,
            "mlp_bias": None,
        },
        extra=("model.layers.0.mlp.predictor.fc1.weight",),
    ),
    "relu": Layout(
        Activation("relu"),
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "relu"},
    ),
    "relu2": Layout(
        Activation("relu2"),
        {"architectures": ["SparseLlamaForCausalLM"], "model_type": "llama", "hidden_act": "relu2"},
        BIASED,
    ),
}
OVERRIDES = {"architectures": ["SparseLlamaForCausalLM"]}
"""How an ordinary Llama with ReLU is asked to be served by the plugin."""


def build(kind: str, seed: int = 0) -> Any:
    """The model in transformers, fp32, its weights rounded to bf16; its activation is :func:`activated`'s."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {"tie_word_embeddings": False, "num_key_value_heads": 2} | LAYOUTS[kind].options
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        head_dim=32,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 2.5 * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
        model.model.embed_tokens.weight[:, 0] = CONSTANT
        for layer in model.model.layers:
            attention = layer.self_attn
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                linear.weight[:, 0] = 0
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[:, 0] = 0
            for linear in (layer.mlp.down_proj, layer.self_attn.o_proj):
                linear.weight[0] = 0
                if linear.bias is not None:
                    linear.bias[0] = 0
        activated(model.eval(), LAYOUTS[kind].activation)
        for layer, share in zip(model.model.layers, DENSITIES, strict=True):
            lower_gates(model, layer.mlp, share)
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay in fp32
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


def lower_gates(model: Any, mlp: Any, share: float) -> None:
    """Give gate a weight on the constant channel, so that it is above zero for ``share`` of the neurons."""
    seen: list[torch.Tensor] = []
    handle = mlp.gate_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(input_ids=flat_prompts())
    handle.remove()
    ratio = mlp.gate_proj(seen[0]) / seen[0][..., :1]
    mlp.gate_proj.weight[:, 0] = -float(ratio.quantile(1 - share))


def activated(model: Any, activation: Activation | None) -> Any:
    """``model`` with ``activation`` in its MLPs; None: SiLU, as their config may say."""

    def forward_of(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
            hidden = activation.hidden(gate, up) if activation else torch.nn.functional.silu(gate) * up
            mlp.density = float((hidden != 0).float().mean())
            return mlp.down_proj(hidden)

        return forward

    for layer in model.model.layers:
        layer.mlp.forward = forward_of(layer.mlp)
    return model


def write(kind: str, out: Path, seed: int = 0, **changes: Any) -> Path:
    """The model of :func:`build` as it is published; ``changes`` of config.json, None removes a key."""
    layout, model = LAYOUTS[kind], build(kind, seed)
    model.to(torch.bfloat16).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    edited = {k: v for k, v in (config | layout.config | changes).items() if v is not None}
    (out / "config.json").write_text(json.dumps(edited))
    state = load_file(out / "model.safetensors")
    state |= {name: torch.ones(3) for name in layout.extra}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    for code in set(layout.config.get("auto_map", {}).values()):
        (out / f"{code.partition('.')[0]}.py").write_text(HOSTILE)
    return add_tokenizer(out)


def with_training_names(source: Path, out: Path) -> Path:
    """A SparseLM as its training code names it: gate and down transposed."""
    out.mkdir()
    for file in source.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    state = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        short = name.replace("gate_proj.weight", "gate_weight").replace("down_proj.weight", "down_weight")
        transposed = tensor.t().contiguous() if short != name else tensor
        state[short.replace("up_proj.weight", "up_weight")] = transposed
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def flat_prompts() -> torch.Tensor:
    """The tests' prompts in one row."""
    return torch.tensor([[token for prompt in token_prompts() for token in prompt]])


def density(model: Any) -> list[float]:
    """Share of active neurons of each layer, on the tests' prompts."""
    with torch.no_grad():
        model(input_ids=flat_prompts())
    return [layer.mlp.density for layer in model.model.layers]


@torch.no_grad()
def steps(model: Any, run: Run) -> Iterator[tuple[int, int, float, float]]:
    """For each token that vLLM gave: it, the one that ``model`` prefers there, and both logprobs of it."""
    for prompt, output in zip(token_prompts(), run.outputs, strict=True):
        tokens = output["tokens"]
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1)
        for row, token, logprob in zip(logprobs, tokens, output["logprobs"], strict=True):
            yield token, int(row.argmax()), logprob, float(row[token])


def distance(model: Any, run: Run) -> float:
    """Mean difference of the logprobs of vLLM's tokens."""
    differences = [abs(ours - theirs) for _, _, ours, theirs in steps(model, run)]
    return sum(differences) / len(differences)


def same_tokens(model: Any, run: Run) -> bool:
    """Whether ``model`` prefers every token that vLLM gave."""
    return all(token == preferred for token, preferred, _, _ in steps(model, run))


@contextmanager
def skipping(model: Any, thresholds: dict[str, float]) -> Iterator[Any]:
    """``model`` whose named layers take inputs with ``|x| <= threshold`` as zero."""

    def hook(threshold: float) -> Callable[..., Any]:
        return lambda module, inputs: (torch.where(inputs[0].abs() <= threshold, 0.0, inputs[0]),)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(threshold))
        for name, threshold in thresholds.items()
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
