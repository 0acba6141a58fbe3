"""A gate that the Hopper kernel packs, through the emulator: its words are those of the kernel that does not.

Both sum up in the same order, so that they must agree to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tests.mlps import words_of
from vllm_spense.ops.mlp.activation import Activation
from vllm_spense.ops.mlp.twell import TwellShape, overflowed

from .cases import (
    AFTER_PRIOR_GRID,
    PREEMPT,
    WRITABLE,
    WRITE_ONCE,
    Case,
    Problem,
    arguments_of,
    run_on,
    run_once,
)
from .launcher import Emulator, Instance, Twell

TILE = 128
GATE, GATE_PREFILL = Instance(128, 16, packed=True), Instance(128, 128, multicast=True, packed=True)


def unpacked(instance: Instance) -> Instance:
    return instance._replace(packed=False)


@dataclass(frozen=True)
class Packed:
    """A ``case`` in bf16 of a packed instance; ``density``: share of its gates that are open."""

    case: Case
    density: float
    share: int = 8

    def __str__(self) -> str:
        return f"{self.case}-{self.density}-{self.share}"


def failure_of(emulator: Emulator, packed: Packed) -> str:
    """What is wrong with the kernel in this case, or an empty string."""
    case, shape = packed.case, TwellShape(sum((*packed.case.sparse, *packed.case.dense)), TILE, packed.share)
    if case.rows:
        shape = replace(shape, hidden=case.rows)
    plain = replace(case, instance=unpacked(case.instance))
    problem = Problem(plain)
    error, gate, _ = run_once(emulator, plain, problem, 1, 0)
    if error:
        return f"unpacked: {error}"
    threshold = max(0.0, float(gate.float().quantile(1 - packed.density)))
    activation = Activation("fatrelu", threshold)
    expected = words_of(gate, activation, shape)
    tiles = (expected[:, :, 0] > shape.capacity).repeat_interleave(TILE, 1)[:, : shape.hidden]
    lost = torch.full(gate.shape, float("nan"), dtype=torch.bfloat16)
    for i, seed in enumerate(case.seeds):
        args, buffers = arguments_of(case, problem)
        flags = WRITABLE | AFTER_PRIOR_GRID | WRITE_ONCE
        args.y = buffers.add("y", lost, flags)
        args.words = buffers.add("words", torch.full(expected.shape, -1, dtype=torch.int32), flags)
        args.twell = Twell(TILE, packed.share, threshold)
        if error := run_on(emulator, case, args, buffers, seed, PREEMPT[i % len(PREEMPT)]):
            return f"seed {seed}: {error}"
        words = buffers.get("words", torch.int32).view(expected.shape)
        if not torch.equal(words, expected):
            wrong = (words != expected).nonzero()
            return f"seed {seed}: {len(wrong)} words are wrong, first {wrong[:4].tolist()}"
        y = buffers.get("y", torch.bfloat16).view(gate.shape)
        if not torch.equal(y[tiles], gate[tiles]):
            return f"seed {seed}: the gate of a tile that has overflowed is lost"
        if not y[~tiles].isnan().all():
            return f"seed {seed}: the gate of a tile is written that has not overflowed"
    return ""


def overflows(emulator: Emulator, packed: Packed) -> bool:
    """Whether a tile of the case overflows, and another one does not."""
    plain = replace(packed.case, instance=unpacked(packed.case.instance))
    _, gate, _ = run_once(emulator, plain, Problem(plain), 1, 0)
    shape = TwellShape(gate.shape[1], TILE, packed.share)
    threshold = max(0.0, float(gate.float().quantile(1 - packed.density)))
    return bool(overflowed(words_of(gate, Activation("fatrelu", threshold), shape), shape).any())
