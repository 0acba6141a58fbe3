"""Which back end runs an activation-sparse MLP, or a layer behind one: the first one that can, best first."""

from __future__ import annotations

import torch

from vllm_spense.ops.backend import select
from vllm_spense.ops.mlp.sparse_input import SparseInputBackend, SparseInputReference, SparseInputSpec
from vllm_spense.ops.mlp.sparse_input_cpu import SparseInputCpuBackend
from vllm_spense.ops.mlp.sparse_input_triton import SparseInputTritonBackend
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpBackend, SparseMlpReference, SparseMlpSpec
from vllm_spense.ops.mlp.sparse_mlp_cpu import SparseMlpCpuBackend
from vllm_spense.ops.mlp.sparse_mlp_cuda import SparseInputCudaBackend, SparseMlpCudaBackend
from vllm_spense.ops.mlp.sparse_mlp_triton import SparseMlpTritonBackend

SPARSE_MLP: tuple[SparseMlpBackend, ...] = (
    SparseMlpCudaBackend(),
    SparseMlpTritonBackend(),
    SparseMlpCpuBackend(),
    SparseMlpReference(),
)
"""Best first."""
SPARSE_INPUT: tuple[SparseInputBackend, ...] = (
    SparseInputCudaBackend(),
    SparseInputTritonBackend(),
    SparseInputCpuBackend(),
    SparseInputReference(),
)
"""Best first."""


def select_sparse_mlp(spec: SparseMlpSpec, device: torch.device, name: str | None = None) -> SparseMlpBackend:
    """The first legal back end, or the named one; ``ValueError`` says why a named one cannot run."""
    return select(SPARSE_MLP, spec, device, name)


def select_sparse_input(
    spec: SparseInputSpec, device: torch.device, name: str | None = None
) -> SparseInputBackend:
    """The first legal back end, or the named one; ``ValueError`` says why a named one cannot run."""
    return select(SPARSE_INPUT, spec, device, name)
