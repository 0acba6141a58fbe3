"""What else vLLM can serve the model in, beside Spense and dense FP8: predicted times, bytes, and advice.

A format's linear layers take what a dense FP8 kernel is predicted to take, scaled as bytes and operations
scale (:func:`linear_ratio`); all else of a step is the same. Prefill is generous to the others: nothing is
charged for turning 4-bit weights into what tensor cores take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_spense.devices import BLACKWELL, HOPPER, Gpu
from vllm_spense.format.linear import Codecs, LinearFormat
from vllm_spense.ops.linear.configs import LAUNCH
from vllm_spense.ops.linear.spec import LinearSpec
from vllm_spense.planning.shapes import ModelShape
from vllm_spense.planning.step import PAYS, Phase, layer_time

FOUR_BIT_SHARE = 0.76
"""Share of a dense FP8 kernel's memory rate that a 4-bit one reaches. For W4A8 on Hopper its authors measured
1.37x to 1.65x of FP8's speed at 1 to 64 tokens, 1.51x in the mean of ten shapes, where bytes would give 1.97x
(https://github.com/vllm-project/vllm/pull/23198). Assumed of the other 4-bit kernels."""
SURVEY = "https://arxiv.org/abs/2411.02355"


@dataclass(frozen=True)
class Format:
    """One way to store and multiply all linear layers.

    ``weight_bytes``: per weight, group scales included. ``speed``: tensor-core operations/s by those of FP8,
    at most, on GPUs of ``capabilities``. ``speed_source``: where that stands. ``quality``: what is published
    about the loss; none of these formats needs training.
    """

    name: str
    weight_bytes: float
    speed: float
    capabilities: tuple[tuple[int, int], ...]
    speed_source: str
    quality: str

    @property
    def memory_share(self) -> float:
        return FOUR_BIT_SHARE if self.weight_bytes < 1 else 1.0


FP8 = Format(
    *("FP8 W8A8", 1.0, 1.0, (HOPPER, BLACKWELL)),
    speed_source="NVIDIA's data sheets",
    quality=f"lossless on Llama 3.1 ({SURVEY})",
)
NF4 = Format(
    *("NF4 W4A16", 0.5 + 1 / 64, 0.5, (HOPPER, BLACKWELL)),
    speed_source="bf16 tensor cores, half of FP8's rate; a byte of scale for 64 weights. Our kernels, "
    "compiled, not yet run on hardware: no advice is built on this row",
    quality="no published figure is known to us for this rounding; on two small models: docs/accuracy.md",
)
FORMATS = (
    FP8,
    Format(
        *("INT8 W8A8", 1.0, 1.0, (HOPPER,)),
        speed_source="the H100's data sheet: as fast as FP8; on Blackwell vLLM has none "
        "(https://docs.vllm.ai/en/latest/features/quantization/int8/)",
        quality=f"1 to 3 % lower on Llama 3.1 ({SURVEY})",
    ),
    Format(
        *("INT4 W4A16", 0.5 + 2 / 128, 0.5, (HOPPER, BLACKWELL)),
        speed_source="bf16 tensor cores, half of FP8's rate; scales of two bytes for 128 weights",
        quality=f"competitive with INT8 on Llama 3.1 ({SURVEY})",
    ),
    Format(
        *("INT4 W4A8", 0.5 + 1 / 128, 1.0, (HOPPER,)),
        speed_source="FP8 tensor cores at best (https://github.com/vllm-project/vllm/pull/23198); another "
        "4-bit kernel for Hopper has 1.4x of FP8's speed at 16 tokens per expert and 0.71x at 64 "
        "(https://github.com/deepseek-ai/DeepGEMM/pull/378)",
        quality="no published figure is known to us",
    ),
    NF4,
    Format(
        *("NVFP4 W4A16", 0.5 + 1 / 16, 0.5, (HOPPER,)),
        speed_source="no FP4 tensor cores: bf16's, half of FP8's rate; turning the weights into FP8 at load "
        "gave 62 % more tokens/s on 2 H200 (https://github.com/vllm-project/vllm/pull/38728)",
        quality="within a point of FP8 on nine benchmarks, Qwen3.6-27B with its MLPs in NVFP4 "
        "(https://huggingface.co/nvidia/Qwen3.6-27B-NVFP4)",
    ),
    Format(
        *("NVFP4 W4A4", 0.5 + 1 / 16, 2.0, (BLACKWELL,)),
        speed_source="the HGX B200's data sheet: 9 PFLOP/s per GPU without sparsity, twice FP8's",
        quality="no published figure with 4-bit activations is known to us; for W4A16: within a point of FP8 "
        "on nine benchmarks (https://huggingface.co/nvidia/Qwen3.6-27B-NVFP4)",
    ),
)
SPENSE_QUALITY = (
    "pruned in one shot; Qwen3-32B with SpenseGPT+, mean of four benchmarks: 70.8 at dense ratio 0.5, "
    "67.8 at 0.25, 71.7 dense (https://arxiv.org/abs/2606.10445)"
)


@dataclass(frozen=True)
class Alternative:
    """One format for this model: seconds of a decode and of a prefill step, speed-ups over dense FP8, and
    bytes of weights on each GPU. ``advised``: whether it can be what :func:`advice` says."""

    name: str
    decode_seconds: float
    prefill_seconds: float
    decode_speedup: float
    prefill_speedup: float
    weight_bytes: int
    eight_bit: bool
    speed_source: str
    quality: str
    advised: bool = True


def alternatives(
    model: ModelShape, gpu: Gpu, size: int, decode: Phase, prefill: Phase, dense_bytes: int, spense_bytes: int
) -> tuple[Alternative, ...]:
    """Spense in FP8, then with its MLPs in NF4, then every format that runs on this GPU.

    ``decode`` and ``prefill``: both models' steps on ``size`` GPUs. ``dense_bytes`` and ``spense_bytes``:
    weights on each of them, in dense FP8 and in Spense.
    """
    linears = sum(linear.count * linear.spec.dense_bytes for linear in model.rank(size))

    def row(
        name: str, step: float, chunk: float, weight_bytes: int, eight_bit: bool, source: str, quality: str
    ) -> Alternative:
        gains = decode.dense.total / step, prefill.dense.total / chunk
        return Alternative(name, step, chunk, *gains, weight_bytes, eight_bit, source, quality)

    rows = [
        row(
            *("Spense", decode.spense.total, prefill.spense.total, spense_bytes, True),
            *("the kernels' estimate, or a tuning table", SPENSE_QUALITY),
        )
    ]
    for f in FORMATS:
        if gpu.capability in f.capabilities:
            step, chunk = (step_seconds(f, model, gpu, size, phase) for phase in (decode, prefill))
            stored = dense_bytes - round((1 - f.weight_bytes) * linears)
            found = row(f.name, step, chunk, stored, f.weight_bytes == 1, f.speed_source, f.quality)
            rows.append(replace(found, advised=f is not NF4))
    formats = {linear.spec: in_nf4(linear.spec) for linear in model.rank(size)}
    step, chunk = (step_seconds(formats, model, gpu, size, phase) for phase in (decode, prefill))
    saved = sum(
        linear.count * (1 - formats[linear.spec].weight_bytes) * linear.spec.dense_bytes
        for linear in model.rank(size)
    )
    ours = row("Spense NF4", step, chunk, dense_bytes - round(saved), False, NF4.speed_source, NF4.quality)
    return (rows[0], replace(ours, advised=False), *rows[1:])


def in_nf4(spec: LinearSpec) -> Format:
    """NF4 for a layer with a 2:4 region, whose zeros take no code; FP8 for all others."""
    if not spec.hybrid:
        return FP8
    stored = LinearFormat(spec.stored.layout, Codecs.of("nf4"))
    return replace(NF4, weight_bytes=stored.nbytes() / (spec.out_features * spec.in_features))


def step_seconds(
    format: Format | Mapping[LinearSpec, Format], model: ModelShape, gpu: Gpu, size: int, phase: Phase
) -> float:
    """One step of ``phase`` with all linear layers in ``format``, or each in its own."""

    def ratio(spec: LinearSpec) -> float:
        own = format if isinstance(format, Format) else format[spec]
        return linear_ratio(own, spec, phase.tokens, gpu)

    linears = sum(
        linear.count * layer_time(linear.spec, phase.tokens, gpu).dense * ratio(linear.spec)
        for linear in model.rank(size)
    )
    return phase.dense.total - phase.dense.mlp - phase.dense.attention_linears + linears


def linear_ratio(format: Format, spec: LinearSpec, tokens: int, gpu: Gpu) -> float:
    """Time of a call in ``format`` by that in dense FP8: a launch, and the larger of bytes and operations."""
    weights = spec.out_features * spec.in_features

    def seconds(f: Format) -> float:
        moved = f.weight_bytes * weights / f.memory_share + tokens * (
            spec.in_features + 2 * spec.out_features
        )
        return max(moved / gpu.memory_rate, 2 * tokens * weights / (gpu.fp8_rate * f.speed)) + LAUNCH

    return seconds(format) / seconds(FP8)


def advice(rows: Sequence[Alternative]) -> str:
    """One plain sentence about what :func:`alternatives` found: what to take at decode, and at prefill."""
    rows = [row for row in rows if row.advised]
    ours = rows[0].decode_speedup
    decode = _choice([(row.name, row.decode_speedup) for row in rows])
    prefill = _choice([(row.name, row.prefill_speedup) for row in rows])
    text = f"Predicted: at decode {decode}; at prefill {prefill}"
    best = max(rows, key=lambda row: row.decode_speedup)
    if not best.eight_bit and round(ours, 2) >= PAYS:
        text += f"; where 4-bit weights lose too much, Spense is the better choice at decode ({_times(ours)})"
    return text + "."


def _choice(speedups: Sequence[tuple[str, float]]) -> str:
    """``speedups`` over dense FP8, Spense's first. Less than :data:`PAYS` between two is no difference."""
    (_, ours), others = speedups[0], speedups[1:]
    name, theirs = max(others, key=lambda item: item[1])
    if round(max(ours, theirs), 2) < PAYS:
        return f"stay with dense FP8: no format gains {PAYS:g}x (Spense {_times(ours)})"
    if round(theirs / ours, 2) >= PAYS:
        return f"{name} is the better choice ({_times(theirs)} against {_times(ours)} for Spense)"
    if round(ours / theirs, 2) >= PAYS:
        return f"Spense is the better choice ({_times(ours)} against {_times(theirs)} for {name})"
    return f"Spense and {name} are as good ({_times(ours)} and {_times(theirs)})"


def _times(speedup: float) -> str:
    return f"{speedup:.2f}x"
