"""``spense::linear_cpu``: compressed e4m3 weights on x86-64 CPUs, widened in registers.

The kernels (``kernels/linear/cpu``) read the weights of 16 output rows side by side:
:func:`interleave` turns every 16 rows ``[16, bytes]`` of a checkpoint tensor into ``[bytes, 16]``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from vllm_spense.ops import extension
from vllm_spense.ops.spec import LinearSpec

ISAS = ("avx2", "avx512", "avx512_bf16")
"""Instruction sets that there are kernels for; a CPU that has one has those before it."""
STRIP = 16
"""Rows that lie side by side, and columns of one step (kRows, kStep of kernels/linear/cpu/kernels.h)."""


class Interleaved(NamedTuple):
    """A layer's weights in the kernels' layout, uint8."""

    sparse_values: torch.Tensor
    sparse_meta: torch.Tensor
    dense_weight: torch.Tensor


@functools.cache
def why_not_here() -> str | None:
    """None when this CPU runs the kernels, else the reason in one line; the operators exist afterwards."""
    reason = extension.why_not_loaded_cpu()
    if reason is not None:
        return reason
    torch.library.register_fake("spense::linear_cpu", _fake)
    return None if best_isa() else "the CPU kernels need AVX2 and FMA"


def best_isa() -> int:
    """Number of this CPU's best instruction set, one more than its place in ``ISAS``; 0: none."""
    return torch.ops.spense.cpu_isa()


def describe_cpu() -> str:
    """The CPU's name as Linux tells it, and the instruction set that the kernels use."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    names = (line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    isa = best_isa()
    return f"{next(names, 'CPU')}, {ISAS[isa - 1] if isa else 'no instruction set with kernels'}"


def interleave(
    spec: LinearSpec, values: torch.Tensor, meta: torch.Tensor, dense: torch.Tensor
) -> Interleaved:
    """The checkpoint tensors of a layer in the kernels' layout, in their own memory where they fit.

    Where they do not, zeros fill up the rows of each region of each fused shard and the columns of each
    region to multiples of 16. The dense region of an input split starts at a multiple of 16 of x's columns,
    too: zeros stand in front of it. The tensors given are spent.
    """
    sparse_rows, dense_rows = list(spec.sparse_sizes), list(spec.dense_sizes)
    ahead = 0
    if spec.split == "input":
        ahead = sparse_rows[0] % STRIP if dense_rows[0] else 0
        sparse_rows = dense_rows = [spec.out_features]
    behind = _missing(spec.sparse_shape[1])
    filled = Interleaved(
        _filled(values, sparse_rows, 0, behind // 2),
        _filled(meta, sparse_rows, 0, behind // 8),
        _filled(dense, dense_rows, ahead, _missing(ahead + dense.shape[1])),
    )
    for tensor in filter(torch.Tensor.numel, filled):
        torch.ops.spense.interleave_rows_cpu(tensor)
    return filled


def _missing(n: int) -> int:
    return -n % STRIP


def _filled(tensor: torch.Tensor, rows: list[int], ahead: int, behind: int) -> torch.Tensor:
    data = tensor.view(torch.uint8).contiguous()
    if not (ahead or behind or any(_missing(size) for size in rows)) or not data.numel():
        return data
    return torch.cat([pad(part, (ahead, behind, 0, _missing(len(part)))) for part in data.split(rows)])


def _fake(
    x: torch.Tensor,
    sparse_values: torch.Tensor,
    sparse_meta: torch.Tensor,
    dense_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    sparse_sizes: list[int],
    dense_sizes: list[int],
    output_split: bool,
    isa: int = 0,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight_scale.shape[0]))
