"""Write a checkpoint directory so that it is either complete or not there.

Everything goes to a temporary directory beside the target, which is renamed at the end; shards are
flushed as soon as they are full, so memory holds one shard at most.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_spense.format.checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from vllm_spense.format.manifest import write_manifest

MAX_SHARD_BYTES = 4 << 30
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


class CheckpointWriter:
    """Context manager that collects tensors and files and renames them into place on success.

    Raises ``FileExistsError`` when ``directory`` exists and is not empty (``overwrite`` replaces it).
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.overwrite = overwrite
        self.max_shard_bytes = max_shard_bytes
        check_target(self.directory, overwrite)
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def __enter__(self) -> CheckpointWriter:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=f".{self.directory.name}.", dir=self.directory.parent))
        self.temporary.chmod(0o755)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor; a full shard is written at once. ``ValueError`` if the name was used before."""
        if name in self._pending or any(name in shard for shard in self._shards):
            raise ValueError(f"tensor {name} was added twice")
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        if tensor.untyped_storage().nbytes() != size:  # a slice would keep the whole storage alive
            tensor = tensor.clone()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total_bytes += size

    def write_text(self, name: str, text: str) -> None:
        (self.temporary / name).write_text(text)

    def write_config(self, config: dict[str, Any]) -> None:
        self.write_text(CONFIG_NAME, json.dumps(config, indent=2) + "\n")

    def copy_side_files(self, source: Path) -> None:
        """Copy everything a server needs that is not weights: tokenizer, templates, generation config."""
        skip = {CONFIG_NAME, INDEX_NAME, "README.md"}
        for path in sorted(source.iterdir()):
            if (
                path.is_file()
                and path.name not in skip
                and not path.name.startswith((".", "spense_"))
                and not path.name.endswith((*_WEIGHT_SUFFIXES, ".index.json", ".py"))
            ):
                shutil.copy2(path, self.temporary / path.name)

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self.temporary / f"shard-{len(self._shards):05d}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes it private, but a server may run as another user
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            final = SINGLE_NAME if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.temporary / f"shard-{i:05d}.safetensors").rename(self.temporary / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            self.write_text(INDEX_NAME, json.dumps(index, indent=2) + "\n")
        write_manifest(self.temporary)
        _sync_tree(self.temporary)
        check_target(self.directory, self.overwrite)
        if self.directory.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.directory.name}.old.", dir=self.directory.parent))
            self.directory.rename(old / "old")
            self.temporary.rename(self.directory)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.temporary.rename(self.directory)


def check_target(directory: Path, overwrite: bool) -> None:
    """Refuse, before any work is done, an output path that could not be written at the end."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; choose another output directory")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{directory} exists and is not empty; choose another directory or pass --overwrite"
        )


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
