"""What can be changed in a checkpoint: one hypothesis strategy for the edits of each kind.

Why hypothesis and no coverage-guided fuzzer: what can be wrong lies behind a JSON schema, so values made to
the format's measure get further than bytes; a failing case is shrunk; a seed gives the same cases again.
Cases come out as plain data (:mod:`fuzz.edits`), so a saved one does not depend on hypothesis at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.edits import HEADER, Case, Edit, split
from tests.fuzz.values import AT, DTYPES, HEX, JSON, NUMBERS, SCALARS, STRINGS
from vllm_spense.format.manifest import MANIFEST_NAME

Draw = Callable[[st.SearchStrategy], Any]
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SHORTS = ("sparse_values", "sparse_meta", "dense_weight", "weight_scale", "bias")


@dataclass(frozen=True)
class Base:
    """Names in one undamaged checkpoint; ``tensors``: (file, tensor)."""

    name: str
    files: tuple[str, ...]
    tensors: tuple[tuple[str, str], ...]
    modules: tuple[str, ...]
    config: dict[str, Any]
    headers: dict[str, dict[str, Any]]
    manifest: dict[str, Any]

    @staticmethod
    def read(name: str, directory: Path) -> Base:
        files = sorted(p.name for p in directory.glob("*.safetensors"))
        headers = {f: json.loads(split((directory / f).read_bytes())[0]) for f in files}
        tensors = [(f, t) for f in files for t in headers[f] if t != "__metadata__"]
        config = json.loads((directory / CONFIG).read_text())
        manifest = json.loads((directory / MANIFEST_NAME).read_text())
        modules = tuple(config["quantization_config"]["modules"])
        return Base(name, tuple(files), tuple(tensors), modules, config, headers, manifest)

    @property
    def sharded(self) -> bool:
        return len(self.files) > 1


def pick(draw: Draw, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


def path_in(draw: Draw, node: Any) -> list[Any]:
    """A path of keys into a JSON value; half of the time one step ends it where it is."""
    path: list[Any] = []
    while isinstance(node, (dict, list)) and node and (not path or draw(st.booleans())):
        key = (
            draw(st.sampled_from(sorted(node)))
            if isinstance(node, dict)
            else draw(st.integers(0, len(node) - 1))
        )
        path.append(key)
        node = node[key]
    return path


def json_edit(draw: Draw, document: str, path: list[Any], value: Any = None) -> Edit:
    """One change of a JSON document at ``path``: mostly another value, else no, another or a doubled key."""
    how = pick(draw, "set", "set", "set", "set", "delete", "rename", "twice", "add")
    value = draw(JSON) if value is None else value
    if how == "delete":
        return ["delete", document, path]
    if how == "rename":
        return ["rename", document, path, draw(STRINGS)]
    if how == "add":
        return ["set", document, [*path[:-1], draw(STRINGS)], value]
    return [how, document, path, value]


# -- kinds -------------------------------------------------------------------------------------------


def header_fields(draw: Draw, base: Base) -> list[Edit]:
    """Names, dtypes, shapes and offsets in the header of a weight file."""
    file, tensor = draw(st.sampled_from(base.tensors))
    entry = base.headers[file][tensor]
    document = file + HEADER
    how = pick(draw, "any", "any", "dtype", "shape", "extent", "offset", "alias", "metadata")
    if how == "dtype":
        return [["set", document, [tensor, "dtype"], draw(st.sampled_from(DTYPES))]]
    if how == "shape":
        shape = entry["shape"]
        new = pick(
            draw,
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            shape[:1],
            [],
            [0, *shape],
            [2**32, 2**32],
            [2**63, 2],
        )
        return [["set", document, [tensor, "shape"], new]]
    if how == "extent":
        axis = draw(st.integers(0, len(entry["shape"]) - 1))
        return [["set", document, [tensor, "shape", axis], draw(NUMBERS | st.integers(-2, 300))]]
    if how == "offset":
        end = draw(st.integers(0, 1))
        moved = entry["data_offsets"][end] + pick(draw, -8, -1, 1, 8, 144)
        return [["set", document, [tensor, "data_offsets", end], draw(st.just(moved) | NUMBERS)]]
    if how == "alias":  # two tensors on the same bytes
        other = draw(st.sampled_from([t for f, t in base.tensors if f == file]))
        return [["set", document, [tensor], base.headers[file][other]]]
    if how == "metadata":
        return [json_edit(draw, document, ["__metadata__", "format"])]
    return [json_edit(draw, document, [tensor, *path_in(draw, entry)] if draw(st.booleans()) else [tensor])]


def header_text(draw: Draw, base: Base) -> list[Edit]:
    """Bytes of the header: flips, cuts, insertions, deep nesting; the header's length follows."""
    document = draw(st.sampled_from(base.files)) + HEADER
    if pick(draw, False, False, False, True):
        return [
            [
                "splice",
                document,
                draw(AT),
                0,
                pick(draw, "5b", "7b", "20", "00", "ff"),
                pick(draw, 200, 100_000),
            ]
        ]
    return [["splice", document, draw(AT), draw(st.integers(0, 6)), draw(HEX)]]


