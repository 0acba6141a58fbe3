"""``spense plan``: does Spense pay for this model on this GPU, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_spense.devices import ATTAINABLE, MEMORY_RATE, TENSOR_SHARE, Gpu, find_gpu
from vllm_spense.planning.alternatives import Alternative, advice, alternatives
from vllm_spense.planning.shapes import ModelShape, read_model
from vllm_spense.planning.step import (
    KV_BYTES,
    PAYS,
    SMALL_KERNEL_SECONDS,
    STEP_SECONDS,
    KvDtype,
    Phase,
    compressed,
    decode,
    prefill,
)

BATCHES = (1, 8, 32, 128, 256)
GPU_MEMORY_UTILIZATION = 0.92
"""vLLM's default (0.32)."""
MAX_CONTEXT = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU, and the tokens of KV cache that the rest of its memory holds, over all GPUs.

    Activations and CUDA graphs take some of it from both models; a negative count means that the weights
    alone do not fit.
    """

    dense_bytes: int
    spense_bytes: int
    kv_bytes_per_token: int
    dense_kv_tokens: int
    spense_kv_tokens: int

    @property
    def saved(self) -> float:
        return 1 - self.spense_bytes / self.dense_bytes


@dataclass(frozen=True)
class Prediction:
    """What :func:`plan` found. ``pays_up_to``: largest power of two of context with a decode gain at this
    batch; None where there is none."""

    model: ModelShape
    gpu: Gpu
    tensor_parallel: int
    batch: int
    context: int
    kv_dtype: KvDtype
    decode: Phase
    prefill: Phase
    memory: Memory
    batches: dict[int, Phase]
    alternatives: tuple[Alternative, ...]
    pays_up_to: int | None
    notes: tuple[str, ...]

    @property
    def source(self) -> str:
        """Where the times of the layers with a 2:4 region come from, in words."""
        known = [f"{p.measured} of {p.hybrid} at {name}" for name, p in self._phases() if p.measured]
        if not known:
            return "kernel times are estimates: nothing has been measured on this GPU for these layers"
        return f"kernel times measured for {', '.join(known)}; the others, and all else, are estimates"

    @property
    def verdict(self) -> str:
        """One line: whether Spense pays here."""
        decode, prefill = self.decode.speedup, self.prefill.speedup
        how = "predicted"
        if self.decode.measured or self.prefill.measured:
            how = "predicted, in part from measured kernels"
        gains = f"{decode:.2f}x decode, {prefill:.2f}x prefill ({how})"
        pays = {
            (True, True): "pays",
            (True, False): "pays at decode only",
            (False, True): "pays at prefill only",
            (False, False): "does not pay",
        }[pays_off(self.decode), pays_off(self.prefill)]
        if self.pays_up_to is None:
            limit = f"; decode gains less than {PAYS:g}x at any context"
        elif self.pays_up_to < MAX_CONTEXT:
            limit = f"; at this batch decode gains {PAYS:g}x up to a context of {self.pays_up_to}"
        else:
            limit = ""
        return f"Spense {pays}: {gains} at batch {self.batch}, context {self.context}{limit}"

    @property
    def advice(self) -> str:
        """One sentence: Spense or another format, at decode and at prefill."""
        return advice(self.alternatives)

    def _phases(self) -> tuple[tuple[str, Phase], ...]:
        return ("decode", self.decode), ("prefill", self.prefill)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds, tokens/s and bytes."""
        memory = {**asdict(self.memory), "saved": self.memory.saved}
        return {
            "model": self.model.name,
            "gpu": self.gpu.name,
            "tensor_parallel": self.tensor_parallel,
            "dense_ratio": self.model.mlp_dense_ratio(),
            "batch": self.batch,
            "context": self.context,
            "kv_dtype": self.kv_dtype,
            "decode": _phase_dict(self.decode),
            "prefill": _phase_dict(self.prefill),
            "memory": memory,
            "batches": {str(batch): _phase_dict(phase) for batch, phase in self.batches.items()},
            "alternatives": [asdict(row) for row in self.alternatives],
            "pays_up_to_context": self.pays_up_to,
            "source": self.source,
            "notes": list(self.notes),
            "verdict": self.verdict,
            "advice": self.advice,
        }


def pays_off(phase: Phase) -> bool:
    """Whether the gain, as it is printed, is worth the name."""
    return round(phase.speedup, 2) >= PAYS


