"""The back end for activation-sparse MLPs on GPUs that the compiled kernels do not serve: Triton, sm_80 and
later.

Triton itself is imported by the first call, so that this module can be imported without it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.library import custom_op

from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.triton import why_no_triton
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.many_tokens import dense_mlp, most_tokens, shape_for
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpSpec, empty_output, transposed
from vllm_spense.ops.mlp.twell import MAX_HIDDEN

DTYPES = (torch.bfloat16, torch.float16)


@custom_op("spense::triton_sparse_mlp", mutates_args=(), device_types=("cpu", "cuda"))
def _triton_sparse_mlp(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    up_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    threshold: float,
    density: float | None,
) -> torch.Tensor:
    act = Activation(activation, threshold)
    if x.shape[0] > most_tokens(density):
        return dense_mlp(x, gate, up, down_t, up_bias, bias, act)
    from vllm_spense.ops.mlp.sparse_mlp_triton_kernel import multiply

    return multiply(x, gate, up, down_t, up_bias, bias, act, shape_for(gate.shape[1], density))


_triton_sparse_mlp.register_fake(empty_output)


def triton_sparse_mlp(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    up_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: Activation,
    density: float | None = None,
) -> torch.Tensor:
    """:func:`.sparse_mlp.sparse_mlp_definition` by the kernels of :mod:`.sparse_mlp_triton_kernel`, for more
    than :func:`.many_tokens.most_tokens` of this density by :func:`.many_tokens.dense_mlp`.

    On CPUs it runs only in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is first imported).
    """
    how = activation.kind, activation.threshold, density
    return _triton_sparse_mlp(x, gate, up, down_t, up_bias, bias, *how)


def why_not_packed(spec: SparseMlpSpec) -> str | None:
    """None when a gate of this MLP fits TwELL's words, else the reason in one line."""
    if spec.neurons > MAX_HIDDEN:
        return f"{spec.neurons} neurons are beyond the {MAX_HIDDEN} that a word can name"
    return None


class SparseMlpTritonBackend:
    """up and down transposed, in bf16 or fp16, of any size."""

    name = "triton"

    def why_not(self, spec: SparseMlpSpec, device: torch.device) -> str | None:
        if spec.dtype not in DTYPES:
            return f"the kernels take bf16 and fp16, not {spec.dtype}"
        return why_not_packed(spec) or why_no_triton(device)

    def prepare(self, spec: SparseMlpSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return transposed(tensors)

    def apply(
        self, spec: SparseMlpSpec, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        biases = tensors.get("up_bias"), tensors.get("bias")
        how = spec.activation, spec.density
        return triton_sparse_mlp(x, gate, tensors["up"], tensors["down_t"], *biases, *how)