def header_length(draw: Draw, base: Base) -> list[Edit]:
    """The eight bytes in front of the header."""
    value = pick(draw, 0, 1, 7, 2**31, 2**32, 10**8, 10**8 + 1, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)
    return [["length", draw(st.sampled_from(base.files)), draw(st.just(value) | st.integers(0, 2**64 - 1))]]


def container(draw: Draw, base: Base) -> list[Edit]:
    """A weight file cut, extended, or with bytes changed anywhere."""
    file = draw(st.sampled_from(base.files))
    how = pick(draw, "size", "splice", "splice", "append")
    if how == "size":
        return [
            ["resize", file, draw(st.integers(0, 200_000) | st.sampled_from([0, 7, 8, 9, 1 << 22, 1 << 28]))]
        ]
    if how == "append":
        return [["splice", file, -1, 0, draw(HEX), pick(draw, 1, 8, 4096)]]
    return [["splice", file, draw(AT), draw(st.integers(0, 5000) | st.integers(0, 4)), draw(HEX)]]


def payload(short: str) -> Callable[[Draw, Base], list[Edit]]:
    """Bytes of one kind of tensor (``plain``: of a tensor that belongs to no module)."""

    def edits(draw: Draw, base: Base) -> list[Edit]:
        wanted = [t for t in base.tensors if _short(base, t[1]) == short]
        if not wanted:
            return []
        file, tensor = draw(st.sampled_from(wanted))
        special = [
            "7f",
            "ff",
            "80",
            "00",
            "7e",
            "fe",
            "4e",
            "64",
            "000080ff",
            "0000c07f",
            "ffff7f7f",
            "01000000",
            "807f",
        ]
        text = draw(HEX | st.sampled_from(special))
        return [["payload", file, tensor, draw(AT), text, pick(draw, 1, 1, 1, 2, 16, 0)]]

    edits.__doc__ = f"Bytes of {short} tensors."
    return edits


def _short(base: Base, tensor: str) -> str:
    module, _, short = tensor.rpartition(".")
    return short if module in base.modules else "plain"


def tensors(draw: Draw, base: Base) -> list[Edit]:
    """Consistent files with a tensor too few, too many, swapped, or of another dtype or shape."""
    file, tensor = draw(st.sampled_from(base.tensors))
    shape, how = (
        base.headers[file][tensor]["shape"],
        pick(draw, "drop", "swap", "dtype", "shape", "new", "shards"),
    )
    if how == "drop":
        return [["drop", file, tensor]]
    if how == "swap":
        return [["swap", file, tensor, draw(st.sampled_from([t for f, t in base.tensors if f == file]))]]
    if how == "shards":
        name = pick(draw, tensor, tensor + "2")
        return [["copy tensor", file, tensor, draw(st.sampled_from(base.files)), name]]
    dtype = draw(st.sampled_from(DTYPES[:-3])) if how == "dtype" else base.headers[file][tensor]["dtype"]
    if how == "shape":
        shape = draw(st.sampled_from([shape[::-1], [*shape, 1], [0], [], [shape[0] + 1, *shape[1:]]]))
    if how == "new":
        module = (
            draw(st.sampled_from(base.modules)) if draw(st.booleans()) else pick(draw, "model.norm", "x", "")
        )
        tensor = f"{module}.{draw(st.sampled_from([*SHORTS, 'weight', 'input_scale', 'weight_packed', '']))}"
        shape, dtype = pick(draw, [1], [8, 8], [0], [144]), draw(st.sampled_from(DTYPES[:-3]))
    return [["retype", file, tensor, dtype, shape, pick(draw, "00", "44", "3f80", "0000803f", "7f")]]


def quantization(draw: Draw, base: Base) -> list[Edit]:
    """``quantization_config``: every key, values of every JSON type."""
    content = base.config["quantization_config"]
    return [json_edit(draw, CONFIG, ["quantization_config", *path_in(draw, content)])]


