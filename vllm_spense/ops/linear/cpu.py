"""CPUs: compiled kernels on compressed e4m3 or int8 weights, and dense fp32 where they cannot run.

``spense::linear_cpu`` (``kernels/``, x86-64) widens weights in registers. It reads those of 16 output rows
side by side, the layout ``strips``: :func:`interleave` turns every 16 rows ``[16, units]`` of a checkpoint
tensor into ``[units, 16]``, where a unit is four bytes of weights or one of metadata.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.format.sparse24 import decompress
from vllm_spense.ops import extension
from vllm_spense.ops.activations import quantized
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.arguments import PACKED, LinearArguments
from vllm_spense.ops.linear.op import dense_linear
from vllm_spense.ops.linear.reference import full_weight
from vllm_spense.ops.linear.spec import LinearSpec

ISAS = ("avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
"""Instruction sets that there are kernels for, the best last."""
CODECS = ("fp8", "int8")
"""Codecs, by number (Codec of the kernels)."""
STRIP = 16
"""Rows that lie side by side, and columns of one step (kRows, kStep of the kernels)."""
_PART = 1 << 19
"""Weights that are widened at a time: 2 MiB of fp32, which stay in a CPU's cache."""
_SIGN_EXPONENT_MANTISSA = 0x87F00000 - (1 << 32)
"""Bits of an fp32 that hold those of an e4m3 whose byte was sign-extended and shifted left by 20."""
_REBIAS = 2.0**120
"""From the exponent's bias of fp32 (127) to that of e4m3 (7); exact for subnormals, too."""


class CpuBackend:
    """Compressed weights, widened in registers: less memory to read per token than any dense matrix.

    Quantises activations itself, as :func:`vllm_spense.ops.quantize_per_token` does.
    """

    name = "cpu"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on CPUs, not on {device.type}"
        if spec.codecs.name not in CODECS:
            return f"the kernels take FP8 or INT8 weights, not {spec.codecs.title}"
        return why_not_here()

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return interleave(spec, LinearArguments.of(spec, tensors)).prepared()

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        layer = LinearArguments.of(spec, tensors, bias, "strips")
        return torch.ops.spense.linear_cpu(x.contiguous(), *layer.compiled())


