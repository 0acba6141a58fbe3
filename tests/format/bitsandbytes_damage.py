"""Damaged checkpoints of bitsandbytes: what is done to a good one, and what is said of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.format.corruption_tools import (
    CONFIG,
    DOWN,
    GATE,
    INDEX,
    WEIGHTS,
    Damage,
    become,
    drop,
    edit,
    header,
    put,
    quantization,
    raw,
    state,
)

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)


@dataclass(frozen=True)
class Case:
    """``message``: a regular expression; ``where``: what the error names beside it."""

    damage: Damage
    message: str
    where: str = f"module {GATE}"


def text(change: Callable[[bytes], bytes]) -> Damage:
    """Other bytes in the place of GATE's JSON."""
    return become(
        f"{GATE}.weight.{STATE}",
        lambda old: torch.tensor(list(change(bytes(old.tolist()))), dtype=torch.uint8),
    )


def says(**values: object) -> Damage:
    """The JSON with other values; ``...`` removes a key."""

    def change(old: bytes) -> bytes:
        found = json.loads(old) | values
        return json.dumps({key: value for key, value in found.items() if value is not ...}).encode()

    return text(change)


def part(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return become(f"{GATE}.weight.{name}", change)


def value(name: str, number: float, at: int = 0) -> Damage:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[at] = number
        return tensor

    return part(name, change)


def both(first: Damage, second: Damage) -> Damage:
    def damage(directory: Path) -> None:
        first(directory)
        second(directory)

    return damage


def renamed(old: str, new: str) -> Damage:
    return state(lambda s: s.update({new: s.pop(old)}))


def plain(absmax: float = 1.0) -> Damage:
    """GATE without nested absmax, as ``bnb_4bit_use_double_quant=False`` leaves it, all of one value."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        blocks = len(tensors[f"{GATE}.weight.absmax"])
        tensors[f"{GATE}.weight.absmax"] = torch.full((blocks,), absmax)
        for name in ("nested_absmax", "nested_quant_map"):
            del tensors[f"{GATE}.weight.{name}"]
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        says(nested_blocksize=..., nested_dtype=..., nested_offset=...)(directory)

    return damage


def indexed(directory: Path) -> None:
    """An index that promises a tensor more than the file has."""
    names = [*load_file(directory / WEIGHTS), f"{GATE}.weight.more"]
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))


def two_files(directory: Path) -> None:
    save_file({"x": torch.zeros(1)}, directory / "other.safetensors")


def eight_bits(directory: Path) -> None:
    """A module as LLM.int8 leaves it, among those of 4 bits."""
    tensors = load_file(directory / WEIGHTS)
    tensors = {n: t for n, t in tensors.items() if not n.startswith(f"{GATE}.weight")}
    tensors[f"{GATE}.weight"] = torch.ones(208, 144, dtype=torch.int8)
    tensors[f"{GATE}.SCB"] = torch.ones(208)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def elsewhere(directory: Path) -> None:
    """GATE's tensors under the name of a layer that the model does not have."""
    tensors = load_file(directory / WEIGHTS)
    moved = {name.replace(GATE, "model.layers.7.mlp.gate_proj"): tensor for name, tensor in tensors.items()}
    save_file(moved, directory / WEIGHTS, metadata={"format": "pt"})


UNUSABLE = "bitsandbytes' state of the weight cannot be used"

CASES: dict[str, Case] = {
    # -- the JSON beside a weight
    "JSON cut": Case(text(lambda old: old[:-20]), UNUSABLE),
    "JSON of one byte": Case(text(lambda old: b"{"), rf"{UNUSABLE} \(torch.uint8 \[1\] are not up to 4096"),
    "no JSON": Case(text(lambda old: b"state"), UNUSABLE),
    "not ASCII": Case(text(lambda old: old.replace(b"nf4", "nf４".encode())), "ascii"),
    "NUL": Case(text(lambda old: old + b"\0"), "Extra data"),
    "huge JSON": Case(text(lambda old: old + b" " * 5000), r"\[\d+\] are not up to 4096 bytes of JSON"),
    "deep JSON": Case(text(lambda old: b"[" * 4000), UNUSABLE),
    "a list": Case(text(lambda old: b"[1, 2]"), "valid dictionary"),
    "a number": Case(text(lambda old: b"12345678"), "valid dictionary"),
    "a number of many digits": Case(text(lambda old: b'{"blocksize": ' + b"9" * 4000), UNUSABLE),
    "offset NaN": Case(says(nested_offset=math.nan), "NaN is no number"),
    "offset infinite": Case(says(nested_offset=math.inf), "Infinity is no number"),
    "offset that overflows": Case(
        text(lambda old: re.sub(rb'(?<="nested_offset": )[^,}]+', b"1e999", old)),
        "nested_offset: .*less than",
    ),
    "offset beyond fp32": Case(says(nested_offset=1e39), "nested_offset: .*less than or equal"),
    "offset a string": Case(says(nested_offset="0.5"), "nested_offset: .*valid number"),
    "offset missing": Case(says(nested_offset=...), "nested_offset belong together"),
    "nested dtype": Case(says(nested_dtype="float16"), "nested_dtype: .*'float32'"),
    "nested blocks of zero": Case(says(nested_blocksize=0), "nested_blocksize: "),
    "nested blocks smaller": Case(says(nested_blocksize=128), r"nested_absmax.*shape \[2\], expected \[4\]"),
    "no longer nested": Case(
        says(nested_offset=..., nested_blocksize=..., nested_dtype=...), "dtype U8, expected F32"
    ),
    "blocksize zero": Case(says(blocksize=0), "blocksize: .*greater than or equal to 2"),
    "blocksize negative": Case(says(blocksize=-64), "blocksize: "),
    "blocksize huge": Case(says(blocksize=1 << 40), "blocksize: .*less than or equal to 65536"),
    "blocksize no power of two": Case(says(blocksize=96), "blocksize 96 is no power of two"),
    "blocksize another": Case(says(blocksize=128), r"weight.absmax: shape \[468\], expected \[234\]"),
    "blocksize a string": Case(says(blocksize="64"), "blocksize: .*valid integer"),
    "blocksize a bool": Case(says(blocksize=True), "blocksize: .*valid integer"),
    "blocksize a float": Case(says(blocksize=64.0), "blocksize: .*valid integer"),
    "blocksize null": Case(says(blocksize=None), "blocksize: .*valid integer"),
    "blocksize missing": Case(says(blocksize=...), "blocksize: Field required"),
    "unknown quant type": Case(says(quant_type="int4"), "quant_type: .*'nf4' or 'fp4'"),
    "quant type is not the name's": Case(
        says(quant_type="fp4"), "(the tensor is missing|unexpected tensor beside)"
    ),
    "unknown dtype": Case(says(dtype="float8_e4m3fn"), "dtype: "),
    "dtype with torch in front": Case(says(dtype="torch.bfloat16"), "dtype: "),
    "a key more": Case(says(trust_remote_code=True), "trust_remote_code: Extra inputs"),
    "shape null": Case(says(shape=None), "shape: .*valid list"),
    "shape of one side": Case(says(shape=[29952]), "shape: .*at least 2"),
    "shape of three sides": Case(says(shape=[2, 104, 144]), "shape: .*at most 2"),
    "shape negative": Case(says(shape=[-208, -144]), "shape.0: "),
    "shape zero": Case(says(shape=[0, 144]), "shape.0: "),
    "shape of bools": Case(says(shape=[True, 144]), "shape.0: .*valid integer"),
    "shape of strings": Case(says(shape=["208", "144"]), "shape.0: .*valid integer"),
    "shape of many": Case(says(shape=[1 << 40, 2]), "shape.0: .*less than or equal"),
    "shape larger": Case(says(shape=[208, 288]), r"tensor weight: 14976 bytes, expected 29952"),
    "shape of odd columns": Case(says(shape=[9984, 3]), "rows of an odd number of values"),
    "shape turned": Case(
        both(drop(f"{GATE}.bias"), says(shape=[144, 208])), r"\[144, 208\], the model \[208, 144\]"
    ),
    "shape of fewer rows than biases": Case(says(shape=[104, 288]), r"bias: shape \[208\], expected \[104\]"),
    # -- which tensors lie there
    **{
        f"{name} missing": Case(drop(f"{GATE}.weight.{name}"), "the tensor is missing", f"weight.{name}")
        for name in PARTS[:-1]
    },
    "state missing": Case(drop(f"{GATE}.weight.{STATE}"), "no state beside a weight"),
    "weight missing": Case(drop(f"{GATE}.weight"), "tensor weight: the tensor is missing"),
    "all but the weight missing": Case(
        drop(*(f"{GATE}.weight.{name}" for name in PARTS)), "no state of 4 bits lies beside it"
    ),
    "a module missing": Case(
        drop(f"{GATE}.weight", *(f"{GATE}.weight.{name}" for name in PARTS)), "the model needs this tensor"
    ),
    "two states": Case(
        put(f"{GATE}.weight.quant_state.bitsandbytes__fp4", torch.zeros(9, dtype=torch.uint8)),
        "bitsandbytes__nf4 and quant_state.bitsandbytes__fp4 beside|"
        "bitsandbytes__fp4 and quant_state.bitsandbytes__nf4 beside",
    ),
    "state of another codec": Case(
        renamed(f"{GATE}.weight.{STATE}", f"{GATE}.weight.quant_state.bitsandbytes__int8"),
        "bitsandbytes__int8 beside a weight",
    ),
    "a part more": Case(put(f"{GATE}.weight.more", torch.zeros(1)), "unexpected tensor beside a weight"),
    "a module of another name": Case(elsewhere, "the model needs this tensor"),
    "a bias more": Case(
        edit(CONFIG, lambda c: c.update(mlp_bias=False)), "the checkpoint has a bias, the model none", "mlp"
    ),
    "8 bits among 4": Case(eight_bits, "dtype I8, and no state of 4 bits lies beside it"),
    # -- their headers
    "weight of a dtype that safetensors lacks": Case(
        header(f"{GATE}.weight", '"U8"', '"U9"'), "the safetensors file cannot be read", f"file .*{WEIGHTS}"
    ),
    "weight of integers": Case(
        become(f"{GATE}.weight", lambda t: t.view(-1).view(torch.int32)), "dtype I32, expected U8 or I8"
    ),
    "weight shorter": Case(become(f"{GATE}.weight", lambda t: t[:-1]), "14975 bytes, expected 14976"),
    "weight decoded": Case(
        become(f"{GATE}.weight", lambda t: torch.zeros(208, 144, dtype=torch.bfloat16)),
        "59904 bytes, expected 14976",
    ),
    "absmax of another dtype": Case(part("absmax", lambda t: t.float()), "dtype F32, expected U8"),
    "absmax shorter": Case(part("absmax", lambda t: t[1:]), r"shape \[467\], expected \[468\]"),
    "absmax in rows": Case(part("absmax", lambda t: t.view(4, -1)), r"shape \[4, 117\], expected \[468\]"),
    "absmax in half precision": Case(
        both(plain(), part("absmax", lambda t: t.half())), "dtype F16, expected F32"
    ),
    "quant_map longer": Case(part("quant_map", lambda t: torch.cat([t, t])), r"shape \[32\], expected"),
    "quant_map in half precision": Case(part("quant_map", lambda t: t.half()), "dtype F16, expected F32"),
    "nested_quant_map shorter": Case(part("nested_quant_map", lambda t: t[:16]), r"shape \[16\], expected"),
    "nested_absmax longer": Case(
        part("nested_absmax", lambda t: torch.cat([t, t])), r"shape \[4\], expected \[2\]"
    ),
    "state of numbers": Case(part(STATE, lambda t: t.float()), "dtype|are not up to 4096 bytes"),
    "bias shorter": Case(become(f"{GATE}.bias", lambda t: t[:-1]), r"bias: shape \[207\], expected \[208\]"),
    "bias of bytes": Case(become(f"{GATE}.bias", lambda t: t.byte()), "bias: dtype U8, expected BF16"),
    "bias missing": Case(drop(f"{GATE}.bias"), "the model has a bias, the checkpoint none"),
    # -- values
    **{
        f"quant_map {number}": Case(value("quant_map", number), "from -1 to 1", "weight.quant_map")
        for number in (math.nan, math.inf, -math.inf)
    },
    **{
        f"{name} {number}": Case(value(name, number), "NaN or infinity", f"weight.{name}")
        for name in ("nested_absmax", "nested_quant_map")
        for number in (math.nan, math.inf, -math.inf)
    },
    "plain absmax NaN": Case(plain(absmax=math.nan), "NaN or infinity", "tensor weight.absmax"),
    "plain absmax infinite": Case(plain(absmax=math.inf), "NaN or infinity", "tensor weight.absmax"),
    "decoded absmax beyond fp32": Case(
        both(value("nested_absmax", 3e38), says(nested_offset=3e38)),
        "beyond what fp32 holds",
        "tensor weight.absmax",
    ),
    "quant_map without a zero": Case(value("quant_map", 0.01, at=7), "with a zero among them"),
    "quant_map beyond 1": Case(value("quant_map", 1.5, at=15), "from -1 to 1"),
    "bias NaN": Case(
        become(f"{GATE}.bias", lambda t: torch.full_like(t, math.nan)), "NaN or infinity at flat index 0"
    ),
    "norm NaN": Case(
        become("model.norm.weight", lambda t: torch.full_like(t, math.nan)), "NaN or infinity", "model.norm"
    ),
    # -- config.json and files
    "8 bits": Case(quantization(load_in_4bit=False, load_in_8bit=True), r"8-bit .*\(LLM.int8\)", CONFIG),
    "neither 4 nor 8 bits": Case(quantization(load_in_4bit=False), "neither 4 nor 8 bits", CONFIG),
    "bits missing": Case(
        edit(CONFIG, lambda c: c["quantization_config"].pop("load_in_4bit")), "neither 4 nor 8", CONFIG
    ),
    "bits no bool": Case(quantization(load_in_4bit=[4]), "quantization_config of bitsandb", CONFIG),
    "no weight in 4 bits": Case(
        state(lambda s: [s.pop(n) for n in list(s) if ".weight." in n or s[n].dtype == torch.uint8]),
        "no weight is stored in 4 bits",
        "file ",
    ),
    "config.json cut": Case(raw(lambda data: data[:300], CONFIG), "not valid JSON", CONFIG),
    "another model": Case(
        edit(CONFIG, lambda c: c.update(intermediate_size=416)), r"\[208, 144\], the model \[416, 144\]"
    ),
    "more layers": Case(
        edit(CONFIG, lambda c: c.update(num_hidden_layers=3)), "the model needs this tensor", "layers.2"
    ),
    "weights cut": Case(raw(lambda data: data[:-10]), "the file ends after", WEIGHTS),
    "weights missing": Case(lambda d: (d / WEIGHTS).unlink(), "neither model.safetensors nor", "file "),
    "index and file disagree": Case(indexed, "the tensor is not in the file", f"{GATE}.weight.more"),
    "two weight files": Case(two_files, "second weight file", "other.safetensors"),
    "pickled weights beside": Case(
        lambda d: (d / "pytorch_model.bin").touch(), "second weight file", "pytorch_model.bin"
    ),
    "a header of its own": Case(
        header(f"{DOWN}.weight.absmax", '"U8"', '"I8"'), "dtype I8, expected U8", f"module {DOWN}"
    ),
}
