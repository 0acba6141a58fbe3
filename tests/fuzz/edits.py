"""What a fuzzing case is: edits of a checkpoint directory, as plain JSON data.

Data instead of functions, so that a case can be shrunk, printed, saved in the corpus and replayed without the
generator that made it. A *document* is a JSON file, or ``FILE#header``, the header of a safetensors file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_spense.format.manifest import MANIFEST_NAME, write_manifest

Edit = list[Any]
HEADER = "#header"
_HASHED = 1 << 27
"""A file beyond this size exists to be refused by its size; hashing it would only cost time."""


class NotApplicableError(Exception):
    """An edit names something that this checkpoint, or an earlier edit, does not have."""


@dataclass
class Case:
    """``manifest``: ``kept`` (the damage must be found by its hash) or ``rewritten`` to match the damage."""

    base: str
    kind: str
    manifest: Literal["kept", "rewritten"]
    edits: list[Edit]

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def parse(text: str) -> Case:
        return Case(**json.loads(text))


def make(case: Case, base: Path, out: Path) -> None:
    """Copy ``base`` to ``out`` and damage it; edits of the manifest come after it was rewritten."""
    shutil.copytree(base, out)
    late = [e for e in case.edits if e[1] == MANIFEST_NAME]
    for edit in [e for e in case.edits if e[1] != MANIFEST_NAME]:
        apply(edit, out)
    if case.manifest == "rewritten":
        big = [p for p in out.iterdir() if p.is_file() and p.stat().st_size > _HASHED]
        for path in big:
            path.rename(out.parent / path.name)
        write_manifest(out)
        for path in big:
            late.insert(0, ["set", MANIFEST_NAME, ["files", path.name], _entry(out.parent / path.name)])
            (out.parent / path.name).rename(path)
    for edit in late:
        apply(edit, out)


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": "0" * 64}


def apply(edit: Edit, directory: Path) -> None:
    """Carry out one edit; raises :class:`NotApplicableError` where its target does not exist."""
    name, *arguments = edit
    try:
        _OPERATIONS[name](directory, *arguments)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError, RecursionError) as error:
        raise NotApplicableError(f"{name}: {error!r}") from error


# -- JSON ------------------------------------------------------------------------------------------


def dump(value: Any) -> str:
    """JSON text; ``{"@raw": [opening, count, closing]}`` in it stands for text that no value gives."""
    raws: list[str] = []

    def mark(node: Any) -> Any:
        if isinstance(node, dict) and "@raw" in node:
            opening, count, closing = node["@raw"]
            raws.append(opening * count + closing * count)
            return f"@raw{len(raws) - 1}@"
        if isinstance(node, dict):
            return {key: mark(item) for key, item in node.items()}
        return [mark(item) for item in node] if isinstance(node, list) else node

    text = json.dumps(mark(value))
    for i, raw in enumerate(raws):
        text = text.replace(f'"@raw{i}@"', raw)
    return text.replace("@twice@", "")


def split(data: bytes) -> tuple[bytes, bytes]:
    """Header and payload of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        raise ValueError("no safetensors header")
    return data[8 : 8 + length], data[8 + length :]


