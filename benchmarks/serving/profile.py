"""Where the time of a decode step or a prefill goes: kernels of torch.profiler, by kind of work.

A decode step is what a run of many tokens has more than one of a single token, divided by the steps. Its
duration comes from the timings without profiler, which slows launches; what no kernel fills is gaps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.serving.engine import Engine, Kernels, Point

OTHER, GAPS = "other", "gaps"
CATEGORIES = (
    *("sparse GEMM", "dense GEMM", "quantisation", "attention", "norm, activation", "sampling"),
    *(OTHER, GAPS),
)
INDUCTOR = r"^triton_(red|per|poi|for)_fused.*"
RULES = tuple(
    (category, re.compile(pattern, flags))
    for category, pattern, flags in (
        # Inductor names a kernel by the operators in it, whichever kernel of vLLM they come from.
        ("sampling", INDUCTOR + "(argmax|softmax|topk|sort)", 0),
        ("norm, activation", INDUCTOR + "(rsqrt|mean|pow|norm|silu|sigmoid|gelu|rotary)", 0),
        ("quantisation", INDUCTOR + "(quant|amax|abs|clamp)", 0),
        ("norm, activation", INDUCTOR, 0),
        # FlashAttention 3 is built on CUTLASS, so attention stands before GEMMs.
        ("attention", r"\bflash(_\w+)?::|flash_?(fwd|attn)|attention|attn|fmha|reshape_and_cache", re.I),
        ("attention", r"Batch(Decode|Prefill)With|merge_?(attn_)?states|kv_cache|slot_mapping", re.I),
        ("sampling", r"argmax|softmax|top_?[kp]|sort|gumbel|sampl|logprob|penalt|_temperature_", re.I),
        ("sampling", r"gather_kernel|index_?(elementwise|select)|aten::(index|embedding)$", re.I),
        ("sparse GEMM", r"spense::(sm90::)?linear|spense::triton_linear|^_kernel$|Sparse", 0),
        ("norm, activation", r"(rms|layer)_?norm|norm_?rope|act_and_mul|silu|gelu|rotary", re.I),
        ("norm, activation", r"^aten::(pow|mean|rsqrt)$", 0),
        ("dense GEMM", r"nvjet|gemm|gemv|cutlass|scaled_mm|splitk|^triton_(tem|mm)|onednn|mkldnn", re.I),
        ("dense GEMM", r"^aten::(mm|addmm|bmm|linear|matmul)$|spense::dense_linear", 0),
        ("quantisation", r"quant|^aten::(abs|amax|clamp|reciprocal)$", re.I),
    )
)
"""The first that fits decides. A kernel that does both regions of a layer is a sparse GEMM."""


def category(kernel: str) -> str:
    return next((name for name, pattern in RULES if pattern.search(kernel)), OTHER)


def shorten(kernel: str) -> str:
    """A long C++ name's types and functions in order, without cute's, which fill kilobytes."""
    if len(kernel) <= 160:
        return kernel
    words = re.findall(r"[A-Za-z_][\w:]*", kernel)
    telling = (word for word in words if not re.match(r"cute::|(void|int|bool|float)$", word))
    return " ".join(dict.fromkeys(telling))[:400]


def chosen(points: Iterable[Point]) -> list[Point]:
    """Those to profile: decode of 32 sequences and of one, prefill of the longest single prompt."""
    points = list(points)
    decode = [p for p in points if p.output > 1 and p.input == 128 and p.batch in (1, 32)]
    prompts = sorted((p for p in points if p.output == 1 and p.batch == 1), key=lambda p: p.input)
    return decode + prompts[-1:]


def profile(engine: Engine, point: Point, timeout: float) -> Kernels:
    """Kernels of one decode step, or of the prefill: launches and microseconds by (short) name."""
    whole = merged(engine.profile(point.batch, point.input, point.output, timeout))
    prompt = point.output > 1 and merged(engine.profile(point.batch, point.input, 1, timeout))
    return per_step(whole, prompt or {}, steps(point))


def steps(point: Point) -> int:
    """Steps of decoding; a prefill is one."""
    return point.output - 1 or 1


def merged(kernels: Kernels) -> Kernels:
    """Under short names."""
    found: Kernels = {}
    for name, (calls, microseconds) in kernels.items():
        before = found.get(shorten(name), [0, 0.0])
        found[shorten(name)] = [before[0] + calls, before[1] + microseconds]
    return found


def per_step(whole: Kernels, first: Kernels, count: int) -> Kernels:
    """``whole`` less ``first``, by ``count``; a kernel that ran as often in both is the prompt's."""
    found: Kernels = {}
    for name, (calls, microseconds) in whole.items():
        before = first.get(name, [0, 0.0])
        if calls > before[0]:
            time = max(0.0, microseconds - before[1]) / count
            found[name] = [round((calls - before[0]) / count, 3), round(time, 3)]
    return found


def breakdown(kernels: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Microseconds by category of a step that takes ``seconds``.

    Gaps are at least 0: kernels that overlap may add up to more than the step.
    """
    found = dict.fromkeys(CATEGORIES, 0.0)
    for name, (_, microseconds) in kernels.items():
        found[category(name)] += microseconds
    found[GAPS] = max(0.0, seconds * 1e6 - sum(found.values()))
    return found


def largest(kernels: Mapping[str, Any], kind: str, count: int = 3) -> list[tuple[str, float]]:
    """Names and microseconds of the longest kernels of a category."""
    times = [(name, time) for name, (_, time) in kernels.items() if category(name) == kind]
    return sorted(times, key=lambda item: -item[1])[:count]
