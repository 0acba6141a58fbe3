"""What the GPU tests find wrong is not timed."""

from __future__ import annotations

from typing import Any

from benchmarks.kernels.shapes import MODELS, layer_spec
from benchmarks.kernels.verdicts import blocked, untested
from tools.gpu.groups import GROUPS
from vllm_spense.ops.linear.configs import KernelConfig, label


def entry(state: str, **fields: Any) -> dict[str, Any]:
    return {"state": state, "passed": 1, **fields}


def test_failed_configurations_are_not_timed() -> None:
    spec, single = layer_spec(MODELS[0], "gate_up", 0.5), KernelConfig("sm90", 64, 16)
    split, multicast = KernelConfig("sm90", 64, 16, 4), KernelConfig("sm90", 128, 256, 2, True)
    ok = {group.name: entry("passed") for group in GROUPS}
    assert all(blocked(ok, spec, config) is None for config in (single, split, multicast))
    assert not untested(ok, spec, single)

    outright = ok | {"split_k": entry("failed")}
    assert blocked(outright, spec, split) == "group split_k failed"
    assert blocked(outright, spec, single) is None
    assert blocked(ok | {"sparse_tile": entry("failed")}, spec, multicast) is None

    one = ok | {"fused_shards": entry("partly", configs={label(split): {"passed": 3, "failed": 1}})}
    assert blocked(one, spec, split) == "wrong in group fused_shards"
    assert blocked(one, spec, single) is None
    assert blocked(one, layer_spec(MODELS[0], "down", 0.5), split) is None, "down has one shard"

    hung = ok | {"ragged": entry("partly", broke=[label(multicast)])}
    assert blocked(hung, spec, multicast) == "broke the device or hung in group ragged"
    assert untested({}, spec, single)
