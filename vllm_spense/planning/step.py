"""Seconds of one step of the engine, by what they are spent on, for Spense and for dense FP8.

The dense model is the same one with all linear layers in FP8 (``spense export --format fp8``), in a dense
kernel as good as ours: on Hopper the estimate of ``ops/linear/configs.py`` for a layer without 2:4 region.
A tuning table of the GPU, where it has the layer, replaces both times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

from vllm_spense.devices import Gpu
from vllm_spense.ops.linear.configs import LAUNCH, candidates, estimate
from vllm_spense.ops.linear.repack import PITCH
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.ops.linear.table import MAX_BUCKET, TuningEntry, bucket, dense_ratio, measured, shape_of
from vllm_spense.planning.shapes import ModelShape, RankLinear

KvDtype = Literal["bf16", "fp8"]
KV_BYTES: dict[str, int] = {"bf16": 2, "fp8": 1}

PAYS = 1.05
"""Least predicted speed-up that is called a gain: below it the model's own error decides."""
SMALL_KERNELS = 7
"""Per layer beside the linears: two norms, RoPE with the write to the KV cache, attention and its reduction,
quantisation for o, activation with quantisation for down."""
SMALL_KERNEL_SECONDS = 2e-6
"""One of them in a CUDA graph whatever its size; assumed."""
STEP_SECONDS = 200e-6
"""Sampling, and what the scheduler does not hide, per step; assumed."""
ALL_REDUCE_SECONDS = 8e-6
"""Latency of one all-reduce between GPUs over NVLink; assumed."""


class LayerTime(NamedTuple):
    """Seconds of one call of a linear layer, and whether a tuning table says so."""

    spense: float
    dense: float
    measured: bool


@dataclass(frozen=True)
class Step:
    """Seconds of one step: MLP linears, attention linears, attention itself (its KV reads at decode, its
    products at prefill), routed experts, the head, all else."""

    mlp: float
    attention_linears: float
    attention: float
    experts: float
    head: float
    rest: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Phase:
    """A step that takes in ``tokens`` tokens, as both models run it.

    ``measured`` of the ``hybrid`` different layers with a 2:4 region have their times from a tuning table.
    """

    tokens: int
    dense: Step
    spense: Step
    measured: int
    hybrid: int

    @property
    def speedup(self) -> float:
        return self.dense.total / self.spense.total

    @property
    def dense_tokens_per_s(self) -> float:
        return self.tokens / self.dense.total

    @property
    def spense_tokens_per_s(self) -> float:
        return self.tokens / self.spense.total

    @property
    def mlp_share(self) -> float:
        """Share of the dense model's step that its MLP linears take, which is what Spense makes faster."""
        return self.dense.mlp / self.dense.total