def modules(draw: Draw, base: Base) -> list[Edit]:
    """The list of modules: names and extents that are wrong but of the right type."""
    path = ["quantization_config", "modules", draw(st.sampled_from(base.modules))]
    how = pick(draw, "extent", "extent", "split", "bias", "name", "delete", "copy", "tp", "ignore", "regions")
    if how == "regions":
        sparse, dense = draw(st.integers(0, 300)), draw(st.integers(0, 300))
        return [["set", CONFIG, [*path, "sparse"], sparse], ["set", CONFIG, [*path, "dense"], dense]]
    if how == "extent":
        key = pick(draw, "out_features", "in_features", "sparse", "dense")
        return [["set", CONFIG, [*path, key], draw(NUMBERS | st.integers(-8, 300))]]
    if how == "split":
        return [["set", CONFIG, [*path, "split"], pick(draw, "input", "output")]]
    if how == "bias":
        return [["set", CONFIG, [*path, "bias"], pick(draw, True, False)]]
    if how in ("name", "copy"):
        name = draw(st.sampled_from(base.modules) | STRINGS | st.just("model.layers.7.mlp.up_proj"))
        value = base.config["quantization_config"]["modules"][path[-1]]
        return [
            ["rename", CONFIG, path, name] if how == "name" else ["set", CONFIG, [*path[:-1], name], value]
        ]
    if how == "delete":
        return [["delete", CONFIG, path]]
    if how == "tp":
        sizes = draw(st.lists(st.integers(0, 20) | NUMBERS, max_size=3))
        return [["set", CONFIG, ["quantization_config", "tensor_parallel_sizes"], sizes]]
    names = draw(st.lists(st.sampled_from(base.modules) | STRINGS, max_size=3))
    return [["set", CONFIG, ["quantization_config", "ignore"], names]]


def model_config(draw: Draw, base: Base) -> list[Edit]:
    """The rest of config.json, which describes the model."""
    content = {k: v for k, v in base.config.items() if k != "quantization_config"}
    how = pick(draw, "any", "number", "number", "known", "type")
    if how == "number":
        numbers = [k for k, v in content.items() if type(v) is int]
        return [
            [
                "set",
                CONFIG,
                [draw(st.sampled_from([*numbers, "num_labels"]))],
                draw(NUMBERS | st.integers(-8, 300)),
            ]
        ]
    if how == "known":  # what other models have
        key = pick(
            draw,
            "id2label",
            "rope_scaling",
            "layer_types",
            "torch_dtype",
            "auto_map",
            "sliding_window",
            "tie_word_embeddings",
        )
        return [["set", CONFIG, [key], draw(JSON)]]
    if how == "type":
        types = [
            "mistral",
            "qwen2",
            "qwen3",
            "gemma2",
            "gemma3_text",
            "phi3",
            "opt",
            "qwen2_moe",
            "gpt2",
            "bert",
            "t5",
            "llava",
            "mamba",
        ]
        return [["set", CONFIG, ["model_type"], draw(st.sampled_from(types))]]
    return [json_edit(draw, CONFIG, path_in(draw, content))]


def config_text(draw: Draw, base: Base) -> list[Edit]:
    """Bytes of config.json, the index or the manifest."""
    document = pick(draw, CONFIG, CONFIG, INDEX if base.sharded else CONFIG, MANIFEST_NAME)
    how = pick(draw, "splice", "splice", "splice", "size", "nest", "root")
    if how == "size":
        return [
            ["resize", document, draw(st.integers(0, 9000) | st.sampled_from([0, 1 << 25, 1 << 30, 1 << 40]))]
        ]
    if how == "root":
        return [["set", document, [], draw(JSON)]]
    if how == "nest":
        return [
            [
                "splice",
                document,
                draw(AT),
                0,
                pick(draw, "5b", "7b2261223a", "20", "00"),
                pick(draw, 900, 200_000),
            ]
        ]
    return [["splice", document, draw(AT), draw(st.integers(0, 6)), draw(HEX)]]


