"""Columns in 4 bits of the CPU layer benchmark: bitsandbytes' own layer, and Spense.

bitsandbytes runs its fused kernel (AVX-512 BF16) in `Linear4bit.forward` for weights that need no gradient in
evaluation mode; it packs them for that at the first call. Elsewhere it decompresses in every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch

from benchmarks.kernels.cpu_rivals import Call, Column
from vllm_spense.format.linear import Codecs
from vllm_spense.ops import LinearSpec
from vllm_spense.ops.linear import four_bit_cpu
from vllm_spense.ops.linear.cpu import ISAS
from vllm_spense.ops.linear.random import random_layer

SPENSE = (("nf4", "nf4", 1.0), ("nf4", "nf4", 0.5), ("nf4", "fp8", 0.5))
"""Codecs of the 2:4 region and of the dense one, and dense ratio of our columns."""
BLOCK = 64
"""Weights that share a scale, here and there."""


def bitsandbytes(n: int, k: int, limited: bool) -> Column:
    """``limited``: to older instructions than it was compiled for."""
    reason = None if find_spec("bitsandbytes") else "bitsandbytes is not installed"
    reason = reason or ("takes what instructions it finds" if limited else None)
    return Column(
        *("NF4 bitsandbytes", n * k // 2 + 2 * n * k // BLOCK),
        make=lambda seed: linear4bit(n, k, seed),
        kind="NF4",
        chosen=True,
        why_not=reason,
    )


def linear4bit(n: int, k: int, seed: int) -> Call:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16() / 64
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu").eval().requires_grad_(False)
    return torch.inference_mode()(layer)


def ours(specs: dict[float, LinearSpec], isas: Sequence[str], limit: str | None = None) -> Iterator[Column]:
    """``specs``: the layer by dense ratio; ``isas``, ``limit``: as in cpu_linear.py."""
    here = four_bit_cpu.isas()
    for sparse, dense, ratio in SPENSE:
        codecs = Codecs.of({"sparse": sparse, "dense": dense})
        spec = replace(specs[ratio], codecs=codecs)
        for isa in [name for name in isas if name in here] or [""]:
            able = [name for name in here if limit and ISAS.index(name) <= ISAS.index(limit)]
            picked = able[-1] if able else isa
            yield Column(
                *(f"Spense {codecs.name} {ratio:g}" + (f", {isa}" if isa else ""), spec.weight_bytes),
                make=lambda seed, spec=spec, isa=picked: spense_call(spec, isa, seed),  # type: ignore[misc]
                kind=f"Spense {codecs.name}",
                chosen=not isa,
                why_not=four_bit_cpu.FourBitCpuBackend().why_not(spec, torch.device("cpu")),
            )


def spense_call(spec: LinearSpec, isa: str, seed: int) -> Call:
    backend = four_bit_cpu.FourBitCpuBackend()
    prepared = backend.prepare(spec, random_layer(spec, torch.device("cpu"), seed))
    layer = four_bit_cpu.arguments(spec, prepared)
    run, number = torch.ops.spense.four_bit_linear_cpu, 1 + ISAS.index(isa) if isa else 0
    return lambda x: run(x, *layer, number)
