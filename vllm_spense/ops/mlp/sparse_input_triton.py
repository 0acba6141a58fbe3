"""The back end for layers behind a sparse activation on GPUs: Triton, sm_80 and later.

Triton itself is imported by the first call, so that this module can be imported without it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.library import custom_op

from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.triton import why_no_triton
from vllm_spense.ops.mlp.many_tokens import dense_input, most_tokens
from vllm_spense.ops.mlp.sparse_input import SparseInputSpec, empty_output

DTYPES = (torch.bfloat16, torch.float16)


@custom_op("spense::triton_sparse_input_linear", mutates_args=(), device_types=("cpu", "cuda"))
def _triton_sparse_input(
    x: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    density: float | None,
) -> torch.Tensor:
    if x.shape[0] > most_tokens(density):
        return dense_input(x, weight_t, bias, threshold)
    from vllm_spense.ops.mlp.sparse_mlp_triton_kernel import multiply_inputs

    return multiply_inputs(x, weight_t, bias, threshold)


_triton_sparse_input.register_fake(empty_output)


def triton_sparse_input(
    x: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    density: float | None = None,
) -> torch.Tensor:
    """:func:`.sparse_input.sparse_input_definition` by the kernels of :mod:`.sparse_mlp_triton_kernel`, for
    more than :func:`.many_tokens.most_tokens` of this density by :func:`.many_tokens.dense_input`.

    On CPUs it runs only in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is first imported).
    """
    return _triton_sparse_input(x, weight_t, bias, threshold, density)


class SparseInputTritonBackend:
    """The weight transposed, in bf16 or fp16, of any size."""

    name = "triton"

    def why_not(self, spec: SparseInputSpec, device: torch.device) -> str | None:
        if spec.dtype not in DTYPES:
            return f"the kernels take bf16 and fp16, not {spec.dtype}"
        return why_no_triton(device)

    def prepare(self, spec: SparseInputSpec, weight: torch.Tensor) -> Tensors:
        return {"weight_packed": weight.t().contiguous()}

    def apply(
        self,
        spec: SparseInputSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return triton_sparse_input(x, tensors["weight_packed"], bias, spec.threshold, spec.density)