class CpuDenseBackend:
    """Decompressed once at load to fp32, in which e4m3 is exact: for CPUs and weights without kernels."""

    name = "cpu-fp32"

    def why_not(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on CPUs, not on {device.type}"
        return None if spec.one_by_one else f"it does not know {spec.codecs.title} weights"

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        layer = LinearArguments.of(spec, tensors)
        e4m3 = spec.codecs == UNIFORM_FP8
        prepared = {PACKED: widened_weight(layer) if e4m3 else full_weight(layer).float()}
        return prepared if layer.weight_scale is None else prepared | {"weight_scale": layer.weight_scale}

    def apply(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        xq, xs = quantized(x, spec.activation_dtype)
        return dense_linear(xq, xs, tensors[PACKED], tensors.get("weight_scale"), bias, x.dtype)


# --- the kernels --------------------------------------------------------------------------------------------


@functools.cache
def why_not_here() -> str | None:
    """None when this CPU runs the kernels, else the reason in one line; the operators exist afterwards."""
    reason = extension.why_not_loaded_cpu()
    if reason is not None:
        return reason
    torch.library.register_fake("spense::linear_cpu", _fake)
    return None if isas() else "the CPU kernels need AVX2 and FMA"


def isas(codec: str = "fp8") -> tuple[str, ...]:
    """Those of ``ISAS`` that this CPU has and that have kernels for a codec, the best last."""
    if extension.why_not_loaded_cpu() is not None:
        return ()
    here = torch.ops.spense.cpu_isas(CODECS.index(codec))
    return tuple(name for i, name in enumerate(ISAS) if here >> i & 1)


def describe_cpu() -> str:
    """The CPU's name as Linux tells it, and the instruction set that the kernels use for each codec."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    names = (line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    best = [f"{known[-1]} for {codec.upper()}" for codec in CODECS if (known := isas(codec))]
    return f"{next(names, 'CPU')}, {', '.join(best) or 'no instruction set with kernels'}"


def interleave(spec: LinearSpec, layer: LinearArguments) -> LinearArguments:
    """A layer in the layout ``strips``: weights int8 or (FP8) uint8, in their own memory where they fit.

    Where they do not, zeros fill up the rows of each region of each fused shard and the columns of each
    region to multiples of 16. The dense region of an input split starts at a multiple of 16 of x's columns,
    too: zeros stand in front of it. The tensors given are spent.
    """
    sparse_rows, dense_rows = layer.sparse_sizes, layer.dense_sizes
    ahead = 0
    if not layer.output_split:
        ahead = sparse_rows[0] % STRIP if dense_rows[0] else 0
        sparse_rows = dense_rows = [spec.out_features]
    behind = _missing(spec.sparse_shape[1])
    filled = layer._replace(
        sparse_values=_filled(layer.sparse_values, sparse_rows, 0, behind // 2),
        sparse_meta=_filled(layer.sparse_meta, sparse_rows, 0, behind // 8),
        dense_weight=_filled(layer.dense_weight, dense_rows, ahead, _missing(ahead + spec.dense_shape[1])),
        layout="strips",
    )
    for tensor, unit in ((filled.sparse_values, 4), (filled.sparse_meta, 1), (filled.dense_weight, 4)):
        if tensor.numel():
            torch.ops.spense.interleave_rows_cpu(tensor, unit)
            move_to_huge_pages(tensor)
    return filled


def ask_for_huge_pages(tensor: torch.Tensor) -> None:
    """To be called before weights are written into new memory: a huge page takes less time then than it does
    to move what has been written. Does nothing where the kernels do not run."""
    if tensor.is_cpu and why_not_here() is None and _huge_pages_wanted():
        torch.ops.spense.huge_pages_cpu(tensor, touched=False)


def move_to_huge_pages(tensor: torch.Tensor) -> None:
    """The same for weights that are there already. Does nothing where the kernels do not run."""
    if tensor.is_cpu and why_not_here() is None and _huge_pages_wanted():
        torch.ops.spense.huge_pages_cpu(tensor, touched=True)


@functools.cache
def _huge_pages_wanted() -> bool:
    """Whether whoever runs this machine lets programs ask for huge pages."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text(encoding="ascii")


def _missing(n: int) -> int:
    return -n % STRIP


def _filled(tensor: torch.Tensor, rows: list[int], ahead: int, behind: int) -> torch.Tensor:
    data = tensor.contiguous() if tensor.dtype == torch.int8 else tensor.view(torch.uint8).contiguous()
    if not (ahead or behind or any(_missing(size) for size in rows)) or not data.numel():
        return data
    return torch.cat([pad(part, (ahead, behind, 0, _missing(len(part)))) for part in data.split(rows)])


def _fake(x: torch.Tensor, *layer_and_isa: Any) -> torch.Tensor:
    scale = layer_and_isa[LinearArguments._fields.index("weight_scale")]
    return x.new_empty((x.shape[0], scale.shape[0]))


# --- without kernels ----------------------------------------------------------------------------------------


def widened_weight(layer: LinearArguments) -> torch.Tensor:
    """fp32 ``[N, K]``: :func:`full_weight` of e4m3 without NaN (loading has checked that).

    It takes a third of the time: there is no index and no matrix besides the result, and nothing is converted
    one value at a time.
    """
    values, meta, dense = layer.sparse_values, layer.sparse_meta, layer.dense_weight
    if not layer.output_split:
        columns = sum(layer.sparse_sizes)
        out = torch.empty(dense.shape[0], columns + dense.shape[1], dtype=torch.float32)
        _widen_sparse(values, meta, out[:, :columns])
        _widen_dense(dense, out[:, columns:])
        return out
    out = torch.empty(len(values) + len(dense), dense.shape[1], dtype=torch.float32)
    sizes = zip(layer.sparse_sizes, layer.dense_sizes, strict=True)
    rows = out.split([size for pair in sizes for size in pair])
    parts = (values.split(layer.sparse_sizes), meta.split(layer.sparse_sizes))
    for value, nibbles, target in zip(*parts, rows[0::2], strict=True):
        _widen_sparse(value, nibbles, target)
    for part, target in zip(dense.split(layer.dense_sizes), rows[1::2], strict=True):
        _widen_dense(part, target)
    return out


def _rows(out: torch.Tensor) -> int:
    return max(1, _PART // max(1, out.shape[1]))


def _widen_dense(e4m3: torch.Tensor, out: torch.Tensor) -> None:
    for source, target in zip(e4m3.split(_rows(out)), out.split(_rows(out)), strict=True):
        _widen(source, target)


def _widen_sparse(values: torch.Tensor, meta: torch.Tensor, out: torch.Tensor) -> None:
    parts = (tensor.split(_rows(out)) for tensor in (values, meta, out))
    for value, nibbles, target in zip(*parts, strict=True):
        _widen(decompress(value, nibbles), target)


def _widen(e4m3: torch.Tensor, out: torch.Tensor) -> None:
    bits = out.view(torch.int32)
    bits.copy_(e4m3.view(torch.int8))
    bits <<= 20
    bits &= _SIGN_EXPONENT_MANTISSA
    out *= _REBIAS
