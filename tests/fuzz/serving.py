"""What serving does with a checkpoint up to the first token, in this process and without an engine.

``SpenseConfig`` checks the directory; then real vLLM linear layers are built with it, every tensor of every
weight file goes through their loaders as in vLLM's Llama, and the values are checked and prepared.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm import distributed
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.layers import linear

from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.serving import checks
from vllm_spense.serving.config import SpenseConfig
from vllm_spense.serving.layers.linear import SpenseLinearMethod

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_SHARDS = {"gate_proj": 0, "up_proj": 1, "q_proj": "q", "k_proj": "k", "v_proj": "v"}
_FUSED = {part: fused for fused, parts in PACKED.items() for part in parts}
_LARGEST = 1 << 12


class LeftToEngineError(Exception):
    """config.json describes a model that is not this harness's: vLLM's own code would judge it."""


@contextmanager
def vllm_process(store: Path) -> Iterator[None]:
    """This process as the only rank of a tensor-parallel group, which vLLM's layers ask for."""
    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        distributed.initialize_model_parallel(1)
        yield
    cleanup_dist_env_and_memory()


@dataclass
class Loaded:
    """Spense layers by their name in vLLM, and the tensors of none (vLLM copies those as they are)."""

    layers: dict[str, Layer]
    plain: dict[str, torch.Tensor]


@dataclass
class Layer:
    """One fused layer ready to run. ``weight``: what its outputs say about ``[N, K]``, see :func:`probe`."""

    modules: list[str]
    weight: torch.Tensor
    bias: torch.Tensor | None


def serve(directory: Path, config: dict[str, Any]) -> Loaded:
    """Load a Llama from a directory; raises whatever the product or vLLM's layers raise."""
    quantization = SpenseConfig.from_config(config["quantization_config"])
    checks._verified.clear()
    quantization.maybe_update_config(str(directory))
    quantization = pickle.loads(pickle.dumps(quantization))  # as vLLM sends it to its workers
    quantization.packed_modules_mapping = PACKED
    layers = dict(_layers(config, quantization))
    plain = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (no dictionary)
                tensor = stream.get_tensor(name)
                if not _load(layers, name, tensor):
                    plain[name] = tensor
    done = {}
    for name, layer in layers.items():
        if isinstance(layer.quant_method, SpenseLinearMethod):
            layer.quant_method.process_weights_after_loading(layer)
            modules = list(layer.quant_method.specs)
            done[name] = Layer(modules, probe(layer), None if layer.bias is None else layer.bias.data)
    return Loaded(done, plain)


def _layers(config: dict[str, Any], quantization: SpenseConfig) -> Iterator[tuple[str, Any]]:
    def number(key: str, largest: int = _LARGEST) -> int:
        value = config.get(key)
        if type(value) is not int or not 0 < value <= largest:
            raise LeftToEngineError(key)
        return value

    hidden, inter = number("hidden_size"), number("intermediate_size")
    heads, shared, size = (number(k) for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if heads % shared or heads * size > _LARGEST:
        raise LeftToEngineError("heads")
    common: dict[str, Any] = {"params_dtype": torch.bfloat16, "quant_config": quantization}
    for i in range(number("num_hidden_layers", 8)):
        options = common | {"bias": bool(config.get("mlp_bias"))}
        name = f"model.layers.{i}.mlp.gate_up_proj"
        yield name, linear.MergedColumnParallelLinear(hidden, [inter] * 2, prefix=name, **options)
        name = f"model.layers.{i}.mlp.down_proj"
        yield name, linear.RowParallelLinear(inter, hidden, prefix=name, **options)
        options = common | {"bias": bool(config.get("attention_bias"))}
        name = f"model.layers.{i}.self_attn.qkv_proj"
        yield name, linear.QKVParallelLinear(hidden, size, heads, shared, prefix=name, **options)
        name = f"model.layers.{i}.self_attn.o_proj"
        yield name, linear.RowParallelLinear(heads * size, hidden, prefix=name, **options)


def _load(layers: dict[str, Any], name: str, tensor: torch.Tensor) -> bool:
    """What vLLM's Llama does with a tensor of a linear layer; False for all others."""
    module, _, short = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    layer = layers.get(f"{parent}.{_FUSED[last]}" if last in _FUSED else module)
    parameter = None if layer is None else dict(layer.named_parameters()).get(short)
    if parameter is not None and last in _FUSED:
        parameter.weight_loader(parameter, tensor, _SHARDS[last])
    elif parameter is not None:
        parameter.weight_loader(parameter, tensor)
    return parameter is not None


def probe(layer: Any) -> torch.Tensor:
    """``[K, N]``: the layer's outputs, without bias, for each unit vector, so that sums hide no weight."""
    fp8 = layer.quant_method.codecs == UNIFORM_FP8
    x = torch.eye(layer.input_size, dtype=torch.float32 if fp8 else torch.bfloat16)
    return layer.quant_method.apply(layer, x, None).float()
