"""Where a transformers model and the tensors of its checkpoint go by different names.

Linears that an architecture fuses (``gate_up_proj`` of Phi-3 and GLM-4, Phi-3's ``qkv_proj``) are always
separate in a Spense checkpoint, so that S and D of gate and up are regions of their own. Routed experts are
one matrix per expert and projection on disk, and stacked parameters ``[experts, N, K]`` in transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_spense.models.families import FUSED, family_of

_EXPERTS = {"gate_up_proj": FUSED["gate_up_proj"], "down_proj": ("down_proj",)}


def fused_groups(names: Iterable[str], model_type: str) -> dict[str, list[str]]:
    """What this architecture calls the checkpoint's modules or tensors, each with its parts in order.

    A group of one is a name that both sides share.
    """
    into = {part: fused for fused in family_of(model_type).fused for part in FUSED[fused]}
    order = [part for parts in FUSED.values() for part in parts]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(into.get(step, step) for step in name.split(".")), []).append(name)
    for parts in groups.values():
        parts.sort(key=lambda part: [order.index(step) for step in part.split(".") if step in into])
    return groups


def part_rows(fused: str, rows: int, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """First and past-the-last row of each part among all ``rows`` of a fused linear, from config.json."""
    parts = FUSED[fused]
    shares = [1] * len(parts)
    if fused == "qkv_proj":
        heads = config["num_attention_heads"]
        shared = config.get("num_key_value_heads") or heads
        shares = [heads, shared, shared]
    found, start = {}, 0
    for part, share in zip(parts, shares, strict=True):
        stop = start + rows * share // sum(shares)
        found[part] = start, stop
        start = stop
    return found


def left_out(names: Iterable[str], directory: Path) -> str:
    """The one line that says which tensors of ``directory`` are not used."""
    unused = sorted(names)
    what = f"{len(unused)} tensors ({unused[0]}, …)" if unused[1:] else f"the tensor {unused[0]}"
    return f"{directory}: the model of config.json does not use {what}: left out"


def model_parameter(
    name: str, stored: Container[str], load: Callable[[str], torch.Tensor]
) -> torch.Tensor | None:
    """Parameter ``name`` of a transformers model, from tensors that are ``stored``; None if they are not.

    ``load`` may as well return meta tensors, where only the shape is asked for.
    """
    if name in stored:
        return load(name)
    module, _, kind = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    parts = [f"{parent}.{part}.{kind}" for part in FUSED.get(last, ())]
    if parts and all(part in stored for part in parts):
        return torch.cat([load(part) for part in parts])
    if last == "experts" and kind in _EXPERTS:
        return _stacked(module, _EXPERTS[kind], stored, load)
    return None


def _stacked(
    module: str, projections: tuple[str, ...], stored: Container[str], load: Callable[[str], torch.Tensor]
) -> torch.Tensor | None:
    experts: list[list[str]] = []
    while (names := [f"{module}.{len(experts)}.{p}.weight" for p in projections])[0] in stored:
        experts.append(names)
    if not experts:
        return None
    whole: torch.Tensor | None = None
    for i, names in enumerate(experts):  # one copy, where torch.stack would hold two
        expert = torch.cat([load(name) for name in names])
        if whole is None:
            whole = expert.new_empty(len(experts), *expert.shape)
        whole[i] = expert
    return whole
