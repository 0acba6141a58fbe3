"""Decode without an engine: the linear layers of 16 decoder layers, Spense against dense FP8.

usage: python -m benchmarks.kernels.decode_stack [--layers 16] [--tokens 1 32] [--budget S] [--results FILE]
       python -m benchmarks.kernels.decode_stack --rehearse   (a tiny stack, on CPUs too; they mean nothing)

Shapes of Qwen3-32B with random weights: RMSNorm, qkv and o, RMSNorm, gate_up, SiLU·mul, down, and dynamic FP8
quantisation of activations per token in front of each. Attention itself is left out: the queries stand for
its output. Between two attentions everything is one region of torch.compile, as in vLLM, so norms, SiLU·mul
and quantisation are fused; one CUDA graph holds all layers. Spense prunes the MLPs (dense ratio 0.5); the
projections of attention are the same dense FP8 in both. Dense: torch's FP8 product with scales per token and
channel, fast accumulation.

Nothing is timed before it is right: each kind of layer against its fp32 product, each compiled step against
the same on definitions, the graph against its steps. Then the graphs are replayed A B A B …; medians are
compared.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import silu

from benchmarks.common.markdown import table
from benchmarks.common.results import (
    RESULTS,
    ROOT,
    ClockLog,
    entry_of,
    fingerprint,
    kernel_sources,
    read,
    save_entry,
)
from benchmarks.kernels.shapes import LAYERS, MODELS, Model, layer_spec
from vllm_spense.ops import LinearArguments, LinearSpec, quantize_per_token, select_backend
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.random import random_layer
from vllm_spense.ops.linear.reference import reference_linear

TINY = Model("tiny", 256, 512, 4, 2, head_size=64)
RATIO = 0.5
MLP = ("gate_up", "down")
WRONG_LAYER, WRONG_DENSE, WRONG_STEP, WRONG_GRAPH = 1e-2, 5e-2, 0.1, 0.3
"""Relative errors. Torch's fast accumulation keeps 14 bits. Where fused code rounds to bf16 less often, some
FP8 values move by 6 to 12 %, and a step is off by 2 %. A graph should give the very bits of its steps."""
REPEATS = 50
Apply = Callable[[Tensors, torch.Tensor], torch.Tensor]
Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""A layer's tensors, norms, attention's output and residual to the next qkv and residual."""


