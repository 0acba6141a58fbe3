"""First light: small layers whose results are known to the last bit, one family of cases per risk.

x and weights are small integers and scales are powers of two, so that every sum is exact in any order and in
the few mantissa bits of FP8 tensor cores; one-hot tokens read the matrix back that a kernel really multiplies
with. Only repeats and chains use ordinary numbers, and compare a kernel with itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vllm_spense.format.codecs.fp8 import FP8_DTYPE
from vllm_spense.format.linear import UNIFORM_FP8
from vllm_spense.ops.backend import Tensors, decompressed
from vllm_spense.ops.kernel_config import DECODE_TOKENS, PREFILL_TOKENS, KernelConfig, label
from vllm_spense.ops.quantize import quantize_per_token
from vllm_spense.ops.random_weights import fill_random
from vllm_spense.ops.repack import block_metadata, pad_pitch
from vllm_spense.ops.spec import LinearSpec

FAMILIES = {
    "F0": "clusters that run at once, by instance",
    "F1": "one-hot tokens, 2:4 weights 128x256",
    "F2": "one-hot tokens, dense weights 128x256",
    "F3": "5120 columns, and tiny shapes with 1 to 128 tokens",
    "F4": "output and input split with a seam at 1120",
    "F5": "split K over 2, 4 and 8 CTAs on 400 tiles",
    "F6": "multicast over 1, 2 and 4 CTAs",
    "F7": "capture without warm-up, six layers in a graph",
    "F8": "ragged sizes between canaries",
}
CORE = ("F1", "F2", "F3", "F4")
"""If one of these is wrong, nothing behind it means anything."""
ALONE = ("F7",)
"""Wants a process that has launched nothing yet."""
REPEATS = 12  # 2 without a GPU
CLOSE = 1e-2  # of two orders of summation, relative
GUARD = 64


class Machine(Protocol):
    """What runs the kernel: a GPU, or a stand-in for it."""

    device: torch.device

    def clusters(self, config: KernelConfig) -> int:
        """How many clusters run at once."""

    def run(self, config: KernelConfig, *arguments: Any, overlap: bool = True) -> None:
        """As ``vllm_spense.ops.cuda_linear.run``."""

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a graph to replay."""

    def synchronize(self) -> None: ...


def output_layer(columns: int, *shards: tuple[int, int]) -> LinearSpec:
    """(2:4 rows, dense rows) of each shard."""
    sparse, dense = (tuple(shard[i] for shard in shards) for i in range(2))
    return LinearSpec("output", sum(sparse) + sum(dense), columns, sparse, dense, UNIFORM_FP8)


def input_layer(rows: int, sparse: int, dense: int) -> LinearSpec:
    return LinearSpec("input", rows, sparse + dense, (sparse,), (dense,), UNIFORM_FP8)


LAYERS = {
    "sparse128": output_layer(256, (128, 0)),
    "dense128": output_layer(256, (0, 128)),
    "sparse256": output_layer(512, (256, 0)),
    "dense256": output_layer(512, (0, 256)),
    "deep-sparse": output_layer(5120, (1024, 0)),
    "deep-dense": output_layer(5120, (0, 1024)),
    "tiny16": output_layer(16, (8, 8)),
    "tiny400": output_layer(400, (40, 24)),
    "rows": output_layer(2048, (1120, 928)),
    "columns": input_layer(512, 1120, 928),
    "tiles": output_layer(1024, (8448, 4352), (8448, 4352)),
    "chain-rows": output_layer(2048, (1400, 648)),
    "chain-columns": input_layer(2048, 1120, 928),
    "ragged-rows": output_layer(1936, (400, 377)),
    "ragged-columns": input_layer(777, 1120, 816),
}
REDUCED = {
    "deep-sparse": output_layer(5120, (64, 0)),
    "deep-dense": output_layer(5120, (0, 64)),
    "columns": input_layer(128, 1120, 928),
    "rows": output_layer(512, (112, 80)),
    "tiles": output_layer(256, (200, 100), (200, 100)),
    "chain-rows": output_layer(256, (140, 116)),
    "chain-columns": input_layer(256, 144, 112),
    "ragged-rows": output_layer(400, (80, 77)),
    "ragged-columns": input_layer(157, 224, 176),
}
"""For stand-ins on a CPU: the same kinds, less work."""


