"""What the outcome of the GPU tests allows to be timed.

``tests`` are the entries of test.json, by group, as ``tools.gpu`` writes them.
"""

from __future__ import annotations

from typing import Any

from vllm_spense.ops import LinearSpec
from vllm_spense.ops.linear.configs import KernelConfig, label


def needed(spec: LinearSpec, config: KernelConfig) -> list[str]:
    """Groups that try what this configuration does on this layer."""
    groups = ["many_tiles", "repeats", "graphs", "overlap"]
    if config.multicast:
        groups.append("multicast")
    else:
        groups += ["sparse_tile", "dense_tile"] if sum(spec.dense_sizes) else ["sparse_tile"]
        groups.append("output_split" if spec.split == "output" else "input_split")
        if config.cluster > 1:
            groups.append("split_k")
    return groups + (["fused_shards"] if len(spec.sparse_sizes) > 1 else [])


def config_of(name: str) -> KernelConfig:
    """The configuration that a label names."""
    kernel, tile, cluster = name.split("-")
    rows, tokens = map(int, tile.split("x"))
    return KernelConfig(kernel, rows, tokens, int(cluster[1:]), cluster[0] == "m")  # type: ignore[arg-type]


def first_light_entry(verdict: dict[str, Any]) -> dict[str, Any]:
    """What first light found, as a group of tests of its own; empty if it has not run."""
    if not verdict:
        return {}
    banned = verdict["banned"]
    entry = {"state": verdict["state"], "broke": sorted(banned), "why": banned, "reason": verdict["reason"]}
    return {"first_light": entry | {"seconds": verdict["seconds"]}}


def blocked(tests: dict[str, Any], spec: LinearSpec, config: KernelConfig) -> str | None:
    """Why this configuration must not be timed on this layer after these tests, in a few words."""
    name = label(config)
    for group, entry in tests.items():
        if name in entry.get("broke", ()):
            why = entry.get("why", {}).get(name)
            return f"first light: {why}" if why else f"broke the device or hung in group {group}"
    for group in needed(spec, config):
        entry = tests.get(group, {})
        if entry.get("state") in ("failed", "skipped"):
            return f"group {group} {entry['state']}"
        if entry.get("configs", {}).get(name, {}).get("failed"):
            return f"wrong in group {group}"
    return None


def untested(tests: dict[str, Any], spec: LinearSpec, config: KernelConfig) -> bool:
    """Whether a group that tries this configuration has not been run to its end."""
    return any(
        tests.get(group, {}).get("state") not in ("passed", "partly") for group in needed(spec, config)
    )