def join(header: bytes, payload: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


def _read(directory: Path, document: str) -> bytes:
    data = (directory / document.removesuffix(HEADER)).read_bytes()
    return split(data)[0] if document.endswith(HEADER) else data


def _write(directory: Path, document: str, data: bytes) -> None:
    path = directory / document.removesuffix(HEADER)
    path.write_bytes(join(data, split(path.read_bytes())[1]) if document.endswith(HEADER) else data)


def _json(change: Callable[..., None]) -> Callable[..., None]:
    """An operation on the container that a path of keys leads to, and the last key."""

    def operation(directory: Path, document: str, path: list[Any], *arguments: Any) -> None:
        content = json.loads(_read(directory, document))
        if path:
            node = content
            for key in path[:-1]:
                node = node[key]
            change(node, path[-1], *arguments)
        elif change is _set:
            content = arguments[0]
        else:
            raise ValueError("no path")
        _write(directory, document, dump(content).encode())

    return operation


def _set(node: Any, key: Any, value: Any) -> None:
    node[key] = value


def _delete(node: Any, key: Any) -> None:
    del node[key]


def _rename(node: Any, key: Any, new: str) -> None:
    node[new] = node.pop(key)


def _twice(node: Any, key: Any, value: Any) -> None:
    _ = node[key]  # a key that is not there cannot be there twice
    node[key + "@twice@"] = value  # loses the mark when written, so that the key is there twice


# -- bytes and tensors -------------------------------------------------------------------------------


def _splice(directory: Path, document: str, at: int, cut: int, text: str, count: int = 1) -> None:
    """Replace ``cut`` bytes at ``at`` (modulo the size) by hex ``text``, ``count`` times."""
    data = _read(directory, document)
    at %= len(data) + 1
    _write(directory, document, data[:at] + bytes.fromhex(text) * count + data[at + cut :])


def _length(directory: Path, file: str, value: int) -> None:
    data = (directory / file).read_bytes()
    (directory / file).write_bytes(value.to_bytes(8, "little") + data[8:])


def _payload(directory: Path, file: str, tensor: str, at: int, text: str, count: int = 1) -> None:
    """Overwrite bytes of one tensor from ``at`` (modulo its size) on; ``count`` 0 fills it to the end."""
    path = directory / file
    header, payload = split(path.read_bytes())
    start, end = json.loads(header)[tensor]["data_offsets"]
    at %= end - start
    pattern = bytes.fromhex(text)
    new = (pattern * (count or (end - start) // len(pattern)))[: end - start - at]
    path.write_bytes(join(header, payload[: start + at] + new + payload[start + at + len(new) :]))


def _tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    header, payload = split(path.read_bytes())
    entries = {n: e for n, e in json.loads(header).items() if n != "__metadata__"}
    return {n: (e["dtype"], e["shape"], payload[slice(*e["data_offsets"])]) for n, e in entries.items()}


def _save(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    payload = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + len(data)]
        }  # fmt: skip
        payload += data
    path.write_bytes(join(json.dumps(header).encode(), payload))


def _retype(directory: Path, file: str, tensor: str, dtype: str, shape: list[int], text: str) -> None:
    """Write the tensor anew in a consistent file: another dtype and shape, bytes repeated from ``text``."""
    width = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}.get(dtype, 1)
    size = width
    for extent in shape:
        size *= extent
    if size > 1 << 22:
        raise ValueError("too large")
    pattern = bytes.fromhex(text)
    tensors = _tensors(directory / file)
    tensors[tensor] = dtype, shape, (pattern * (size // len(pattern) + 1))[:size]
    _save(directory / file, tensors)


def _drop(directory: Path, file: str, tensor: str) -> None:
    tensors = _tensors(directory / file)
    del tensors[tensor]
    _save(directory / file, tensors)


def _swap(directory: Path, file: str, one: str, other: str) -> None:
    """Exchange the contents of two tensors, their shapes and dtypes included."""
    tensors = _tensors(directory / file)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    _save(directory / file, tensors)


def _copy_tensor(directory: Path, file: str, tensor: str, into: str, name: str) -> None:
    """Put a copy of one tensor under ``name`` into another file."""
    value = _tensors(directory / file)[tensor]
    _save(directory / into, {**_tensors(directory / into), name: value})


_OPERATIONS: dict[str, Callable[..., object]] = {
    "set": _json(_set),
    "delete": _json(_delete),
    "rename": _json(_rename),
    "twice": _json(_twice),
    "splice": _splice,
    "length": _length,
    "resize": lambda d, file, size: os.truncate(d / file, size),
    "payload": _payload,
    "retype": _retype,
    "drop": _drop,
    "swap": _swap,
    "copy tensor": _copy_tensor,
    "copy": lambda d, file, new: shutil.copy(d / file, d / new),
    "move": lambda d, file, new: (d / file).rename(d / new),
    "remove": lambda d, file: (d / file).unlink(),
    "write": lambda d, file, text: (d / file).write_bytes(bytes.fromhex(text)),
    "directory": lambda d, file: ((d / file).unlink(missing_ok=True), (d / file).mkdir()),
    "fifo": lambda d, file: ((d / file).unlink(missing_ok=True), os.mkfifo(d / file)),
    "link": lambda d, file, to: ((d / file).unlink(missing_ok=True), (d / file).symlink_to(to)),
}