def decode(model: ModelShape, gpu: Gpu, size: int, batch: int, context: int, kv: KvDtype) -> Phase:
    """``batch`` sequences with ``context`` tokens behind them take one token each, on ``size`` GPUs."""
    read = sum(min(context, window or context) for window in model.windows)
    per_token = 2 * (model.kv_heads // size) * model.head_size * KV_BYTES[kv]
    return _phase(model, gpu, size, batch, batch * read * per_token / gpu.memory_rate)


def prefill(model: ModelShape, gpu: Gpu, size: int, tokens: int) -> Phase:
    """The first ``tokens`` tokens of one prompt in one step, on ``size`` GPUs."""
    seen = 0.0  # pairs of tokens that attend to each other, over the layers
    for window in model.windows:
        width = min(tokens, window or tokens)
        seen += width * tokens - width * width / 2
    operations = 4 * seen * (model.heads // size) * model.head_size
    return _phase(model, gpu, size, tokens, operations / gpu.bf16_rate)


def compressed(spec: LinearSpec, gpu: Gpu) -> bool:
    """Whether our kernels run the layer: it has a 2:4 region, its columns fit TMA, and dense FP8 was not
    measured faster over the layer's table (``ops/linear/table.usable``)."""
    if not spec.hybrid or spec.in_features % PITCH:
        return False
    ratio = dense_ratio(measured(gpu.device).get(shape_of(spec), {}))
    return ratio is None or ratio <= 1


def layer_time(spec: LinearSpec, tokens: int, gpu: Gpu) -> LayerTime:
    """One call with ``tokens`` rows of x.

    A measured bucket is scaled to ``tokens`` as the estimate scales; where dense was not measured beside it,
    both times are estimates, for a ratio of the two would mean nothing.
    """
    kernel = _kernel_seconds if gpu.fused else _roofline_seconds
    whole = _as_dense(spec)
    entry = measured(gpu.device).get(shape_of(spec), {}).get(bucket(tokens))
    if entry is not None and entry.dense_us and tokens <= MAX_BUCKET:
        spense = _scaled(entry, entry.us, spec, tokens, gpu, kernel)
        dense = _scaled(entry, entry.dense_us, whole, tokens, gpu, kernel)
        return LayerTime(spense if compressed(spec, gpu) else dense, dense, True)
    dense = kernel(whole, tokens, gpu)
    return LayerTime(kernel(spec, tokens, gpu) if compressed(spec, gpu) else dense, dense, False)


_Kernel = Callable[[LinearSpec, int, Gpu], float]


def _scaled(entry: TuningEntry, us: float, spec: LinearSpec, tokens: int, gpu: Gpu, kernel: _Kernel) -> float:
    return us * 1e-6 * kernel(spec, tokens, gpu) / kernel(spec, entry.tokens, gpu)


def _as_dense(spec: LinearSpec) -> LinearSpec:
    sizes = tuple(s + d for s, d in zip(spec.sparse_sizes, spec.dense_sizes, strict=True))
    return replace(spec, sparse_sizes=(0,) * len(sizes), dense_sizes=sizes)


def _kernel_seconds(spec: LinearSpec, tokens: int, gpu: Gpu) -> float:
    """The best configuration of the Hopper kernel. Its estimate knows an H200; a GPU with the same processors
    and slower memory cannot be faster than its own memory."""
    legal = candidates(spec, tokens, gpu.capability, cutlass=False)
    best = min(estimate(spec, tokens, config, gpu.processors) for config in legal)
    return max(best, moved_bytes(spec, tokens) / gpu.memory_rate + LAUNCH)


def moved_bytes(spec: LinearSpec, tokens: int) -> int:
    """Weights as stored, activations in FP8, outputs in bf16."""
    return spec.weight_bytes + tokens * (spec.in_features + 2 * spec.out_features)


def _roofline_seconds(spec: LinearSpec, tokens: int, gpu: Gpu) -> float:
    """One GEMM per region and fused part, each bound by its bytes or its operations, one after the other.

    With both regions in an input split, fp32 partial sums go through memory. Tiles are not modelled.
    """
    output = spec.split == "output"
    sparse, dense = spec.sparse_sizes, spec.dense_sizes
    if not spec.hybrid:
        dense = (sum(dense),)  # one GEMM over all fused parts
    seconds = 0.0
    for sizes, width, work in ((sparse, 0.625, 0.5), (dense, 1.0, 1.0)):
        for size in filter(None, sizes):
            rows, columns = (size, spec.in_features) if output else (spec.out_features, size)
            moved = rows * columns * width + tokens * (columns + 2 * rows)
            operations = 2 * tokens * rows * columns * work
            seconds += max(moved / gpu.memory_rate, operations / gpu.fp8_rate) + LAUNCH
    if not output and all((*sparse, *dense)):
        seconds += 8 * tokens * spec.out_features / gpu.memory_rate
    return seconds


def _phase(model: ModelShape, gpu: Gpu, size: int, tokens: int, attention: float) -> Phase:
    linears = model.rank(size)
    times = {linear.spec: layer_time(linear.spec, tokens, gpu) for linear in linears}
    hybrid = [spec for spec in times if spec.hybrid]

    def step(which: Literal["spense", "dense"]) -> Step:
        seconds = {"mlp": 0.0, "attention": 0.0}
        for linear in linears:
            seconds[linear.kind] += linear.count * getattr(times[linear.spec], which)
        return Step(
            mlp=seconds["mlp"],
            attention_linears=seconds["attention"],
            attention=attention,
            experts=_experts(model, gpu, size, tokens),
            head=2 * model.vocabulary * model.hidden / size / gpu.memory_rate,
            rest=_rest(model, linears, gpu, size, tokens),
        )

    count = sum(times[spec].measured for spec in hybrid)
    return Phase(tokens, step("dense"), step("spense"), count, len(hybrid))


def _rest(model: ModelShape, linears: list[RankLinear], gpu: Gpu, size: int, tokens: int) -> float:
    """Elementwise kernels, all-reduces, sampling: the same for both models.

    Per token, what a linear reads is quantised once (2 bytes in, 1 out) and what it writes is read once (2);
    the residual is read and written twice per layer.
    """
    moved = sum(x.count * (3 * x.spec.in_features + 2 * x.spec.out_features) for x in linears)
    moved += model.layers * 8 * model.hidden
    seconds = tokens * moved / gpu.memory_rate + model.layers * SMALL_KERNELS * SMALL_KERNEL_SECONDS
    if size > 1:
        sent = 2 * (size - 1) / size * tokens * 2 * model.hidden  # ring: bytes that each GPU sends, bf16
        seconds += 2 * model.layers * (ALL_REDUCE_SECONDS + sent / gpu.link_rate)
    return seconds + STEP_SECONDS


def _experts(model: ModelShape, gpu: Gpu, size: int, tokens: int) -> float:
    """bf16 experts: those that some token chose are read; each token multiplies with its own."""
    experts = model.experts
    if experts is None:
        return 0.0
    weights = 3 * model.hidden * experts.intermediate / size
    touched = experts.count * (1 - (1 - experts.active / experts.count) ** tokens)
    operations = 2 * tokens * experts.active * weights
    seconds = max(2 * touched * weights / gpu.memory_rate, operations / gpu.bf16_rate)
    return experts.layers * (seconds + 2 * LAUNCH)
