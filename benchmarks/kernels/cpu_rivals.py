"""What a Spense layer competes with on a CPU: the kernels that stock vLLM has for dense weights.

Each kernel is prepared and called as vLLM's own linear methods do it (`model_executor/layers/utils.py` and
`model_executor/kernels/linear/*/cpu.py` of the installed wheel), activation quantisation included. What this
CPU or this wheel cannot run has a reason instead. Where there are two kernels for a format, the one that vLLM
would take is marked, and the other one is measured as well.

Weights are whole numbers from -7 to 7 times :data:`SCALE`, which every format here holds exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Call = Callable[[torch.Tensor], torch.Tensor]
SCALE = 1 / 64
BLOCK = 128
"""Columns (and rows) that share a scale in FP8 W8A16."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
EIGHTS = -2004318072
"""0x88888888: eight zero points of 8."""


@dataclass(frozen=True)
class Column:
    """One way to compute a layer: ``make`` gives a call on ``x [M, K]`` bf16 with weights of its own.

    ``nbytes``: of one such layer's weights. ``kind``: the format; among columns of one kind ``chosen`` is
    what vLLM runs. ``why_not``: the reason why it cannot run here.
    """

    name: str
    nbytes: int
    make: Callable[[int], Call]
    kind: str = ""
    chosen: bool = False
    why_not: str | None = None


@functools.cache
def loaded() -> Any:
    """vLLM's operators, its compiled library loaded; the reason in one line where there is none."""
    try:
        from vllm import _custom_ops
        from vllm.platforms import current_platform
    except ImportError as error:
        return f"vLLM cannot be imported: {error}"
    if not current_platform.is_cpu():
        return "the installed vLLM is not the one for CPUs"
    current_platform.import_kernels()
    torch.cpu._init_amx()
    return _custom_ops


