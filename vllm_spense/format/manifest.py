"""SHA-256 manifest of a checkpoint directory (``spense_manifest.json``).

safetensors protects its header, not its payload: a flipped bit in a weight loads silently. The
manifest lets :func:`check_manifest` find it before any kernel runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from vllm_spense.format.errors import REPRUNE, CheckpointError
from vllm_spense.format.files import write_text

MANIFEST_NAME = "spense_manifest.json"
MANIFEST_VERSION = 1
_CHUNK = 1 << 22
_MAX_BYTES = 1 << 24
_MOST_THREADS = 16
"""That hash: each takes about 1 GB/s, and loading that much per second needs a fast disk."""


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_text_file(path: Path, limit: int) -> bytes:
    """A regular file of at most ``limit`` bytes; ``OSError`` or ``ValueError`` otherwise.

    A pipe in its place would be waited for, a device read without end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    if status.st_size > limit:
        raise ValueError(f"larger than {limit >> 20} MiB")
    return path.read_bytes()


def write_manifest(directory: Path) -> None:
    """Write the manifest of every file now in ``directory``."""
    _write(directory, _entries(directory, _names(directory)))


def update_manifest(directory: Path) -> None:
    """Write it again, after an edit on purpose, of the files that it lists now and those that are loaded.

    What somebody has put there stays theirs, for ``--overwrite`` may delete what the manifest lists. Without
    a readable one all files are listed but hidden ones.
    """
    names = _names(directory)
    try:
        listed = read_manifest(directory)
    except CheckpointError:
        names = {name for name in names if not any(part[0] == "." for part in PurePosixPath(name).parts)}
    else:
        names &= {*listed, *_loaded_files(directory, listed)}
    _write(directory, _entries(directory, names))


def replace_text(directory: Path, name: str, text: str) -> None:
    """Replace the text file ``name`` (no weights: nothing else is hashed again) and its manifest entry."""
    path, entries = directory / name, read_manifest(directory)
    write_text(path, text)
    entries[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    _write(directory, entries)


def _names(directory: Path) -> set[str]:
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    return found - {MANIFEST_NAME}


def _entries(directory: Path, names: Iterable[str]) -> dict[str, dict[str, object]]:
    paths = sorted(directory / name for name in names)
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in paths
    }


def _write(directory: Path, entries: dict[str, dict[str, object]]) -> None:
    text = json.dumps({"version": MANIFEST_VERSION, "files": entries}, indent=2)
    write_text(directory / MANIFEST_NAME, text + "\n")


def read_manifest(directory: Path, name: str = MANIFEST_NAME) -> dict[str, dict[str, object]]:
    """The manifest's entries by file name; raises :class:`CheckpointError` when it is malformed."""
    path = directory / name
    try:
        raw = json.loads(read_text_file(path, _MAX_BYTES))
        if raw["version"] != MANIFEST_VERSION:
            raise ValueError(f"version {raw['version']!r}, expected {MANIFEST_VERSION}")
        entries = raw["files"]
        for file, entry in entries.items():
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise ValueError(f"{file!r} leaves the directory")
            if type(entry["size"]) is not int or len(entry["sha256"]) != 64:  # a bool is no size
                raise ValueError(f"bad entry for {file!r}")
    except FileNotFoundError:
        raise CheckpointError("the manifest is missing", file=path, fix=REPRUNE) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(f"the manifest cannot be read ({error})", file=path, fix=REPRUNE) from None
    return entries


def check_manifest(
    directory: Path,
    only: Callable[[str], bool] = lambda name: True,
    progress: Callable[[str], None] = lambda name: None,
) -> int:
    """Compare the files that ``only`` selects with the manifest; returns the bytes read.

    Raises :class:`CheckpointError` for the first file that is missing, differs in size or hash, or is
    loaded (weights, index, config) without being listed.
    Files are hashed in parallel (hashlib releases the interpreter lock).
    """
    listed = read_manifest(directory)
    for name in _loaded_files(directory, listed):  # else dropping an entry would switch its check off
        if only(name) and name not in listed:
            raise CheckpointError("the manifest does not list this file", file=directory / name, fix=REPRUNE)
    entries = {n: e for n, e in listed.items() if only(n)}
    for name, entry in entries.items():  # sizes first: cheap, and truncation is the common damage
        path = directory / name
        if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
            raise CheckpointError("the file is missing", file=path, fix=REPRUNE)
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(
                f"the file has {path.stat().st_size} bytes, the manifest says {entry['size']}",
                file=path,
                fix=REPRUNE,
            )

    def differs(name: str) -> bool:
        changed = sha256(directory / name) != entries[name]["sha256"]
        progress(name)
        return changed

    _raise_if_any(differs, entries, directory)
    return sum(int(str(e["size"])) for e in entries.values())


def _raise_if_any(differs: Callable[[str], bool], names: Iterable[str], directory: Path) -> None:
    names = list(names)
    with ThreadPoolExecutor(max_workers=min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for name, changed in zip(names, pool.map(differs, names), strict=True):
            if changed:
                raise CheckpointError(
                    "the SHA-256 differs from the manifest: the file was damaged or edited",
                    file=directory / name,
                    fix=f"{REPRUNE}; after an edit on purpose run `spense verify --update-manifest`",
                )


def _loaded_files(directory: Path, listed: Iterable[str]) -> list[str]:
    """What a server loads from ``directory`` and from the folders of files that the manifest lists."""
    folders = {PurePosixPath(name).parent for name in (MANIFEST_NAME, *listed)}
    there = [folder for folder in sorted(folders) if os.path.isdir(directory / folder)]
    found = ((f / path.name).as_posix() for f in there for path in sorted((directory / f).iterdir()))
    return [name for name in found if is_loaded_file(name)]


def is_loaded_file(name: str) -> bool:
    """What the plugin checks at load: config.json, tensors and index of the model and of its parts."""
    return PurePosixPath(name).name == "config.json" or is_weight_file(name)


def is_weight_file(name: str) -> bool:
    """The tensors and their index."""
    return name.endswith((".safetensors", ".safetensors.index.json"))
