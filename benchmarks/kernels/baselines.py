"""What the Spense kernels are compared with: dense FP8 products, and 2:4 products of a library.

Every function gives calls that take turns on rotating weights, as :func:`vllm_spense.ops.measure.time_graph`
wants them, and a note on what the figure leaves out. They raise where the baseline does not run; callers
record that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vllm_spense.format.sparse24 import LEGAL_NIBBLES
from vllm_spense.ops import LinearSpec, quantize_per_token
from vllm_spense.ops.measure import ROTATE_BYTES, dense_calls, time_graph

Calls = list[Callable[[], object]]
FP8 = torch.float8_e4m3fn
LEAST_TOKENS = 16
"""cuSPARSELt takes FP8 matrices whose sides are multiples of 16."""
PER_TENSOR = "per-tensor scales only (the library has no others for FP8), left to 1"


@dataclass
class Baseline:
    """Calls of equal work, and how to read their time."""

    calls: Calls
    note: str = ""
    details: dict[str, object] = field(default_factory=dict)


def scaled_mm(spec: LinearSpec, tokens: int, device: torch.device) -> Baseline:
    """torch's dense FP8 product with per-token and per-channel scales, fast accumulation."""
    return Baseline(dense_calls(spec, tokens, device))


def vllm_cutlass(spec: LinearSpec, tokens: int, device: torch.device) -> Baseline:
    """The dense FP8 product that vLLM runs; ``ImportError`` without a CUDA build of it."""
    from vllm import _custom_ops

    operands = [call.args for call in dense_calls(spec, tokens, device)]  # type: ignore[attr-defined]
    return Baseline([partial(_custom_ops.cutlass_scaled_mm, *each, torch.bfloat16) for each in operands])


def paper(spec: LinearSpec, tokens: int, device: torch.device) -> Baseline:
    """SpenseGPT's own way (arXiv 2606.10445): cuSPARSELt on the 2:4 region, a dense product on the other."""
    (sparse_rows, sparse_columns), (dense_rows, dense_columns) = spec.sparse_shape, spec.dense_shape
    sparse = cusparselt(sparse_rows, sparse_columns, tokens, device)
    if not dense_rows * dense_columns:
        return Baseline(sparse.calls, f"one call; {sparse.note}", sparse.details)
    sizes = ((dense_rows,), (0,)) if spec.split == "output" else ((dense_columns,), (0,))
    region = LinearSpec(spec.split, dense_rows, dense_columns, *sizes, spec.codecs)
    dense = dense_calls(region, tokens, device)
    added = spec.split == "input"
    calls: Calls = [
        partial(_both, sparse.calls[i % len(sparse.calls)], dense[i % len(dense)], added)
        for i in range(max(len(sparse.calls), len(dense)))
    ]
    then = "and a sum" if added else "joining their outputs not counted"
    return Baseline(calls, f"two calls {then}; {sparse.note}", sparse.details)


def _both(sparse: Callable[[], object], dense: Callable[[], object], added: bool) -> None:
    a, b = sparse(), dense()
    if added:
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        a = a if a.shape[1] == b.shape[1] else a.t()
        a[: b.shape[0]].add_(b)


def slide_sparse(spec: LinearSpec, tokens: int, device: torch.device) -> Baseline:
    """What 6:8 costs as SlideSparse runs it: a 2:4 product over 1.5 times the columns, the same zeros as
    dense ratio 0.5. Spreading x over those columns is not counted."""
    result = cusparselt(spec.out_features, spec.in_features * 3 // 2, tokens, device)
    return Baseline(result.calls, f"6:8 as 2:4 over 1.5 K; {result.note}", result.details)


def cusparselt(rows: int, columns: int, tokens: int, device: torch.device) -> Baseline:
    """2:4 products of torch's cuSPARSELt with the algorithm that its own search finds for this shape."""
    padded = -(-tokens // LEAST_TOKENS) * LEAST_TOKENS
    generator = torch.Generator(device=device).manual_seed(0)
    count = max(2, -(-ROTATE_BYTES // (rows * columns * 5 // 8)))
    packed = [torch._cslt_compress(_random_24(rows, columns, generator)) for _ in range(count)]
    x = torch.randn(padded, columns, generator=generator, device=device)
    xq, _ = quantize_per_token(x.bfloat16())
    options = _search(packed[0], xq)
    note = f"{PER_TENSOR}; algorithm {options['alg_id']}, split K {options.get('split_k', 1)}"
    if not options["transpose_result"]:
        note += "; writes the transpose, turning it back not counted"
    if padded != tokens:
        note += f"; {padded} tokens instead of {tokens}"
    calls: Calls = [
        partial(torch._cslt_sparse_mm, each, xq.t(), out_dtype=torch.bfloat16, **options) for each in packed
    ]
    return Baseline(calls, note, dict(options))


def _random_24(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random e4m3 with two zeros in every group of four, at random places."""
    shape, device = (rows, columns // 4, 4), generator.device
    values = torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(0, 64, generator=generator)
    kept = [[i in (nibble & 3, nibble >> 2) for i in range(4)] for nibble in LEGAL_NIBBLES]
    picks = torch.randint(len(kept), shape[:2], generator=generator, device=device)
    zero = ~torch.tensor(kept, device=device)
    return values.clamp_(-448, 448).masked_fill_(zero[picks], 0).view(rows, columns).to(FP8)


def _search(packed: torch.Tensor, xq: torch.Tensor) -> dict[str, Any]:
    """Options of the fastest algorithm; y as ``[tokens, rows]`` if the library can write it so."""
    try:
        return _search_one(packed, xq, transpose=True)
    except RuntimeError:
        return _search_one(packed, xq, transpose=False)


def _search_one(packed: torch.Tensor, xq: torch.Tensor, transpose: bool) -> dict[str, Any]:
    """torch has had two interfaces to the search; the older one does not tell the split."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is not None:
        found = search(packed, xq.t(), None, None, torch.bfloat16, transpose)
        names = ("alg_id", "split_k", "split_k_mode")
        return dict(zip(names, map(int, found[:3]), strict=True)) | {"transpose_result": transpose}
    algorithm = torch._cslt_sparse_mm_search(
        packed, xq.t(), out_dtype=torch.bfloat16, transpose_result=transpose
    )
    return {"alg_id": int(algorithm), "transpose_result": transpose}


BASELINES: dict[str, Callable[[LinearSpec, int, torch.device], Baseline]] = {
    "scaled_mm": scaled_mm,
    "vllm_cutlass": vllm_cutlass,
    "paper": paper,
    "slide_sparse": slide_sparse,
}
DENSE = ("scaled_mm", "vllm_cutlass")


def copy_bandwidth(device: torch.device, size: int = 4 << 30) -> float:
    """Bytes per second of a device copy, read and written bytes both counted."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / (time_graph([lambda: target.copy_(source)], 10) * 1e-6)