@dataclass(frozen=True)
class Case:
    family: str
    check: str
    layer: str
    tokens: int
    config: KernelConfig

    @property
    def key(self) -> str:
        return f"{self.family}/{self.check}/{self.layer}/{self.tokens}/{label(self.config)}"


def cases() -> list[Case]:
    """Every case, simplest family first."""
    single = [KernelConfig("sm90", rows, tokens) for rows in (64, 128) for tokens in DECODE_TOKENS]
    split = [KernelConfig("sm90", c.tile_rows, c.tile_tokens, n) for n in (2, 4, 8) for c in single]
    shared = [KernelConfig("sm90", 128, tokens, n, True) for n in (1, 2, 4) for tokens in PREFILL_TOKENS]
    found = [Case("F0", "clusters", "tiny16", 1, config) for config in (*single, *split, *shared)]
    for family, layer in (("F1", "sparse128"), ("F2", "dense128")):
        found += [Case(family, "one_hot", layer, LAYERS[layer].in_features, config) for config in single]
    for tokens in (1, 7, 13, 32, 64, 128):
        fitting = next(t for t in DECODE_TOKENS if t >= tokens)
        for layer in ("tiny16", "tiny400", "deep-sparse", "deep-dense"):
            found += [Case("F3", "exact", layer, tokens, c) for c in single if c.tile_tokens == fitting]
    for layer in ("rows", "columns"):
        found += [Case("F4", "exact", layer, c.tile_tokens + 5, c) for c in single]
    for check in ("exact", "repeats"):
        found += [Case("F5", check, "tiles", 2 * c.tile_tokens, c) for c in split]
    for layer in ("sparse256", "dense256"):
        found += [Case("F6", "one_hot", layer, 512, c) for c in shared]
    found += [Case("F6", "exact", layer, 300, c) for layer in ("rows", "columns") for c in shared]
    found += [Case("F6", "repeats", "tiles", 2 * c.tile_tokens, c) for c in shared]
    few = [c for c in (*single, *split) if c.tile_tokens == 16]
    for layer in ("ragged-rows", "ragged-columns"):
        found += [Case("F8", "canaries", layer, 13, c) for c in few]
        found += [Case("F8", "canaries", layer, 130, c) for c in (*single[4::5], *split[4::5], *shared)]
    lone = [KernelConfig("sm90", 64, 8), KernelConfig("sm90", 128, 16, 4), shared[2]]
    found += [Case("F7", "capture", "chain-rows", c.tile_tokens, c) for c in lone]
    chained = [*lone, KernelConfig("sm90", 128, 64, 2), KernelConfig("sm90", 64, 16, 8), shared[3]]
    return found + [Case("F7", "chain", "chain-rows", c.tile_tokens, c) for c in chained]


