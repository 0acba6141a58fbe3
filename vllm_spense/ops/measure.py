"""Timing of layers on CUDA devices: CUDA graphs over rotating copies, so that weights come from memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from vllm_spense.format.codecs.fp8 import FP8_DTYPE
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.cuda_backend import CudaBackend
from vllm_spense.ops.cuda_linear import run
from vllm_spense.ops.kernel_config import KernelConfig
from vllm_spense.ops.quantize import quantize_per_token
from vllm_spense.ops.random_weights import fill_random
from vllm_spense.ops.spec import LinearSpec

ROTATE_BYTES = 400_000_000
"""Weights touched between two uses of one copy: several times the L2 of any current device."""


def random_layer(spec: LinearSpec, device: torch.device, seed: int = 0) -> Tensors:
    """Checkpoint tensors of an FP8 layer with valid random contents."""
    (sparse_rows, sparse_columns), dense = spec.sparse_shape, spec.dense_shape
    tensors = {
        "sparse_values": torch.empty(sparse_rows, sparse_columns // 2, dtype=FP8_DTYPE, device=device),
        "sparse_meta": torch.empty(sparse_rows, sparse_columns // 8, dtype=torch.uint8, device=device),
        "dense_weight": torch.empty(dense, dtype=FP8_DTYPE, device=device),
        "weight_scale": torch.empty(spec.out_features, device=device),
    }
    fill_random(tensors, None, seed)
    return tensors


def time_graph(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median µs of one call; the calls take turns in one CUDA graph that is replayed ``repeats`` times."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events) * 1e3 / len(calls)


@dataclass
class TimedLayer:
    """Rotating copies of one random layer, prepared for the CUDA kernels."""

    spec: LinearSpec
    copies: list[Tensors]

    @classmethod
    def make(cls, spec: LinearSpec, device: torch.device) -> TimedLayer:
        count = max(2, -(-ROTATE_BYTES // spec.weight_bytes))
        backend = CudaBackend()
        return cls(spec, [backend.prepare(spec, random_layer(spec, device, i)) for i in range(count)])

    def inputs(self, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantised random activations and their scales."""
        device = self.copies[0]["weight_scale"].device
        generator = torch.Generator(device=device).manual_seed(seed)
        x = torch.randn(tokens, self.spec.in_features, generator=generator, device=device)
        return quantize_per_token(x.bfloat16())

    def calls(self, config: KernelConfig, tokens: int) -> list[Callable[[], object]]:
        """One call per copy, each with its own output."""
        xq, xs = self.inputs(tokens)
        spec = self.spec
        calls: list[Callable[[], object]] = []
        for tensors in self.copies:
            y = torch.empty(tokens, spec.out_features, dtype=torch.bfloat16, device=xq.device)
            arguments = (
                *(config, xq, xs, tensors["sparse_values"], tensors["sparse_meta"]),
                *(tensors["weight_packed"], tensors["weight_scale"], None),
                *(list(spec.sparse_sizes), list(spec.dense_sizes), spec.split == "output", y),
            )
            calls.append(partial(run, *arguments))
        return calls


def dense_calls(
    spec: LinearSpec, tokens: int, device: torch.device, fast: bool = True
) -> list[Callable[[], object]]:
    """torch's row-wise scaled FP8 GEMM on a dense matrix of the layer's size, rotating like the layer."""
    count = max(2, -(-ROTATE_BYTES // (spec.out_features * spec.in_features)))
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(tokens, spec.in_features, generator=generator, device=device)
    xq, xs = quantize_per_token(x.bfloat16())
    scale = torch.full((1, spec.out_features), 1e-4, device=device)
    calls: list[Callable[[], object]] = []
    for _ in range(count):
        shape = (spec.out_features, spec.in_features)
        weight = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        w = (weight * 64).clamp(-448, 448).to(FP8_DTYPE)
        calls.append(
            partial(torch._scaled_mm, xq, w.t(), xs, scale, out_dtype=torch.bfloat16, use_fast_accum=fast)
        )
    return calls
