"""What a model directory holds beside config and weights, and a copy of the model needs as well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vllm_spense.format.checkpoint import CONFIG_NAME
from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.manifest import read_text_file

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OTHERS = (".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz", ".ot", ".tflite", ".mlmodel")
_WEIGHTS = (".safetensors", *_PICKLES, *_OTHERS)
_CODE = (".py", ".pyc", ".ipynb", ".so", ".sh")
NEVER_USED = [f"*{suffix}" for suffix in (*_PICKLES, *_OTHERS, *_CODE)]
"""Patterns of files that are neither read nor copied."""
_MODULES_NAME = "modules.json"
_MAX_JSON_BYTES = 1 << 20


def side_files(source: Path) -> dict[str, Path]:
    """The files of ``source`` to copy, by their names in it: tokenizer, templates, processor, licence, …

    Left out are config.json, the model card, weights, code, hidden files, and folders that hold weights: each
    is another model or another form of this one (``onnx``, ``original``, ``checkpoint-500``). The folders
    that ``modules.json`` names (pooling, projections) are parts of this model and keep their safetensors.
    Links are followed. Raises :class:`CheckpointError` for a file that cannot be read and for pickled
    weights of such a part.
    """
    modules = _module_folders(source)
    found = dict(_visible(source, source))
    apart = {
        PurePosixPath(name).parts[0]
        for name in found
        if "/" in name and name.lower().endswith(_WEIGHTS) and _module_of(name, modules) is None
    }
    chosen = {name: path for name, path in found.items() if _is_wanted(name, modules, apart)}
    for path in chosen.values():
        _check_readable(path)
    safe = {_module_of(name, modules) for name in chosen if name.endswith(".safetensors")}
    for name in found:
        module = _module_of(name, modules)
        if module is not None and module not in safe and name.lower().endswith(_PICKLES):
            raise CheckpointError(
                f"{_MODULES_NAME} names this folder, and its weights are pickled, which is never read",
                file=source / name,
                fix="save the model again as safetensors (sentence-transformers' save_pretrained)",
            )
    return chosen


def _is_wanted(name: str, modules: set[PurePosixPath], apart: set[str]) -> bool:
    lower = name.lower()
    if lower.endswith(_CODE):
        return False
    if _module_of(name, modules) is not None:
        return not lower.endswith((*_PICKLES, *_OTHERS))
    if lower.endswith((*_WEIGHTS, ".index.json")):
        return False
    if "/" in name:
        return PurePosixPath(name).parts[0] not in apart
    return name not in (CONFIG_NAME, "README.md") and not name.startswith("spense_")


def _visible(folder: Path, source: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[str, Path]]:
    """Name and path of all files in a folder and below, but hidden ones and those of interpreters."""
    real = folder.resolve()
    if real in above:
        return  # a link back up
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _visible(path, source, (*above, real))
        elif path.is_file() or path.is_symlink():  # a link to nothing is refused if it is wanted
            yield path.relative_to(source).as_posix(), path


def _module_of(name: str, modules: set[PurePosixPath]) -> PurePosixPath | None:
    """The module's folder in which a file lies."""
    return next((folder for folder in PurePosixPath(name).parents if folder in modules), None)


def _module_folders(source: Path) -> set[PurePosixPath]:
    """Where sentence-transformers keeps the parts behind the transformer, which is in ``source`` itself."""
    path = source / _MODULES_NAME
    try:
        names = [entry["path"] for entry in json.loads(read_text_file(path, _MAX_JSON_BYTES))]
        folders = {PurePosixPath(name) for name in names if name}
    except FileNotFoundError:
        return set()
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"no list of modules with paths ({error})", file=path, fix="download the model again"
        ) from None
    return {folder for folder in folders if ".." not in folder.parts and not folder.is_absolute()}


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise CheckpointError(
            f"the file cannot be read ({error.strerror})",
            file=path,
            fix="download it again, or remove it if nothing needs it",
        ) from None
