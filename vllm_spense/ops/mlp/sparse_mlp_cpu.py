"""CPUs: rows of up and down for the neurons that a token uses, in compiled kernels on bf16 weights.

``spense::sparse_mlp_cpu`` (``kernels/``, x86-64) takes whichever costs less of two ways for a batch: products
for each token and neuron that is active, or tiles of all neurons. What is summed up in fp32 for a token does
not depend on the number of threads; between the two ways hidden values differ by a rounding to bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from vllm_spense.ops import extension
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear import cpu
from vllm_spense.ops.linear.cpu import ISAS
from vllm_spense.ops.mlp import sparse_input
from vllm_spense.ops.mlp.activation import KINDS
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpSpec, empty_output

LINE = 32
"""Values of a cache line."""
SETS = 1024
"""Values of half a way of the first-level cache."""


class SparseMlpCpuBackend:
    """The compiled kernels; x and the gate may have rows that lie apart."""

    name = "cpu"

    def why_not(self, spec: SparseMlpSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on CPUs, not on {device.type}"
        if spec.dtype != torch.bfloat16:
            return f"the kernels take bf16 weights, not {spec.dtype}"
        return why_not_here()

    def prepare(self, spec: SparseMlpSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        kept = {name: tensor.contiguous() for name, tensor in tensors.items() if name.endswith("bias")}
        return kept | {"up": rows_apart(tensors["up"]), "down_t": rows_apart(tensors["down"].t())}

    def apply(
        self, spec: SparseMlpSpec, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        return torch.ops.spense.sparse_mlp_cpu(
            *(with_rows(x), with_rows(gate), tensors["up"], tensors["down_t"]),
            *(tensors.get("up_bias"), tensors.get("bias")),
            *(KINDS.index(spec.activation.kind), spec.activation.threshold),
        )


def rows_apart(weight: torch.Tensor) -> torch.Tensor:
    """The same ``[rows, columns]`` in memory of its own, on huge pages if there are.

    Rows of a multiple of 2 KiB lie a cache line further apart: kernels read 16 side by side, which would
    fall into the same sets of the cache.
    """
    rows, columns = weight.shape
    memory = torch.empty(rows, columns + (LINE if columns % SETS == 0 else 0), dtype=weight.dtype)
    cpu.ask_for_huge_pages(memory)
    return memory[:, :columns].copy_(weight)


def with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its rows are contiguous, however far apart they lie; else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def why_not_here() -> str | None:
    """None when this CPU runs the kernels, else the reason in one line; the operators exist afterwards."""
    reason = extension.why_not_loaded_cpu()
    if reason is not None:
        return reason
    torch.library.register_fake("spense::sparse_mlp_cpu", empty_output)
    torch.library.register_fake("spense::sparse_input_linear_cpu", sparse_input.empty_output)
    return None if isas() else "the CPU kernels need AVX2 and FMA"


def isas() -> tuple[str, ...]:
    """Those of ``ISAS`` that this CPU has and that have kernels, the best last."""
    if extension.why_not_loaded_cpu() is not None:
        return ()
    here = torch.ops.spense.sparse_mlp_isas_cpu()
    return tuple(name for i, name in enumerate(ISAS) if here >> i & 1)