def codes(n: int, k: int, seed: int) -> torch.Tensor:
    """Whole numbers ``[N, K]`` int8; the weight is these times :data:`SCALE`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-7, 8, (n, k), dtype=torch.int8, generator=generator)


def columns(n: int, k: int, tiles: bool | None = None) -> list[Column]:
    """All of them, for a layer with ``n`` outputs and ``k`` inputs. ``tiles``: may they use AMX (default:
    whether the CPU has it); what oneDNN uses is for its own environment variable to say."""
    ops = loaded()
    absent = ops if isinstance(ops, str) else None
    tiles = torch.cpu._is_amx_tile_supported() if tiles is None else tiles
    amx = absent or (None if tiles else "needs AMX")
    small_bf16 = amx or _multiples(n, k, 16, 32)
    group, wna16 = group_size(k), partial(int4_w4a16, tiles=tiles)
    every = [
        ("bf16 oneDNN", "bf16", 16, bf16_onednn, _missing(absent, "create_onednn_mm_handler")),
        ("bf16 SGL", "bf16", 16, bf16_sgl, _missing(small_bf16, "weight_packed_linear")),
        ("INT8 oneDNN", "INT8", 8, int8_onednn, _missing(absent, "create_onednn_scaled_mm_handler")),
        ("INT8 SGL", "INT8", 8, int8_sgl, _missing(small_bf16, "int8_scaled_mm_with_quant")),
        ("FP8 W8A16", "FP8", 8, fp8_w8a16, _missing(amx or _multiples(n, k, 32, 32), "fp8_scaled_mm_cpu")),
        ("INT4 W4A8", "INT4", 4, int4_w4a8, _missing(amx or _grouped(n, k), "int4_scaled_mm_cpu")),
        ("INT4 W4A16", "INT4", 4, wna16, _missing(absent or _grouped(n, k), "cpu_gemm_wna16")),
    ]
    dtypes = () if absent else (torch.bfloat16, torch.int8)
    picked = {chosen_kernel(n, k, dtype, tiles) for dtype in dtypes}
    picked |= {"FP8 W8A16", "INT4 W4A8" if not amx else "INT4 W4A16"}
    return [
        Column(
            *(name, n * k * bits // 8 + (2 * n * k // group if bits == 4 else 0)),
            make=lambda seed, make=make: make(codes(n, k, seed)),  # type: ignore[misc]
            kind=kind,
            chosen=name in picked,
            why_not=reason,
        )
        for name, kind, bits, make, reason in every
    ]


def chosen_kernel(n: int, k: int, dtype: torch.dtype, tiles: bool) -> str:
    """The column that vLLM's own rule picks for bf16 and for INT8 weights; SGL's kernels need AMX."""
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel

    kind = "bf16" if dtype == torch.bfloat16 else "INT8"
    return f"{kind} {'SGL' if tiles and check_cpu_sgl_kernel(n, k, dtype) else 'oneDNN'}"


def group_size(k: int) -> int:
    """Columns that share a scale in INT4: 128, or 64 where that does not divide K."""
    return 128 if k % 128 == 0 else 64


def _missing(reason: str | None, operator: str) -> str | None:
    if reason or hasattr(torch.ops._C, operator):
        return reason
    return f"this vLLM has no {operator}"


def _multiples(n: int, k: int, rows: int, columns: int) -> str | None:
    return f"needs N in {rows}s and K in {columns}s" if n % rows or k % columns else None


def _grouped(n: int, k: int) -> str | None:
    return _multiples(n, k, 32, 64)


# --- how vLLM prepares and calls them -----------------------------------------------------------------------


def bf16_onednn(weight: torch.Tensor) -> Call:
    ops = loaded()
    handler = ops.create_onednn_mm(_bf16(weight).t(), 32)
    return lambda x: ops.onednn_mm(handler, x, None)


def bf16_sgl(weight: torch.Tensor) -> Call:
    ops, n = loaded(), len(weight)
    packed = torch.ops._C.convert_weight_packed(_bf16(weight))
    return lambda x: ops.weight_packed_linear_cpu(x, packed, n, None)


def int8_onednn(weight: torch.Tensor) -> Call:
    """The handler holds the packed weight, but only the address of the scales: the call keeps them alive."""
    ops, n = loaded(), len(weight)
    scales = torch.full((n, 1), SCALE)
    adjustment = weight.sum(dim=1, dtype=torch.float32)[None] * SCALE  # unused without zero points
    handler = ops.create_onednn_scaled_mm(weight.t(), scales, torch.bfloat16, True, False, 32)

    def call(x: torch.Tensor, _kept: torch.Tensor = scales) -> torch.Tensor:
        quantized, x_scales, zero_points = ops.onednn_scaled_int8_quant(x, None, None, True)
        out = torch.empty((len(x), n), dtype=x.dtype)
        return ops.onednn_scaled_mm(handler, quantized, out, x_scales, zero_points, adjustment, None)

    return call


def int8_sgl(weight: torch.Tensor) -> Call:
    packed = torch.ops._C.convert_weight_packed(weight)
    scales = torch.full((len(weight), 1), SCALE)
    run = torch.ops._C.int8_scaled_mm_with_quant
    return lambda x: run(x, packed, scales, None, x.dtype, True)


def fp8_w8a16(weight: torch.Tensor) -> Call:
    n, k = weight.shape
    packed = torch.ops._C.convert_weight_packed(weight.to(torch.float8_e4m3fn))
    scales = torch.full((-(-n // BLOCK), -(-k // BLOCK)), SCALE)
    run = torch.ops._C.fp8_scaled_mm_cpu
    return lambda x: run(x, packed, scales, [BLOCK, BLOCK], None, x.dtype, True)


def int4_w4a8(weight: torch.Tensor) -> Call:
    ops, (n, k) = loaded(), weight.shape
    groups = k // group_size(k)
    ordered = _nibbles(weight).view(k, n // 8, 8)[:, :, list(AWQ_ORDER)].reshape(k, n)
    zeros = torch.full((groups, n // 8), EIGHTS, dtype=torch.int32)
    scales = torch.full((groups, n), SCALE, dtype=torch.bfloat16)
    w, w_zeros, w_scales = ops.convert_weight_packed_scale_zp(
        _packed(ordered), zeros, scales, ops.CPUQuantAlgo.AWQ
    )
    return lambda x: ops.int4_scaled_mm_cpu(x=x, w=w, w_zeros=w_zeros, w_scales=w_scales, bias=None)


def int4_w4a16(weight: torch.Tensor, tiles: bool) -> Call:
    ops, (n, k) = loaded(), weight.shape
    w = _packed(_nibbles(weight)).view(k, n // 16, 2).permute(1, 0, 2).reshape(n // 16, 2 * k).contiguous()
    scales = torch.full((k // group_size(k), n), SCALE, dtype=torch.bfloat16)
    hint = "amx" if tiles else "vec"
    return lambda x: ops.cpu_gemm_wna16(x, w, scales, None, None, pack_factor=8, isa_hint=hint)


def _bf16(weight: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16().mul_(SCALE)


def _nibbles(weight: torch.Tensor) -> torch.Tensor:
    """``[K, N]`` uint8 from 1 to 15: the values with 8 added."""
    return (weight.t() + 8).to(torch.uint8)


def _packed(nibbles: torch.Tensor) -> torch.Tensor:
    """``[K, N / 8]`` int32, the first of eight values in the lowest bits."""
    low, high = nibbles[:, 0::2], nibbles[:, 1::2]
    return (low | high << 4).contiguous().view(torch.int32)
