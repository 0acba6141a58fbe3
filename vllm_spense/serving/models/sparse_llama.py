"""``SparseLlamaForCausalLM``: vLLM's Llama with MLPs that skip the neurons that a token's gate closes.

Of vLLM's decoder layer the forward is kept and the construction is not: it makes an MLP with gate and up in
one layer, and refuses every activation but SiLU. vLLM's loader merges the two by their names, so loading is
ours as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from vllm_spense.format.errors import CheckpointError
from vllm_spense.models.families import FUSED
from vllm_spense.ops.mlp.published import activation_sparse, renamed
from vllm_spense.serving import compat
from vllm_spense.serving.layers.sparse_mlp import PARAMETERS, Neurons, SparseMlp
from vllm_spense.serving.summary import SparsitySummary

_SHARDS = {part: (part[0], "qkv_proj") for part in FUSED["qkv_proj"]}


class SparseDecoderLayer(compat.LlamaDecoderLayer):
    """A decoder layer with a :class:`SparseMlp`."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        torch.nn.Module.__init__(self)
        llama = config or vllm_config.model_config.hf_config
        sparse = activation_sparse(llama.to_dict())
        bias = bool(getattr(llama, "attention_bias", False))
        self.hidden_size = llama.hidden_size
        self.self_attn = compat.LlamaAttention(
            config=llama,
            hidden_size=llama.hidden_size,
            num_heads=llama.num_attention_heads,
            num_kv_heads=llama.num_key_value_heads,
            max_position_embeddings=llama.max_position_embeddings,
            quant_config=vllm_config.quant_config,
            bias=bias,
            bias_o_proj=bias,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = SparseMlp(
            llama.hidden_size,
            sparse,
            density=sparse.density[int(prefix.rpartition(".")[2])] if sparse.density else None,
            bias=bool(getattr(llama, "mlp_bias", False)),
            dtype=vllm_config.model_config.dtype,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = compat.RMSNorm(llama.hidden_size, eps=llama.rms_norm_eps)
        self.post_attention_layernorm = compat.RMSNorm(llama.hidden_size, eps=llama.rms_norm_eps)


class SparseLlamaForCausalLM(compat.LlamaForCausalLM):
    """What vLLM builds for the architectures of :data:`~vllm_spense.models.families.ACTIVATION_SPARSE`."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"qkv_proj": list(FUSED["qkv_proj"])}

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        sparse = activation_sparse(vllm_config.model_config.hf_config.to_dict())  # before anything is built
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SparseDecoderLayer)
        summary = SparsitySummary(f"MLPs with {sparse.activation.kind}", sparse.density)
        for module in self.modules():
            if isinstance(module, Neurons):
                module.report_to(summary)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Give each tensor of a checkpoint to its parameter; the names of those that got something."""
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in renamed(weights):
            target, shard = destination(name)
            if compat.is_pp_missing_parameter(target, self):
                continue
            if target == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if target not in parameters:
                raise CheckpointError(
                    "the model in config.json has no place for this tensor",
                    tensor=name,
                    fix="get an intact copy of the model; only attention and gate_proj may be quantised",
                )
            parameter = parameters[target]
            loader = getattr(parameter, "weight_loader", compat.default_weight_loader)
            loader(parameter, tensor, *shard)
            loaded.add(target)
        return loaded


def destination(name: str) -> tuple[str, tuple[str, ...]]:
    """The parameter that a tensor belongs to, and which part of it, as vLLM's loaders of q, k and v ask."""
    parent, _, last = name.rpartition(".")
    block, _, linear = parent.rpartition(".")
    if linear in _SHARDS:
        shard, fused = _SHARDS[linear]
        return f"{block}.{fused}.{last}", (shard,)
    parameter = PARAMETERS.get(f"{linear}.{last}")
    return (f"{block}.neurons.{parameter}" if parameter else name), ()
