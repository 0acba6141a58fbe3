"""An MLP of which up and down are read for the neurons alone that a token's gate lets through.

Gate is a linear layer like any other: whatever quantises those may quantise it. Up and down are ours, up
as ``[I, K]`` and down transposed, so that a neuron is one row of each (``ops/mlp/sparse_mlp.py``).
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_spense.format.errors import CheckpointError
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.mlp.published import ActivationSparse
from vllm_spense.ops.mlp.select import select_sparse_mlp
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpBackend, SparseMlpSpec
from vllm_spense.serving import compat
from vllm_spense.serving.layers.prepared import PreparedMethod, wanted_backend
from vllm_spense.serving.summary import SparsitySummary

PARAMETERS = {
    "up_proj.weight": "up",
    "down_proj.weight": "down",
    "up_proj.bias": "up_bias",
    "down_proj.bias": "down_bias",
}
"""Tensors of a checkpoint, and the parameters of :class:`Neurons` that they fill.

None is called ``bias``: a reload takes that for a linear layer's, and leaves it where it is.
"""


class SparseMlp(torch.nn.Module):
    """``down(act(gate x) · up x)``, ``x [..., K]``; ``mlp`` says what the checkpoint's config does, and
    ``density`` the share of neurons that is active, where it is known."""

    def __init__(
        self,
        hidden_size: int,
        mlp: ActivationSparse,
        *,
        density: float | None,
        bias: bool,
        dtype: torch.dtype,
        quant_config: Any,
        prefix: str,
    ) -> None:
        super().__init__()
        _refuse_quantised(quant_config, prefix)
        self.gate_proj = compat.ColumnParallelLinear(
            hidden_size, mlp.neurons, bias=bias, quant_config=quant_config, prefix=f"{prefix}.gate_proj"
        )
        self.tp_size = self.gate_proj.tp_size
        neurons = mlp.neurons // self.tp_size
        spec = SparseMlpSpec(hidden_size, neurons, hidden_size, mlp.activation, dtype, density)
        self.neurons = Neurons(spec, bias, self.gate_proj.tp_rank, self.tp_size, prefix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, _ = self.gate_proj(x)
        y = self.neurons(x, gate)
        return compat.tensor_model_parallel_all_reduce(y) if self.tp_size > 1 else y


class Neurons(torch.nn.Module):
    """Up and down of the MLP's neurons on this rank."""

    def __init__(self, spec: SparseMlpSpec, bias: bool, rank: int, size: int, prefix: str) -> None:
        super().__init__()
        self.quant_method = SparseMlpMethod(spec, bias, rank, size, prefix)
        self.quant_method.create_weights(self)

    def report_to(self, summary: SparsitySummary) -> None:
        """Say there when the neurons are loaded."""
        self.quant_method.summary = summary
        summary.expect(self)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, gate)


class SparseMlpMethod(PreparedMethod):
    """Creates, loads and runs :class:`Neurons`."""

    backend: SparseMlpBackend

    def __init__(self, spec: SparseMlpSpec, bias: bool, rank: int, size: int, prefix: str) -> None:
        super().__init__(prefix, None)
        self.spec = spec
        self.bias = bias
        self.rank, self.size = rank, size

    def create_weights(self, layer: Any, *arguments: Any, **extra_weight_attrs: Any) -> None:
        """Both matrices as they lie in files, this rank's neurons of each."""
        spec, dtype = self.spec, self.spec.dtype
        neurons = spec.neurons * self.size
        rows, columns = (0, self.rank, self.size), (1, self.rank, self.size)
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, int, int] | None]] = {
            "up_proj.weight": ((neurons, spec.in_features), rows),
            "down_proj.weight": ((spec.out_features, neurons), columns),
        }
        if self.bias:
            shapes |= {"up_proj.bias": ((neurons,), rows), "down_proj.bias": ((spec.out_features,), None)}
        for tensor, (shape, cut) in shapes.items():
            self.parameter(layer, PARAMETERS[tensor], tensor, shape, dtype, cut)

    def prepare(self, tensors: Tensors, device: torch.device) -> Tensors:
        """As the back end has it. The first rank alone adds down's bias: ranks' results are summed."""
        bias = tensors.pop("down_bias", None)
        if bias is not None and self.rank == 0:
            tensors["bias"] = bias
        self.backend = select_sparse_mlp(self.spec, device, wanted_backend())
        prepared = self.backend.prepare(self.spec, tensors)
        return {"down_bias" if name == "bias" else name: tensor for name, tensor in prepared.items()}

    def tensors(self, layer: Any) -> Tensors:
        """What the back end runs on, by its names."""
        return {"bias" if name == "down_bias" else name: getattr(layer, name) for name in self.prepared}

    @property
    def backend_name(self) -> str:
        return self.backend.name

    def apply(self, layer: Any, *arguments: torch.Tensor, **_: Any) -> torch.Tensor:
        """``x [..., K]`` and the gate's output ``[..., I]`` to ``y [..., N]`` in x's dtype."""
        x, gate = arguments
        flat, flat_gate = x.reshape(-1, x.shape[-1]), gate.reshape(-1, gate.shape[-1])
        y = self.backend.apply(self.spec, self.tensors(layer), flat, flat_gate)
        return y.view(*x.shape[:-1], y.shape[-1])


def _refuse_quantised(quant_config: Any, prefix: str) -> None:
    """Up and down are read in their dtype: a checkpoint in which they are packed has nothing for us."""
    modules = getattr(quant_config, "modules", {})
    for linear in ("up_proj", "down_proj"):
        if f"{prefix}.{linear}" in modules:
            raise CheckpointError(
                "activation-sparse MLPs read up and down in bf16, and it is stored packed",
                module=f"{prefix}.{linear}",
                fix="quantise or prune gate_proj and attention only",
            )
