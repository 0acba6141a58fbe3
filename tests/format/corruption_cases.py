"""The table of corruptions: what is damaged, the message to expect, and who can find it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from tests.format.corruption_tools import (
    CONFIG,
    DOWN,
    FIRST,
    GATE,
    INDEX,
    LAST,
    OUT,
    UP,
    WEIGHTS,
    Damage,
    Q,
    become,
    byte,
    drop,
    duplicate_in_last_shard,
    edit,
    entry,
    flip,
    flip_payload,
    float4_norm,
    header,
    number,
    put,
    quantization,
    raw,
    remove,
    replace_by_directory,
    spec,
    swap_shards,
    touch,
    weight_map,
)
from vllm_spense.format.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class Case:
    """One corruption and who can find it.

    ``at``: ``start`` (user's tools, and the plugin before it loads anything), ``values`` (the plugin
    after loading, when the manifest matches), ``plain`` (a tensor that belongs to no module: the plugin
    has its hash only), ``tools`` (vLLM itself fails before it asks the plugin).
    """

    damage: Damage
    message: str
    at: Literal["start", "values", "plain", "tools"] = "start"
    rehash: bool = True
    sharded: bool = False


CUT = rf"file \S+/{WEIGHTS}: the file ends after \d+ of \d+ bytes, as if a download was cut off"
EMPTY = r"file \S+/{}: the file is empty"
UNREADABLE = rf"file \S+/{WEIGHTS}: the safetensors file cannot be read \(.*\)"
MISSING = r"module {}, tensor {}: the tensor is missing \(expected {}"
SHAPE = r"file \S+/model.safetensors, module {}, tensor {}: shape {}, expected {}"
DTYPE = r"file \S+/model.safetensors, module {}, tensor {}: dtype {}, expected {}"
VALUE = r"module {}, tensor {}: {} at flat index {}"
UNEXPECTED = "module {}, tensor {}: unexpected tensor for a module with these extents"
HASH = rf"file \S+/{WEIGHTS}: the SHA-256 differs from the manifest"
JSON = r"file \S+/{}: not valid JSON \(.*\)"
SCALE, NIBBLE, NAN8 = (
    "a scale that is not finite and positive",
    r"an illegal 2:4 metadata nibble \(.*\)",
    "an FP8 NaN",
)
QUANT = r"file \S*config\.json: quantization_config\."
DISAGREE = r"file \S+/{}, tensor {}: the index and the file disagree: the tensor is not in the {}"

CASES: dict[str, Case] = {
    # the weight file as a container
    "cut in the header": Case(raw(lambda d: d[:100]), CUT),
    "cut in the payload": Case(raw(lambda d: d[:-1000]), CUT),
    "one byte short": Case(raw(lambda d: d[:-1]), CUT),
    "bytes appended": Case(raw(lambda d: d + b"\0" * 16), UNREADABLE),
    "empty weight file": Case(raw(lambda d: b""), EMPTY.format(WEIGHTS)),
    "zeroed weight file": Case(raw(lambda d: bytes(len(d))), UNREADABLE),
    "pickle instead": Case(raw(lambda d: b"PK\x03\x04" + d), "this is a zip archive, as torch.save"),
    "header length flipped": Case(flip(1), UNREADABLE),
    "header length huge": Case(flip(7, 6), UNREADABLE),
    "header brace flipped": Case(flip(8), UNREADABLE),
    "header key changed": Case(header(f"{GATE}.sparse_meta", "offsets", "offsetz"), UNREADABLE),
    "header name changed": Case(
        header(f"{GATE}.sparse_meta", "sparse_meta", "sparse_mepa"), MISSING.format(GATE, "sparse_meta", "U8")
    ),
    "header shape swapped": Case(
        header(f"{GATE}.sparse_values", "[112,72]", "[72,112]"),
        SHAPE.format(GATE, "sparse_values", r"\[72, 112\]", r"\[112, 72\]"),
    ),
    "header dtype changed": Case(
        header(f"{GATE}.sparse_values", "F8_E4M3", "F8_E5M2"),
        DTYPE.format(GATE, "sparse_values", "F8_E5M2", "F8_E4M3"),
    ),
    "weight file missing": Case(remove(WEIGHTS), f"neither {WEIGHTS} nor {INDEX} is there", "tools"),
    "directory as weight file": Case(replace_by_directory, f"neither {WEIGHTS} nor {INDEX} is there"),
    "stray weight file": Case(
        touch("adapter.safetensors"), rf"file \S+/adapter.safetensors: second weight file beside {WEIGHTS}"
    ),
    # found by the manifest alone
    "payload bit in values": Case(flip_payload(f"{GATE}.sparse_values"), HASH, rehash=False),
    "payload bit in scale": Case(flip_payload(f"{Q}.weight_scale"), HASH, rehash=False),
    "payload bit in embedding": Case(flip_payload("model.embed_tokens.weight"), HASH, rehash=False),
    "norm missing": Case(drop("model.norm.weight"), "bytes, the manifest says", rehash=False),
    "norm of another length": Case(
        put("model.norm.weight", torch.ones(8)), "the manifest says", rehash=False
    ),
    # missing tensors
    "no sparse values": Case(drop(f"{GATE}.sparse_values"), MISSING.format(GATE, "sparse_values", "F8_E4M3")),
    "no sparse meta": Case(drop(f"{DOWN}.sparse_meta"), MISSING.format(DOWN, "sparse_meta", "U8")),
    "no dense region": Case(
        drop(f"{UP}.dense_weight"), MISSING.format(UP, "dense_weight", r"F8_E4M3 \[96, 144\]")
    ),
    "no attention weight": Case(drop(f"{Q}.dense_weight"), MISSING.format(Q, "dense_weight", "F8_E4M3")),
    "no scale": Case(drop(f"{DOWN}.weight_scale"), MISSING.format(DOWN, "weight_scale", r"F32 \[144\]")),
    "no bias": Case(drop(f"{OUT}.bias"), MISSING.format(OUT, "bias", "BF16")),
    "no module": Case(
        drop(*(f"{OUT}.{n}" for n in ("dense_weight", "weight_scale", "bias"))),
        MISSING.format(OUT, "dense_weight", "F8"),
    ),
    # unexpected tensors
    "dense weight left": Case(
        put(f"{GATE}.weight", torch.zeros(208, 144)), UNEXPECTED.format(GATE, "weight")
    ),
    "activation scale": Case(put(f"{Q}.input_scale", torch.ones(1)), UNEXPECTED.format(Q, "input_scale")),
    "values of an empty region": Case(
        put(f"{Q}.sparse_values", torch.zeros(8, 72).to(torch.float8_e4m3fn)),
        UNEXPECTED.format(Q, "sparse_values"),
    ),
    "bias that is not announced": Case(spec(Q, bias=False), UNEXPECTED.format(Q, "bias")),
    "module not listed": Case(
        edit(CONFIG, lambda c: c["quantization_config"]["modules"].pop(DOWN)),
        f"module {DOWN}, tensor dense_weight: the tensor belongs to a module that .*modules does not list",
    ),
    "layer too many": Case(
        put("model.layers.9.mlp.up_proj.sparse_meta", torch.zeros(2, 2, dtype=torch.uint8)),
        r"module model\.layers\.9\.mlp\.up_proj, tensor sparse_meta: .* does not list",
    ),
    # shapes
    "values transposed": Case(
        become(f"{DOWN}.sparse_values", lambda t: t.t()),
        SHAPE.format(DOWN, "sparse_values", r"\[56, 144\]", r"\[144, 56\]"),
    ),
    "meta one column short": Case(
        become(f"{GATE}.sparse_meta", lambda t: t[:, 1:]),
        SHAPE.format(GATE, "sparse_meta", r"\[112, 17\]", r"\[112, 18\]"),
    ),
    "dense one row short": Case(
        become(f"{UP}.dense_weight", lambda t: t[1:]),
        SHAPE.format(UP, "dense_weight", r"\[95, 144\]", r"\[96, 144\]"),
    ),
    "weight flattened": Case(
        become(f"{Q}.dense_weight", lambda t: t.flatten()),
        SHAPE.format(Q, "dense_weight", r"\[18432\]", r"\[128, 144\]"),
    ),
    "scale as a column": Case(
        become(f"{GATE}.weight_scale", lambda t: t[:, None]),
        SHAPE.format(GATE, "weight_scale", r"\[208, 1\]", r"\[208\]"),
    ),
    "scale per tensor": Case(
        become(f"{OUT}.weight_scale", lambda t: t[0]), SHAPE.format(OUT, "weight_scale", r"\[\]", r"\[144\]")
    ),
    "bias short": Case(
        become(f"{UP}.bias", lambda t: t[1:]), SHAPE.format(UP, "bias", r"\[207\]", r"\[208\]")
    ),
    # dtypes
    "meta signed": Case(
        become(f"{GATE}.sparse_meta", lambda t: t.view(torch.int8)),
        DTYPE.format(GATE, "sparse_meta", "I8", "U8"),
    ),
    "scale bf16": Case(
        become(f"{GATE}.weight_scale", lambda t: t.bfloat16()),
        DTYPE.format(GATE, "weight_scale", "BF16", "F32"),
    ),
    "scale fp64": Case(
        become(f"{GATE}.weight_scale", lambda t: t.double()), DTYPE.format(GATE, "weight_scale", "F64", "F32")
    ),
    "dense bf16": Case(
        become(f"{Q}.dense_weight", lambda t: t.bfloat16()),
        DTYPE.format(Q, "dense_weight", "BF16", "F8_E4M3"),
    ),
    "values as bytes": Case(
        become(f"{UP}.sparse_values", lambda t: t.view(torch.uint8)),
        DTYPE.format(UP, "sparse_values", "U8", "F8_E4M3"),
    ),
    "bias integer": Case(
        become(f"{OUT}.bias", lambda t: t.int()), DTYPE.format(OUT, "bias", "I32", "BF16 or F16 or F32")
    ),
    "norm fp4": Case(float4_norm, r"tensor model\.norm\.weight: dtype F4, expected"),
    "embedding fp8": Case(
        become("model.embed_tokens.weight", lambda t: t.to(torch.float8_e4m3fn)),
        r"tensor model\.embed_tokens\.weight: dtype F8_E4M3, expected",
    ),
    "head complex": Case(
        become("lm_head.weight", lambda t: t.to(torch.complex64)),
        r"tensor lm_head\.weight: dtype C64, expected",
    ),
    # values
    "scale nan": Case(
        number(f"{GATE}.weight_scale", math.nan), VALUE.format(GATE, "weight_scale", SCALE, 5), "values"
    ),
    "scale infinite": Case(
        number(f"{Q}.weight_scale", math.inf), VALUE.format(Q, "weight_scale", SCALE, 5), "values"
    ),
    "scale zero": Case(
        number(f"{DOWN}.weight_scale", 0.0), VALUE.format(DOWN, "weight_scale", SCALE, 5), "values"
    ),
    "scale negative": Case(
        number(f"{OUT}.weight_scale", -0.01), VALUE.format(OUT, "weight_scale", SCALE, 5), "values"
    ),
    "nan in values": Case(
        byte(f"{GATE}.sparse_values", 0x7F), VALUE.format(GATE, "sparse_values", NAN8, 74), "values"
    ),
    "nan in down values": Case(
        byte(f"{DOWN}.sparse_values", 0xFF), VALUE.format(DOWN, "sparse_values", NAN8, 58), "values"
    ),
    "nan in dense": Case(
        byte(f"{UP}.dense_weight", 0xFF), VALUE.format(UP, "dense_weight", NAN8, 146), "values"
    ),
    "nan in attention": Case(
        byte(f"{Q}.dense_weight", 0x7F), VALUE.format(Q, "dense_weight", NAN8, 146), "values"
    ),
    "nibble 0": Case(
        byte(f"{GATE}.sparse_meta", 0x40), VALUE.format(GATE, "sparse_meta", NIBBLE, 20), "values"
    ),
    "nibble F": Case(byte(f"{UP}.sparse_meta", 0x4F), VALUE.format(UP, "sparse_meta", NIBBLE, 20), "values"),
    "nibble 5, same place twice": Case(
        byte(f"{DOWN}.sparse_meta", 0x54), VALUE.format(DOWN, "sparse_meta", NIBBLE, 16), "values"
    ),
    "nibble 6, places swapped": Case(
        byte(f"{DOWN}.sparse_meta", 0x64, row=0), VALUE.format(DOWN, "sparse_meta", NIBBLE, 2), "values"
    ),
    "meta zeroed": Case(
        become(f"{GATE}.sparse_meta", torch.zeros_like),
        VALUE.format(GATE, "sparse_meta", NIBBLE, 0),
        "values",
    ),
    "bias nan": Case(
        number(f"{OUT}.bias", math.nan), VALUE.format(OUT, "bias", "NaN or infinity", 5), "values"
    ),
    "bias infinite": Case(
        number(f"{UP}.bias", -math.inf), VALUE.format(UP, "bias", "NaN or infinity", 5), "values"
    ),
    "norm nan": Case(
        number("model.norm.weight", math.nan), r"tensor model\.norm\.weight: NaN or infinity", "plain"
    ),
    "embedding infinite": Case(
        number("model.embed_tokens.weight", math.inf),
        r"tensor model\.embed_tokens\.weight: NaN or infinity",
        "plain",
    ),
    # config.json
    "config missing": Case(remove(CONFIG), r"file \S+/config.json: the file is missing", "tools"),
    "config empty": Case(raw(lambda d: b"", CONFIG), EMPTY.format("config.json"), "tools"),
    "config cut": Case(raw(lambda d: d[:-20], CONFIG), JSON.format("config.json"), "tools"),
    "config not utf-8": Case(
        raw(lambda d: d.replace(b"llama", b"ll\xffma"), CONFIG), JSON.format("config.json"), "tools"
    ),
    "config nested": Case(raw(lambda d: b"[" * 200_000, CONFIG), JSON.format("config.json"), "tools"),
    "config a list": Case(raw(lambda d: b"[" + d + b"]", CONFIG), "the top level must be an object", "tools"),
    "no quantization": Case(
        edit(CONFIG, lambda c: c.pop("quantization_config")),
        "config.json has no quantization_config",
        "tools",
    ),
    "quantization a string": Case(
        edit(CONFIG, lambda c: c.update(quantization_config="spense")),
        "quantization_config must be an object, not str",
    ),
    "version 3": Case(quantization(version=3), r"format version 3 is not supported \(this release reads 1 "),
    "version 2": Case(quantization(version=2), r"quantization_config\.codec: Field required"),
    "version true": Case(quantization(version=True), "format version True is not supported"),
    "version text": Case(quantization(version="1"), "format version '1' is not supported"),
    "other method": Case(
        quantization(quant_method="fp8"), QUANT + "quant_method is 'fp8', expected 'spense'"
    ),
    "unknown key": Case(quantization(group_size=128), QUANT + "group_size: Extra inputs are not permitted"),
    "unknown module key": Case(spec(GATE, order="DS"), QUANT + rf"modules\.{GATE}\.order: Extra inputs"),
    "negative extent": Case(
        spec(GATE, sparse=-112), QUANT + rf"modules\.{GATE}\.sparse: .*greater than or equal to 0"
    ),
    "extents contradict": Case(
        spec(GATE, dense=97), r"sparse 112 \+ dense 97 must be the 208 output features"
    ),
    "extents of another file": Case(
        spec(GATE, sparse=104, dense=104), SHAPE.format(GATE, "sparse_values", r"\[112, 72\]", r"\[104, 72\]")
    ),
    "split of another layer": Case(
        spec(Q, split="input", sparse=64, dense=80), MISSING.format(Q, "sparse_values", "F8_E4M3")
    ),
    "promise of TP 3": Case(
        quantization(tensor_parallel_sizes=[1, 3]),
        f"config.json, module {DOWN}: tensor_parallel_sizes promises 3, but 112 sparse",
    ),
    "promise of TP 4": Case(  # 112 columns in 4 parts of 28: no whole metadata bytes
        quantization(tensor_parallel_sizes=[4]),
        f"config.json, module {DOWN}: tensor_parallel_sizes promises 4, but 112 sparse",
    ),
    "dtype of another file": Case(
        quantization(weight_dtype="bfloat16", activation_scheme="none"),
        r"module \S+, tensor \S+: dtype F8_E4M3, expected BF16",
    ),
    "module also ignored": Case(quantization(ignore=[GATE]), f"{GATE} stands in both modules and ignore"),
    "module of nowhere": Case(
        edit(
            CONFIG,
            lambda c: c["quantization_config"]["modules"].update(
                {"x.y": c["quantization_config"]["modules"][Q]}
            ),
        ),
        MISSING.format("x.y", "dense_weight", "F8_E4M3"),
    ),
    # index and shards
    "index outside": Case(
        weight_map(lambda m: m.update({"lm_head.weight": "../outside.safetensors"})),
        rf"file \S+/{INDEX}, tensor lm_head.weight: weight_map names the file '../outside.safetensors'",
        sharded=True,
    ),
    "index absolute": Case(
        weight_map(lambda m: m.update({"lm_head.weight": "/etc/x.safetensors"})),
        "which is no plain",
        sharded=True,
    ),
    "index to a pickle": Case(
        weight_map(lambda m: m.update({"lm_head.weight": "model.bin"})), "which is no plain", sharded=True
    ),
    "index to a number": Case(
        weight_map(lambda m: m.update({"lm_head.weight": 3})), "weight_map names the file 3, ", sharded=True
    ),
    "index to a missing file": Case(
        weight_map(lambda m: m.update({"lm_head.weight": "model-9.safetensors"})),
        r"file \S+/model-9.safetensors: the weight file is missing",
        sharded=True,
    ),
    "index to a long name": Case(
        weight_map(lambda m: m.update({"lm_head.weight": "x" * 5000 + ".safetensors"})),
        "the weight file is missing",
        sharded=True,
    ),
    "index to another shard": Case(
        weight_map(lambda m: m.update({"lm_head.weight": LAST})),
        "the index and the file disagree",
        sharded=True,
    ),
    "index knows more": Case(
        weight_map(lambda m: m.update({"a.b": FIRST})), DISAGREE.format(FIRST, r"a\.b", "file"), sharded=True
    ),
    "index knows less": Case(
        weight_map(lambda m: m.pop("lm_head.weight")),
        DISAGREE.format(r"\S+", r"lm_head\.weight", "index"),
        sharded=True,
    ),
    "index without map": Case(
        edit(INDEX, lambda i: i.pop("weight_map")), rf"{INDEX}: weight_map is missing or empty", sharded=True
    ),
    "index with empty map": Case(
        edit(INDEX, lambda i: i.update(weight_map={})), "missing or empty", sharded=True
    ),
    "index with a list": Case(
        edit(INDEX, lambda i: i.update(weight_map=[])), "missing or empty", sharded=True
    ),
    "index cut": Case(raw(lambda d: d[:-9], INDEX), JSON.format(INDEX), sharded=True),
    "index missing": Case(remove(INDEX), f"neither {WEIGHTS} nor {INDEX} is there", sharded=True),
    "shard missing": Case(remove(FIRST), rf"file \S+/{FIRST}: the weight file is missing", sharded=True),
    "shards swapped": Case(swap_shards, "the index and the file disagree", sharded=True),
    "tensor in two shards": Case(
        duplicate_in_last_shard, DISAGREE.format(LAST, r"\S+", "index"), sharded=True
    ),
    "stray shard": Case(
        touch("model-00004-of-00004.safetensors"),
        rf"model-00004\S+: weight file that {INDEX} does not name",
        sharded=True,
    ),
    # the manifest itself
    "manifest missing": Case(
        remove(MANIFEST_NAME), rf"file \S+/{MANIFEST_NAME}: the manifest is missing", rehash=False
    ),
    "manifest cut": Case(raw(lambda d: d[:-9], MANIFEST_NAME), "the manifest cannot be read", rehash=False),
    "manifest of version 2": Case(
        edit(MANIFEST_NAME, lambda m: m.update(version=2)),
        r"cannot be read \(version 2, expected 1\)",
        rehash=False,
    ),
    "manifest without the weights": Case(
        edit(MANIFEST_NAME, lambda m: m["files"].pop(WEIGHTS)),
        rf"file \S+/{WEIGHTS}: the manifest does not list this file",
        rehash=False,
    ),
    "manifest of another size": Case(entry(WEIGHTS, size=7), "bytes, the manifest says 7", rehash=False),
    "manifest of another hash": Case(entry(WEIGHTS, sha256="0" * 64), HASH, rehash=False),
    "manifest entry broken": Case(entry(WEIGHTS, size="7"), f"bad entry for '{WEIGHTS}'", rehash=False),
    "manifest outside": Case(
        entry("../x.safetensors"), r"'\.\./x\.safetensors' leaves the directory", rehash=False
    ),
    "manifest knows more": Case(
        entry("more.safetensors"), r"more\.safetensors: the file is missing", rehash=False
    ),
}
