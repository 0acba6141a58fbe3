"""How fast are activation-sparse MLPs on this GPU, beside the dense ones?

usage: python -m benchmarks.kernels.sparse_mlp [--model NAME …] [--tokens N …] [--budget S] [--results FILE]

A gated MLP with a threshold above which a share of the gates lies: gate in bf16 and then our compiled
kernels, our Triton kernels, or whole matrices (what :mod:`vllm_spense.ops.mlp.many_tokens` takes for many
tokens), gate in FP8 whose kernel packs, and beside them the dense MLP in bf16 as vLLM fuses it and the gate
alone, which bounds them all. Rows are read one by one at any number of tokens here: these rows are what the
border between few and many tokens is to be fitted to. Median µs of CUDA graph replays; weights come from
memory, for copies take turns. Rows of the same sources are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear, relu

from benchmarks.kernels import points
from benchmarks.kernels.points import Calls, Point, sources_of, times_of
from vllm_spense.ops import LinearArguments, LinearSpec, quantize_per_token
from vllm_spense.ops.linear.cuda import CudaBackend
from vllm_spense.ops.linear.random import random_layer
from vllm_spense.ops.linear.timing import ROTATE_BYTES
from vllm_spense.ops.mlp import packed_gate, sparse_mlp_cuda
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.many_tokens import dense_mlp, shape_for
from vllm_spense.ops.mlp.sparse_mlp import SparseMlpSpec, sparse_mlp_definition
from vllm_spense.ops.mlp.twell import TwellShape

SIZES = {"SparseLM-2B": (2048, 5632), "Llama-2-7B": (4096, 11008)}
"""Hidden size and neurons."""
DENSITIES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5)
TOKENS = (1, 2, 4, 8, 16, 32, 64)
WRONG = 2e-2


class Weights(NamedTuple):
    """One copy of an MLP, whose gate is in bf16 and, other weights, in FP8."""

    gate: torch.Tensor
    up: torch.Tensor
    down_t: torch.Tensor
    packed: LinearArguments

    @classmethod
    def random(cls, hidden: int, neurons: int, device: torch.device, seed: int) -> Weights:
        def normal() -> torch.Tensor:
            return torch.randn(neurons, hidden, device=device, dtype=torch.bfloat16) * hidden**-0.5

        spec = LinearSpec("output", neurons, hidden, (0,), (neurons,))
        ready = CudaBackend().prepare(spec, random_layer(spec, device, seed))
        return cls(normal(), normal(), normal(), LinearArguments.of(spec, ready, layout="blocked"))


class Mlps:
    """Rotating copies of an MLP at one density, and what runs on them."""

    def __init__(self, hidden: int, neurons: int, device: torch.device) -> None:
        count = max(2, -(-ROTATE_BYTES // (6 * hidden * neurons)))
        self.copies = [Weights.random(hidden, neurons, device, seed) for seed in range(count)]
        self.x = torch.randn(max(TOKENS), hidden, device=device).bfloat16()
        self.spec = SparseMlpSpec(hidden, neurons, hidden, Activation("relu"))

    def threshold(self, gate: torch.Tensor, density: float) -> Activation:
        """An activation that lets this share of the gate through."""
        return Activation("fatrelu", max(0.0, float(gate.float().flatten().quantile(1 - density))))

    def parts(self, tokens: int, density: float) -> dict[str, Callable[[], Calls]]:
        x = self.x[:tokens]
        shape = shape_for(self.spec.neurons, density)
        packs = TwellShape(shape.hidden, packed_gate.TILE, shape.share)
        activation = self.threshold(linear(x, self.copies[0].gate), density)
        return {
            "bf16": lambda: [partial(dense, x, w, torch.cat((w.gate, w.up))) for w in self.copies],
            "gate": lambda: [partial(linear, x, w.gate) for w in self.copies],
            "cuda": partial(self.ours, compiled, x, activation, shape),
            "triton": partial(self.ours, triton, x, activation, shape),
            "matrices": partial(self.ours, matrices, x, activation, shape),
            "fp8 gate, packed": partial(self.packed, x, density, packs),
        }

    def ours(
        self, run: Callable[..., torch.Tensor], x: torch.Tensor, activation: Activation, shape: TwellShape
    ) -> Calls:
        """``ValueError`` where it is wrong: a fast wrong kernel must not make a row."""
        w = self.copies[0]
        expected = sparse_mlp_definition(x.float(), linear(x, w.gate), w.up, w.down_t, None, None, activation)
        check(run(x, w, activation, shape), expected)
        return [partial(run, x, w, activation, shape) for w in self.copies]

    def packed(self, x: torch.Tensor, density: float, shape: TwellShape) -> Calls:
        from vllm_spense.ops.linear.op import linear as spense_linear

        w, quantised = self.copies[0], quantize_per_token(x)
        if reason := packed_gate.why_not(w.packed, x.device):
            raise ValueError(reason)
        gate = spense_linear(*quantised, w.packed, torch.bfloat16)
        activation = self.threshold(gate, density)
        expected = sparse_mlp_definition(x.float(), gate, w.up, w.down_t, None, None, activation)

        def run(w: Weights) -> torch.Tensor:
            given = packed_gate.linear_twell(*quantised, w.packed, activation, shape.share)
            return sparse_mlp_cuda.multiply_packed(x, *given, w.up, w.down_t, None, None, activation, shape)

        check(run(w), expected)
        return [partial(run, w) for w in self.copies]


def dense(x: torch.Tensor, w: Weights, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return (relu(gate) * up) @ w.down_t


def compiled(x: torch.Tensor, w: Weights, activation: Activation, shape: TwellShape) -> torch.Tensor:
    gate = linear(x, w.gate)
    words = sparse_mlp_cuda.packed(gate, shape, activation.threshold, 0)
    return sparse_mlp_cuda.multiply_packed(x, words, gate, w.up, w.down_t, None, None, activation, shape)


def triton(x: torch.Tensor, w: Weights, activation: Activation, shape: TwellShape) -> torch.Tensor:
    from vllm_spense.ops.mlp.sparse_mlp_triton_kernel import multiply

    return multiply(x, linear(x, w.gate), w.up, w.down_t, None, None, activation, shape)


def matrices(x: torch.Tensor, w: Weights, activation: Activation, shape: TwellShape) -> torch.Tensor:
    return dense_mlp(x, linear(x, w.gate), w.up, w.down_t, None, None, activation)


def check(y: torch.Tensor, expected: torch.Tensor) -> None:
    error = (y.float() - expected.float()).norm() / expected.float().norm()
    if not error <= WRONG:
        raise ValueError(f"wrong result: relative error {error:.2e}")


def measure(mlps: Mlps, tokens: int, density: float) -> dict[str, Any]:
    """µs by name, or why there are none."""
    return times_of(mlps.parts(tokens, density))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = points.parser(__doc__, TOKENS, "sparse_mlp.json")
    parser.add_argument("--model", nargs="+", default=list(SIZES), choices=list(SIZES))
    options = points.parse(parser, arguments, max(TOKENS))
    device = torch.device("cuda")
    wanted = (
        Point(f"{model}/{tokens}/{density:g}", model, (tokens, density))
        for model in options.model
        for tokens in options.tokens
        for density in DENSITIES
    )
    points.run(wanted, lambda name: Mlps(*SIZES[name], device), measure, options, sources_of(__file__))


if __name__ == "__main__":
    main()