# --- layers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer as the kernel reads it, and its exact weights."""

    spec: LinearSpec
    tensors: Tensors
    weight: torch.Tensor
    """float64 ``[N, K]``, without the scale."""

    def inputs(self, tokens: int, integers: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Made on the CPU, as the weights are: what is compared is the kernel alone."""
        generator = torch.Generator().manual_seed(seed)
        shape = (tokens, self.spec.in_features)
        if integers:
            x = torch.randint(-1, 2, shape, generator=generator).to(FP8_DTYPE)
            scale = torch.exp2(torch.arange(tokens) % 3 - 1.0)[:, None]
        else:
            x, scale = quantize_per_token(torch.randn(shape, generator=generator).bfloat16())
        return x.to(self.weight.device), scale.to(self.weight.device)

    def run(
        self, machine: Machine, config: KernelConfig, x: torch.Tensor, scale: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        t, spec = self.tensors, self.spec
        weights = (t["sparse_values"], t["sparse_meta"], t["dense_weight"], t["weight_scale"], None)
        sizes = (list(spec.sparse_sizes), list(spec.dense_sizes), spec.split == "output")
        machine.run(config, x, scale, *weights, *sizes, y)
        return y

    def empty(self, tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Of NaNs: what is never written shows."""
        shape = (tokens, self.spec.out_features)
        return torch.full(shape, float("nan"), dtype=dtype, device=self.weight.device)

    def expected(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (x.float().double() @ self.weight.T) * scale.double() * self.tensors["weight_scale"].double()


@functools.lru_cache(maxsize=32)
def make_layer(spec: LinearSpec, device: torch.device, integers: bool, seed: int = 0) -> Layer:
    (sparse_rows, sparse_columns), dense = spec.sparse_shape, spec.dense_shape
    tensors = {
        "sparse_values": torch.empty(sparse_rows, sparse_columns // 2, dtype=FP8_DTYPE),
        "sparse_meta": torch.empty(sparse_rows, sparse_columns // 8, dtype=torch.uint8),
        "dense_weight": torch.empty(dense, dtype=FP8_DTYPE),
    }
    fill_random(tensors, None, seed)
    if integers:
        generator = torch.Generator().manual_seed(seed)
        for name in ("sparse_values", "dense_weight"):
            tensors[name].copy_(torch.randint(-2, 3, tuple(tensors[name].shape), generator=generator))
    exponents = torch.arange(spec.out_features) % 4 - 2.0
    prepared = {
        "sparse_values": pad_pitch(tensors["sparse_values"]),
        "sparse_meta": block_metadata(tensors["sparse_meta"]),
        "dense_weight": pad_pitch(tensors["dense_weight"]),
        "weight_scale": torch.exp2(exponents) * (1.0 if integers else 1e-3),
    }
    prepared = {name: tensor.to(device) for name, tensor in prepared.items()}
    layer = Layer(spec, prepared, decompressed(spec, tensors).float().to(device).double())
    if device.type == "cuda":
        torch.cuda.synchronize()  # a kernel may read weights before the kernel in front of it has ended
    return layer


# --- checks: None if all is right, else what is wrong -------------------------------------------------------


def clusters(machine: Machine, case: Case, spec: LinearSpec) -> str | None:
    return None if machine.clusters(case.config) >= 1 else "no cluster of this shape fits the device"


def one_hot(machine: Machine, case: Case, spec: LinearSpec) -> str | None:
    """Each token picks one column, so y is the matrix itself."""
    layer = make_layer(spec, machine.device, False)
    x = torch.eye(spec.in_features, device=machine.device).to(FP8_DTYPE)
    scale = torch.ones(len(x), 1, device=machine.device)
    y = layer.run(machine, case.config, x, scale, layer.empty(len(x)))
    return difference(y, (layer.weight * layer.tensors["weight_scale"].double()[:, None]).T.float())


def exact(machine: Machine, case: Case, spec: LinearSpec) -> str | None:
    layer = make_layer(spec, machine.device, True)
    x, scale = layer.inputs(case.tokens, True)
    y = layer.run(machine, case.config, x, scale, layer.empty(case.tokens))
    return difference(y, layer.expected(x, scale))


def repeats(machine: Machine, case: Case, spec: LinearSpec) -> str | None:
    """The same bits every time, and close to one CTA alone (multicast: to the definition)."""
    layer = make_layer(spec, machine.device, False)
    x, scale = layer.inputs(case.tokens, False)
    count = REPEATS if machine.device.type == "cuda" else 2
    runs = [layer.run(machine, case.config, x, scale, layer.empty(case.tokens)) for _ in range(count)]
    changed = [i for i, y in enumerate(runs) if not torch.equal(y, runs[0])]
    if changed:
        return f"runs {changed} of {count} differ: {difference(runs[changed[0]], runs[0])}"
    if case.config.multicast:
        want = layer.expected(x, scale)
    else:
        alone = KernelConfig("sm90", case.config.tile_rows, case.config.tile_tokens)
        want = layer.run(machine, alone, x, scale, layer.empty(case.tokens)).double()
    error = ((runs[0].double() - want).norm() / want.norm()).item()
    return None if error <= CLOSE else f"relative error {error:.2e}: {difference(runs[0], want)}"


def canaries(machine: Machine, case: Case, spec: LinearSpec) -> str | None:
    """Nothing in front of y or behind it is written."""
    layer = make_layer(spec, machine.device, True)
    x, scale = layer.inputs(case.tokens, True)
    whole = torch.full((case.tokens + 2 * GUARD, spec.out_features), 77.0, device=machine.device)
    y = whole[GUARD : GUARD + case.tokens].fill_(float("nan"))
    layer.run(machine, case.config, x, scale, y)
    hit = [
        name for name, part in (("before", whole[:GUARD]), ("behind", whole[-GUARD:])) if part.ne(77).any()
    ]
    return f"wrote {' and '.join(hit)} y" if hit else difference(y, layer.expected(x, scale))


def capture(machine: Machine, case: Case, spec: LinearSpec) -> str | None:
    """The first launch of all is recorded, not made."""
    layer = make_layer(spec, machine.device, True)
    x, scale = layer.inputs(case.tokens, True)
    y = layer.empty(case.tokens)
    machine.synchronize()
    replay = machine.capture(lambda: layer.run(machine, case.config, x, scale, y))
    for seed in (1, 2):
        x.copy_(layer.inputs(case.tokens, True, seed)[0])
        y.fill_(float("nan"))
        replay()
        machine.synchronize()
        if problem := difference(y, layer.expected(x, scale)):
            return f"replay {seed}: {problem}"
    return None


def chain(machine: Machine, case: Case, spec: LinearSpec) -> str | None:
    """Six layers, each started before the one in front has ended, against one after another."""
    specs = [spec, layer_of("chain-columns", spec == REDUCED["chain-rows"])] * 3
    layers = [make_layer(each, machine.device, False, seed) for seed, each in enumerate(specs)]
    outputs = [layer.empty(case.tokens, torch.bfloat16) for layer in layers]
    x = torch.zeros(case.tokens, spec.in_features, dtype=torch.bfloat16, device=machine.device)

    def forward(after: Callable[[], object] = lambda: None) -> None:
        hidden = x
        for layer, y in zip(layers, outputs, strict=True):
            xq, scale = quantize_per_token(hidden)
            after()
            layer.run(machine, case.config, xq, scale, y)
            after()
            hidden = y

    forward()
    machine.synchronize()
    replay = machine.capture(forward)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        forward(machine.synchronize)
        want = [y.clone() for y in outputs]
        for how, run in (("replayed", replay), ("queued", forward)):
            for y in outputs:
                y.fill_(float("nan"))
            run()
            machine.synchronize()
            for depth, (y, right) in enumerate(zip(outputs, want, strict=True)):
                if problem := difference(y, right):
                    return f"layer {depth}, {how}: {problem}"
    return None


CHECKS: dict[str, Callable[[Machine, Case, LinearSpec], str | None]] = {
    check.__name__: check for check in (clusters, one_hot, exact, repeats, canaries, capture, chain)
}


def layer_of(name: str, reduced: bool) -> LinearSpec:
    return REDUCED.get(name, LAYERS[name]) if reduced else LAYERS[name]


def difference(y: torch.Tensor, want: torch.Tensor) -> str | None:
    """None if ``y [tokens, rows]`` is exactly ``want``, else where it is not."""
    bad = y.double() != want.double()
    if not bad.any():
        return None
    slabs = [i for i, slab in enumerate(bad.T.split(64)) if slab.any()]
    tokens = bad.any(1).nonzero().flatten().tolist()
    samples = [
        f"[{token}, {row}] {y[token, row].item():g} for {want[token, row].item():g}"
        for token, row in bad.nonzero()[:4].tolist()
    ]
    return (
        f"{int(bad.sum())} of {bad.numel()} wrong, {int(y.isnan().sum())} NaN; slabs of 64 rows {slabs[:12]}"
        f", tokens {tokens[:12]}; {'; '.join(samples)}"
    )