class DenseFp8:
    """torch's dense FP8 product, with the two methods of a back end that a stack needs."""

    name = "scaled_mm"

    def prepare(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return {"weight": tensors["dense_weight"].t(), "weight_scale": tensors["weight_scale"][None]}

    def apply(self, spec: LinearSpec, tensors: Tensors, x: torch.Tensor, bias: None) -> torch.Tensor:
        xq, xs = quantize_per_token(x)
        scales = (xs, tensors["weight_scale"])
        return torch._scaled_mm(xq, tensors["weight"], *scales, out_dtype=x.dtype, use_fast_accum=True)


def backend_of(spec: LinearSpec, device: torch.device) -> Any:
    """What runs a layer; ``ValueError`` on a GPU that the Spense kernels do not run on."""
    if not spec.hybrid:
        return DenseFp8()
    return select_backend(spec, device, "cuda" if device.type == "cuda" else None)


def unit_layer(spec: LinearSpec, device: torch.device, seed: int) -> Tensors:
    """Random checkpoint tensors that keep the size of x about as it is, so that each layer counts."""
    tensors = random_layer(spec, device, seed)
    tensors["weight_scale"].fill_(spec.in_features**-0.5 / 64)
    return tensors


def definition(spec: LinearSpec, tensors: Tensors, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The layer on its checkpoint tensors: activations quantised, then an fp32 product."""
    return reference_linear(*quantize_per_token(x), LinearArguments.of(spec, tensors), dtype)


# --- the stack ----------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return scaled.to(x.dtype) * weight


def between_attentions(
    apply: Mapping[str, Apply],
    tensors: Mapping[str, Tensors],
    norms: torch.Tensor,
    attention: torch.Tensor,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """From attention's output to the next layer's queries, keys and values; the residual beside them."""
    residual = residual + apply["o"](tensors["o"], attention)
    gate, up = apply["gate_up"](tensors["gate_up"], rms_norm(residual, norms[0])).chunk(2, dim=-1)
    residual = residual + apply["down"](tensors["down"], silu(gate) * up)
    return apply["qkv"](tensors["qkv"], rms_norm(residual, norms[1])), residual


@dataclass
class Stack:
    """Layers of a model with random weights; those of attention may be another stack's."""

    model: Model
    specs: dict[str, LinearSpec]
    backends: dict[str, Any]
    layers: list[dict[str, Tensors]]
    norms: torch.Tensor

    @classmethod
    def make(
        cls, model: Model, ratio: float, layers: int, device: torch.device, beside: Stack | None = None
    ) -> Stack:
        """``ratio`` of each MLP is dense, attention all of it."""
        specs = {kind: layer_spec(model, kind, ratio if kind in MLP else 1.0) for kind in LAYERS}
        backends = {kind: backend_of(spec, device) for kind, spec in specs.items()}
        made = [
            {
                kind: beside.layers[i][kind]
                if beside and kind not in MLP
                else backends[kind].prepare(spec, unit_layer(spec, device, i))
                for kind, spec in specs.items()
            }
            for i in range(layers)
        ]
        return cls(model, specs, backends, made, torch.ones(2, model.hidden, device=device).bfloat16())

    def weight_bytes(self) -> int:
        """What one step reads."""
        return len(self.layers) * sum(spec.weight_bytes for spec in self.specs.values())

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first attention's output and the residual."""
        generator = torch.Generator(device=self.norms.device).manual_seed(0)
        widths = (self.specs["qkv"].out_features, self.model.hidden)
        draw = partial(torch.randn, generator=generator, device=self.norms.device)
        qkv, residual = (draw(tokens, width).bfloat16() for width in widths)
        return self._attention(qkv), residual

    def _attention(self, qkv: torch.Tensor) -> torch.Tensor:
        """What stands for its output: the queries, in the first layer too (one program for all of them)."""
        return qkv[:, : self.specs["o"].in_features]

    def run(self, step: Step, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """All layers, each by ``step``; the last residual."""
        attention, residual = x
        for tensors in self.layers:
            qkv, residual = step(tensors, self.norms, attention, residual)
            attention = self._attention(qkv)
        return residual

    def step(self, compiler: str | None) -> Step:
        """What :meth:`run` takes, compiled by a back end of torch.compile."""
        apply = {kind: self._apply(kind) for kind in self.specs}
        step = partial(between_attentions, apply)
        if compiler is None:
            return step
        return torch.compile(step, dynamic=False, fullgraph=True, backend=compiler)

    def _apply(self, kind: str) -> Apply:
        spec, backend = self.specs[kind], self.backends[kind]
        return lambda tensors, x: backend.apply(spec, tensors, x, None)

    def step_errors(self, step: Step, tokens: int) -> list[float]:
        """Relative error of each layer's step, on inputs that definitions with weights made anew give."""
        apply: dict[str, Apply] = {
            kind: partial(lambda spec, tensors, x: definition(spec, tensors, x, x.dtype), spec)
            for kind, spec in self.specs.items()
        }
        attention, residual = self.inputs(tokens)
        errors = []
        for i, layer in enumerate(self.layers):
            tensors = {kind: unit_layer(s, residual.device, i) for kind, s in self.specs.items()}
            want = between_attentions(apply, tensors, self.norms, attention, residual)
            found = step(layer, self.norms, attention, residual)
            added = [torch.cat([qkv, after - residual], 1) for qkv, after in (found, want)]
            errors.append(relative_error(*added))
            attention, residual = self._attention(want[0]), want[1]
        return errors

    def layer_errors(self, tokens: int) -> dict[str, float]:
        """Relative error of each kind of linear layer, in the first one of the stack."""
        found = {}
        for kind, spec in self.specs.items():
            device = self.norms.device
            generator = torch.Generator(device=device).manual_seed(1)
            x = torch.randn(tokens, spec.in_features, generator=generator, device=device).bfloat16()
            want = definition(spec, unit_layer(spec, device, 0), x, torch.float32)
            found[kind] = relative_error(self._apply(kind)(self.layers[0][kind], x), want)
        return found


def relative_error(found: torch.Tensor, want: torch.Tensor) -> float:
    want = want.float()
    return ((found.float() - want).norm() / want.norm()).item()


# --- measurement --------------------------------------------------------------------------------------------


def check(name: str, stack: Stack, step: Step, tokens: int, graph: torch.Tensor) -> dict[str, float]:
    """Relative errors by kind of layer, of the worst step and of the graph's result.

    ``ArithmeticError`` if one is too large.
    """
    limits = {kind: WRONG_LAYER if spec.hybrid else WRONG_DENSE for kind, spec in stack.specs.items()}
    limits |= {"step": WRONG_STEP, "graph": WRONG_GRAPH}
    errors = stack.layer_errors(tokens)
    errors["step"] = max(stack.step_errors(step, tokens), key=lambda e: (math.isnan(e), e))
    errors["graph"] = relative_error(graph, stack.run(step, stack.inputs(tokens)))
    for kind, error in errors.items():
        if not error <= limits[kind]:
            raise ArithmeticError(f"{name}, {tokens} tokens: {kind} has a relative error of {error:.2e}")
    return errors


def captured(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """The call as a CUDA graph, and where its result lies."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, result


def in_turn(calls: Mapping[str, Callable[[], object]], repeats: int, on_gpu: bool) -> dict[str, list[float]]:
    """Microseconds of each call, A B A B …; the first round warms up. A GPU never waits for Python."""
    marks = []
    for _ in range(repeats + 1):
        for call in calls.values():
            marks.append(mark(on_gpu))
            call()
    marks.append(mark(on_gpu))
    if on_gpu:
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) * 1e3 for a, b in pairwise(marks)]
    else:
        times = [(b - a) * 1e6 for a, b in pairwise(marks)]
    return {name: [round(t, 2) for t in times[i :: len(calls)][1:]] for i, name in enumerate(calls)}


def mark(on_gpu: bool) -> Any:
    """A point in time; on a GPU in its stream."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@torch.no_grad()
def measure(stacks: Mapping[str, Stack], tokens: int, repeats: int, compiler: str) -> dict[str, Any]:
    """Both stacks checked, then timed in turn."""
    on_gpu = next(iter(stacks.values())).norms.is_cuda
    torch.compiler.reset()  # few programs of one function are kept
    calls, errors, alive = {}, {}, []
    for name, stack in stacks.items():
        step = stack.step(compiler)
        call = partial(stack.run, step, stack.inputs(tokens))
        alive.append(call)  # a graph reads the inputs where they lie
        calls[name], result = captured(call) if on_gpu else (call, call())
        errors[name] = check(name, stack, step, tokens, result)
    with ClockLog() as log:
        times = in_turn(calls, repeats, on_gpu)
        clock = log.lowest_sm_mhz
    ratios = [a / b for a, b in zip(times["dense"], times["spense"], strict=True)]
    return {
        "us": {name: median(found) for name, found in times.items()},
        "turns_us": times,
        "speed_up": median(times["dense"]) / median(times["spense"]),
        "speed_up_range": [min(ratios), max(ratios)],
        "relative_errors": errors,
        "weight_bytes": {name: stack.weight_bytes() for name, stack in stacks.items()},
        "backends": {name: {k: b.name for k, b in stack.backends.items()} for name, stack in stacks.items()},
        "layers": len(stacks["dense"].layers),
        "dense_ratio": RATIO,
        "tokens": tokens,
        "compiler": compiler,
        "cuda_graph": on_gpu,
        "lowest_sm_mhz": clock,
    }


def report_lines(stacks: Mapping[str, dict[str, Any]]) -> list[str]:
    """A table of the results."""
    head = [
        "stack",
        "tokens",
        "dense µs",
        "Spense µs",
        "speed-up (range)",
        "weights, GB",
        "dense, Spense TB/s",
    ]
    rows = []
    for key, entry in stacks.items():
        us, size, (low, high) = entry["us"], entry["weight_bytes"], entry["speed_up_range"]
        names = ("dense", "spense")
        rates = [f"{size[name] / us[name] / 1e6:.2f}" for name in names]
        rows.append(
            [
                *(key.rpartition("/")[0], str(entry["tokens"]), *(f"{us[name]:,.1f}" for name in names)),
                f"{entry['speed_up']:.3f}× ({low:.3f} … {high:.3f})",
                " → ".join(f"{size[name] / 1e9:.2f}" for name in names),
                ", ".join(rates),
            ]
        )
    return [table(head, rows)]


def sources() -> str:
    """What the figures depend on."""
    return f"{fingerprint([ROOT / 'vllm_spense' / 'ops', Path(__file__)])}/{kernel_sources()}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of A B")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/gpu/decode_stack.json")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--compiler", help="of torch.compile (default: inductor; rehearsals: aot_eager)")
    options = parser.parse_args(arguments)
    if min(options.layers, options.repeats, *options.tokens) < 1:
        parser.error("--layers, --repeats and --tokens must be at least 1")
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("timing needs a CUDA device; --rehearse runs a tiny stack anywhere")
    model = TINY if options.rehearse else MODELS[0]
    results = options.results or (ROOT / "build" if options.rehearse else RESULTS) / "decode_stack.json"
    compiler = options.compiler or ("aot_eager" if options.rehearse else "inductor")
    end, longest = time.monotonic() + options.budget, 0.0
    prefix, known = f"{model.name}/{options.layers}/{RATIO:g}", sources()
    left = [n for n in options.tokens if not entry_of(results, "stacks", f"{prefix}/{n}", known)]
    stacks: dict[str, Stack] = {}
    while left and time.monotonic() + longest < end:
        if not stacks:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            try:
                stacks["dense"] = Stack.make(model, 1.0, options.layers, device)
                stacks["spense"] = Stack.make(model, RATIO, options.layers, device, beside=stacks["dense"])
            except ValueError as error:
                raise SystemExit(f"nothing to time: {error}") from None
        began, tokens = time.monotonic(), left.pop(0)
        try:
            entry = measure(stacks, tokens, options.repeats, compiler)
        except ArithmeticError as error:
            raise SystemExit(f"wrong result, nothing is timed: {error}") from None
        save_entry(results, "stacks", f"{prefix}/{tokens}", {"sources": known} | entry)
        longest = max(longest, time.monotonic() - began)
        print(f"{prefix}/{tokens}: {entry['speed_up']:.3f} times dense, {longest:.0f} s", flush=True)
    print("\n".join(report_lines(read(results).get("stacks", {}))))
    print(f"{len(left)} numbers of tokens left")


if __name__ == "__main__":
    main()