def index(draw: Draw, base: Base) -> list[Edit]:
    """``weight_map`` of the index: another file, no file, hostile names; an index beside a single file."""
    if not base.sharded:
        entries = {t: draw(st.sampled_from([base.files[0], "x.safetensors"])) for _, t in base.tensors[:3]}
        full = {t: base.files[0] for _, t in base.tensors}
        value = {"weight_map": draw(st.sampled_from([full, entries]) | JSON)}
        return [["write", INDEX, json.dumps({}).encode().hex()], ["set", INDEX, [], value]]
    _, tensor = draw(st.sampled_from(base.tensors))
    names = [
        *base.files,
        "../x.safetensors",
        "/x.safetensors",
        "x.bin",
        "a\0.safetensors",
        "\ud800.safetensors",
    ]
    names += ["x" * 300 + ".safetensors", ".safetensors", "./" + base.files[0], "x\n.safetensors"]
    if pick(draw, True, True, False):
        return [json_edit(draw, INDEX, ["weight_map", tensor], draw(st.sampled_from(names)))]
    return [json_edit(draw, INDEX, pick(draw, ["weight_map"], ["metadata"], ["weight_map", tensor]))]


def manifest(draw: Draw, base: Base) -> list[Edit]:
    """Entries, sizes, hashes and names in the manifest."""
    name = draw(st.sampled_from(sorted(base.manifest["files"])))
    how = pick(draw, "any", "size", "hash", "name", "name", "tiny")
    if how == "size":
        return [["set", MANIFEST_NAME, ["files", name, "size"], draw(NUMBERS | SCALARS)]]
    if how == "hash":
        hashes = st.sampled_from(
            ["0" * 64, "\ud800" * 64, [0] * 64, "A" * 64, "0" * 63, {str(i): 0 for i in range(64)}]
        )
        return [["set", MANIFEST_NAME, ["files", name, "sha256"], draw(hashes | JSON)]]
    if how == "name":
        new = draw(
            STRINGS | st.sampled_from(["../config.json", "/dev/zero", ".", "..", "a/../../x", "x" * 5000])
        )
        if draw(st.booleans()):
            return [["rename", MANIFEST_NAME, ["files", name], new]]
        return [["set", MANIFEST_NAME, ["files", new], {"size": draw(NUMBERS), "sha256": "0" * 64}]]
    if how == "tiny":  # a size that Python takes for a number, on a file where it is right
        edits: list[Edit] = [["write", "tiny.txt", "61"]]
        return [*edits, ["set", MANIFEST_NAME, ["files", "tiny.txt", "size"], pick(draw, True, 1.0, 1)]]
    return [json_edit(draw, MANIFEST_NAME, path_in(draw, base.manifest))]


def files(draw: Draw, base: Base) -> list[Edit]:
    """Files missing, doubled, exchanged, or in their place a directory, a link, a pipe."""
    known = [*base.files, CONFIG, MANIFEST_NAME, *([INDEX] if base.sharded else [])]
    file = draw(st.sampled_from(known))
    new = pick(
        draw,
        "model.safetensors",
        "x.safetensors",
        "model-00009-of-00009.safetensors",
        "model.bin",
        "x.py",
        INDEX,
    )
    how = pick(draw, "remove", "copy", "move", "swap", "directory", "fifo", "link", "write", "empty")
    if how == "remove":
        return [["remove", file]]
    if how == "swap":
        other = draw(st.sampled_from(known))
        return [["move", file, "@"], ["move", other, file], ["move", "@", other]]
    if how in ("copy", "move"):
        return [[how, file, new]]
    if how == "link":
        return [
            [
                "link",
                file,
                pick(draw, "/dev/zero", "/dev/null", "/nowhere", ".", file, CONFIG, "/etc/hostname"),
            ]
        ]
    if how == "empty":
        return [["write", file, ""]]
    return [["write", new, draw(HEX)]] if how == "write" else [[how, pick(draw, file, new)]]


def together(draw: Draw, base: Base) -> list[Edit]:
    """Two or three edits of other kinds in one checkpoint."""
    kinds = [kind for name, kind in KINDS.items() if name != "together"]
    return [edit for _ in range(draw(st.integers(2, 3))) for edit in draw(st.sampled_from(kinds))(draw, base)]


KINDS: dict[str, Callable[[Draw, Base], list[Edit]]] = {
    "header fields": header_fields,
    "header text": header_text,
    "header length": header_length,
    "container": container,
    **{f"payload {short}": payload(short) for short in (*SHORTS, "plain")},
    "tensors": tensors,
    "quantization_config": quantization,
    "modules": modules,
    "model config": model_config,
    "JSON text": config_text,
    "index": index,
    "manifest": manifest,
    "files": files,
    "together": together,
}


@st.composite
def cases(draw: Draw, kind: str, bases: list[Base]) -> Case:
    """A case of one kind."""
    base = draw(st.sampled_from(bases))
    mode = pick(draw, "rewritten", "rewritten", "rewritten", "kept")
    return Case(base.name, kind, mode, KINDS[kind](draw, base))