def plan(
    model: str | Path | ModelShape,
    gpu: str = "H200",
    *,
    batch: int = 32,
    context: int = 4096,
    prefill_tokens: int = 8192,
    dense_ratio: float | None = None,
    kv_dtype: KvDtype = "bf16",
    tensor_parallel: int = 1,
    batches: Sequence[int] = BATCHES,
) -> Prediction:
    """Predict speed-up and memory of ``model`` (directory, preset or shape) in FP8, Spense against dense.

    Raises ``ValueError`` (:class:`CheckpointError` for what config.json holds) in one clear line.
    """
    for name, value in (("batch", batch), ("context", context), ("prefill", prefill_tokens)):
        if not 1 <= value <= MAX_CONTEXT:
            raise ValueError(f"{name} must lie in 1..{MAX_CONTEXT}, not {value}")
    if tensor_parallel < 1 or kv_dtype not in KV_BYTES:
        raise ValueError(f"no tensor-parallel size {tensor_parallel} with a KV cache in {kv_dtype!r}")
    shape = model if isinstance(model, ModelShape) else read_model(model, dense_ratio)
    found, size = find_gpu(gpu), tensor_parallel

    def phase(batch: int, context: int) -> Phase:
        return decode(shape, found, size, batch, context, kv_dtype)

    contexts = [1 << i for i in range(MAX_CONTEXT.bit_length())]
    pays = [c for c in contexts if pays_off(phase(batch, c))]
    memory = memory_of(shape, found, size, kv_dtype)
    step, chunk = phase(batch, context), prefill(shape, found, size, prefill_tokens)
    return Prediction(
        model=shape,
        gpu=found,
        tensor_parallel=size,
        batch=batch,
        context=context,
        kv_dtype=kv_dtype,
        decode=step,
        prefill=chunk,
        memory=memory,
        batches={b: phase(b, context) for b in sorted({*batches, batch})},
        alternatives=alternatives(
            *(shape, found, size, step, chunk, memory.dense_bytes, memory.spense_bytes)
        ),
        pays_up_to=max(pays, default=None),
        notes=(*shape.notes, *_notes(shape, found, size, memory, batch * context)),
    )


def memory_of(model: ModelShape, gpu: Gpu, size: int, kv_dtype: KvDtype) -> Memory:
    """Weights and KV cache: FP8 linears with fp32 scales, bf16 embeddings, head and routed experts.

    Norms and biases are left out. Layers that our kernels do not run are in memory as dense FP8.
    """
    fixed = (1 if model.tied else 2) * 2 * model.vocabulary * model.hidden // size
    if (e := model.experts) is not None:
        fixed += e.layers * e.count * 3 * 2 * model.hidden * e.intermediate // size
    dense = spense = fixed
    for linear in model.rank(size):
        spec, scales = linear.spec, 4 * linear.spec.out_features
        dense += linear.count * (spec.dense_bytes + scales)
        stored = spec.weight_bytes if compressed(spec, gpu) else spec.dense_bytes
        spense += linear.count * (stored + scales)
    per_token = 2 * model.layers * (model.kv_heads // size) * model.head_size * KV_BYTES[kv_dtype]
    room = int(GPU_MEMORY_UTILIZATION * gpu.memory_bytes)
    return Memory(
        dense_bytes=dense,
        spense_bytes=spense,
        kv_bytes_per_token=per_token,
        dense_kv_tokens=(room - dense) // per_token,
        spense_kv_tokens=(room - spense) // per_token,
    )


def _notes(model: ModelShape, gpu: Gpu, size: int, memory: Memory, wanted: int) -> list[str]:
    notes = []
    if not gpu.fused:
        notes.append(
            f"{gpu.name}: one CUTLASS GEMM per region, predicted from bytes, operations and launches; the "
            "estimate of the fused Hopper kernel does not apply, so these figures are the roughest"
        )
    elif gpu.memory_rate < MEMORY_RATE * (1 - 1e-9):
        notes.append(
            f"{gpu.name}: the estimate of an H200, which has the same multiprocessors, held back by "
            f"{gpu.memory_sheet_rate / 1e12:g} TB/s of memory"
        )
    left_dense = sum(x.count for x in model.rank(size) if x.spec.hybrid and not compressed(x.spec, gpu))
    if left_dense:
        notes.append(
            f"{left_dense} linear layers with a 2:4 region run as dense FP8 (their columns do not fit the "
            "kernels, or dense was measured faster)"
        )
    if model.experts is not None:
        notes.append(
            "routed experts count as bf16 in every format, as they are in Spense; the others quantise them "
            "too, so for this model they gain more than is shown"
        )
    for name, tokens in (("dense FP8", memory.dense_kv_tokens), ("Spense", memory.spense_kv_tokens)):
        if tokens < 0:
            notes.append(f"the {name} weights do not fit {size} × {gpu.name}")
        elif tokens < wanted:
            notes.append(
                f"{name}: {wanted} tokens of KV cache are asked for, {tokens} fit; a smaller batch would run"
            )
    notes.append(
        f"assumed: {ATTAINABLE:.0%} of the data sheet's memory rate, {TENSOR_SHARE:.0%} of its tensor-core "
        f"rate, {SMALL_KERNEL_SECONDS * 1e6:g} µs per small kernel, {STEP_SECONDS * 1e3:g} ms per step"
    )
    return notes


def _phase_dict(phase: Phase) -> dict[str, Any]:
    return {
        **asdict(phase),
        "dense_seconds": phase.dense.total,
        "spense_seconds": phase.spense.total,
        "dense_tokens_per_s": phase.dense_tokens_per_s,
        "spense_tokens_per_s": phase.spense_tokens_per_s,
        "speedup": phase.speedup,
        "mlp_share": phase.mlp_share,
    }
