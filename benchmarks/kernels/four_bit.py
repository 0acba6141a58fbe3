"""How fast are layers in NF4 on this GPU, beside bitsandbytes and beside bf16?

usage: python -m benchmarks.kernels.four_bit [--model NAME] [--tokens N …] [--budget S] [--results FILE]

Dense layers of one model: our compiled kernels with both ways to look codes up, our Triton kernel, what each
takes for the matrix alone, bitsandbytes' `matmul_4bit` where that is installed (fused from 0.50 on), and
torch's bf16 product. Median µs of CUDA graph replays; weights come from memory, for copies take turns.
Rows of the same sources are kept.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from benchmarks.kernels import points
from benchmarks.kernels.points import Calls, Point, sources_of, times_of
from benchmarks.kernels.shapes import MODELS, Model
from vllm_spense.format.linear import Codecs
from vllm_spense.ops import LinearSpec
from vllm_spense.ops.backend import Backend
from vllm_spense.ops.linear.four_bit import FourBitLayer, prepared
from vllm_spense.ops.linear.four_bit_cuda import FourBitCudaBackend, dequantised
from vllm_spense.ops.linear.four_bit_triton import FourBitTritonBackend
from vllm_spense.ops.linear.random import random_layer
from vllm_spense.ops.linear.reference import decoded
from vllm_spense.ops.linear.timing import ROTATE_BYTES

TOKENS = (1, 4, 8, 16, 32, 64, 128, 512)
WRONG = 1e-2
OURS: dict[str, Backend[LinearSpec]] = {
    "cuda, shuffle": FourBitCudaBackend(),
    "cuda, shared": FourBitCudaBackend(shuffle=False),
    "triton": FourBitTritonBackend(),
}


def dense_spec(model: Model, layer: str) -> LinearSpec:
    """A linear layer as bitsandbytes' checkpoints have it, fused as vLLM fuses it."""
    _, shards, columns = model.layers()[layer]
    return LinearSpec("output", sum(shards), columns, (0,) * len(shards), shards, Codecs.of("nf4"))


class Layer:
    """Rotating copies of one layer, and what runs on them."""

    def __init__(self, spec: LinearSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        count = max(2, -(-ROTATE_BYTES // spec.weight_bytes))
        self.copies = [random_layer(spec, device, seed) for seed in range(count)]
        self.x = torch.randn(max(TOKENS), spec.in_features, device=device).bfloat16()

    def ours(self, backend: Backend[LinearSpec], tokens: int) -> Calls:
        """``ValueError`` where it cannot run or is wrong: a fast wrong kernel must not make a row."""
        spec, x = self.spec, self.x[:tokens]
        if reason := backend.why_not(spec, self.device):
            raise ValueError(reason)
        ready = [backend.prepare(spec, copy) for copy in self.copies]
        expected = x.float() @ decoded(spec, self.copies[0]).T
        error = (backend.apply(spec, ready[0], x, None).float() - expected).norm() / expected.norm()
        if not error <= WRONG:
            raise ValueError(f"wrong result: relative error {error:.2e}")
        return [partial(backend.apply, spec, each, x, None) for each in ready]

    def matrices(self, write: Callable[[FourBitLayer, int, torch.dtype], object]) -> Calls:
        layers = [FourBitLayer.of(self.spec, prepared(self.spec, copy)) for copy in self.copies]
        return [partial(write, layer, self.spec.in_features, torch.bfloat16) for layer in layers]

    def triton_matrices(self) -> Calls:
        from vllm_spense.ops.linear.four_bit_triton_kernel import dequantise

        return self.matrices(dequantise)

    def bitsandbytes(self, tokens: int) -> Calls:
        import bitsandbytes
        from bitsandbytes.functional import quantize_4bit

        shape = (self.spec.out_features, self.spec.in_features)
        calls: Calls = []
        for _ in self.copies:
            weight = torch.randn(shape, device=self.device, dtype=torch.bfloat16)
            packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
            calls.append(partial(bitsandbytes.matmul_4bit, self.x[:tokens], packed.t(), quant_state=state))
        return calls

    def bf16(self, tokens: int) -> Calls:
        shape = (self.spec.out_features, self.spec.in_features)
        count = max(2, -(-ROTATE_BYTES // (2 * shape[0] * shape[1])))
        weights = [torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(count)]
        return [partial(functional.linear, self.x[:tokens], weight) for weight in weights]


def measure(layer: Layer, tokens: int) -> dict[str, Any]:
    """µs by name, or why there are none; 0 tokens: of the matrix alone."""
    parts: dict[str, Callable[[], Calls]]
    if tokens:
        parts = {name: partial(layer.ours, backend, tokens) for name, backend in OURS.items()}
        parts["bf16"] = partial(layer.bf16, tokens)
        if importlib.util.find_spec("bitsandbytes"):
            parts["bitsandbytes"] = partial(layer.bitsandbytes, tokens)
    else:
        parts = {
            "cuda, shuffle": partial(layer.matrices, dequantised),
            "cuda, shared": partial(layer.matrices, partial(dequantised, shuffle=False)),
            "triton": layer.triton_matrices,
        }
    return times_of(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = points.parser(__doc__, TOKENS, "four_bit.json")
    parser.add_argument("--model", default="Llama-3.1-8B", choices=[model.name for model in MODELS])
    options = points.parse(parser, arguments, max(TOKENS))
    device = torch.device("cuda")
    model = next(model for model in MODELS if model.name == options.model)
    wanted = (
        Point(f"{model.name}/{layer}/{tokens or 'matrix'}", layer, (tokens,))
        for layer in model.layers()
        for tokens in (*options.tokens, 0)
    )
    points.run(
        wanted, lambda name: Layer(dense_spec(model, name), device), measure, options, sources_of(__file__)
    )


if __name__ == "__main__":
    main()
