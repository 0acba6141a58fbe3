"""Ways to damage a checkpoint directory, each a function of the directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_spense.format.manifest import MANIFEST_NAME

Damage = Callable[[Path], None]
State = dict[str, torch.Tensor]
MLP, ATTN = "model.layers.0.mlp", "model.layers.1.self_attn"
GATE, UP, DOWN, Q, OUT = (
    f"{MLP}.gate_proj",
    f"{MLP}.up_proj",
    f"{MLP}.down_proj",
    f"{ATTN}.q_proj",
    f"{ATTN}.o_proj",
)
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"


def state(change: Callable[[State], object]) -> Damage:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(
            {n: t.contiguous() for n, t in tensors.items()}, directory / WEIGHTS, metadata={"format": "pt"}
        )

    return damage


def drop(*names: str) -> Damage:
    return state(lambda s: [s.pop(name) for name in names])


def put(name: str, tensor: torch.Tensor) -> Damage:
    return state(lambda s: s.update({name: tensor}))


def become(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return state(lambda s: s.update({name: change(s[name])}))


def byte(name: str, value: int, row: int = 1) -> Damage:
    """Overwrite one byte of a one-byte tensor."""

    def change(tensors: State) -> None:
        tensors[name].view(torch.uint8)[row, 2] = value

    return state(change)


def number(name: str, value: float) -> Damage:
    def change(tensors: State) -> None:
        tensors[name].view(-1)[5] = value

    return state(change)


def raw(change: Callable[[bytearray], bytes | bytearray | None], file: str = WEIGHTS) -> Damage:
    def damage(directory: Path) -> None:
        data = bytearray((directory / file).read_bytes())
        result = change(data)
        (directory / file).write_bytes(data if result is None else result)

    return damage


def flip(offset: int, bit: int = 0) -> Damage:
    def change(data: bytearray) -> None:
        data[offset] ^= 1 << bit

    return raw(change)


def flip_payload(name: str) -> Damage:
    """Flip the lowest bit of one byte in the middle of a tensor's payload."""

    def change(data: bytearray) -> None:
        length = int.from_bytes(data[:8], "little")
        start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
        data[8 + length + (start + end) // 2] ^= 1

    return raw(change)


def header(name: str, old: str, new: str) -> Damage:
    """Replace text of the same length in one tensor's header entry, as bit rot would."""

    def change(data: bytearray) -> None:
        assert len(old) == len(new)
        start = data.index(f'"{name}"'.encode())
        place = data.index(old.encode(), start)
        assert place - start < 200
        data[place : place + len(new)] = new.encode()

    return raw(change)


def edit(file: str, change: Callable[[Any], object]) -> Damage:
    def damage(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        change(content)
        (directory / file).write_text(json.dumps(content))

    return damage


def quantization(**values: object) -> Damage:
    return edit(CONFIG, lambda c: c["quantization_config"].update(values))


def spec(module: str, **values: object) -> Damage:
    return edit(CONFIG, lambda c: c["quantization_config"]["modules"][module].update(values))


def weight_map(change: Callable[[dict[str, Any]], object]) -> Damage:
    return edit(INDEX, lambda index: change(index["weight_map"]))


def entry(name: str, **values: object) -> Damage:
    return edit(
        MANIFEST_NAME, lambda m: m["files"].setdefault(name, {"size": 1, "sha256": "0" * 64}).update(values)
    )


def replace_by_directory(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).mkdir()


def duplicate_in_last_shard(directory: Path) -> None:
    first, last = load_file(directory / FIRST), load_file(directory / LAST)
    save_file(last | dict([next(iter(first.items()))]), directory / LAST, metadata={"format": "pt"})


def swap_shards(directory: Path) -> None:
    (directory / FIRST).rename(directory / "x")
    (directory / LAST).rename(directory / FIRST)
    (directory / "x").rename(directory / LAST)


def float4_norm(directory: Path) -> None:
    """A legal safetensors dtype that torch can hold but hardly compute with."""
    header("model.norm.weight", '"BF16"', '"F4"  ')(directory)
    header("model.norm.weight", "[144]", "[576]")(directory)


def touch(name: str) -> Damage:
    return lambda directory: save_file({"x": torch.zeros(1)}, directory / name)


def remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()
