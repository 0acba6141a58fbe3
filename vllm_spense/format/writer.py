"""Write a checkpoint directory so that it is either complete or not there.

Everything goes to a temporary directory beside the target (or in a work directory that is there
already), which :mod:`vllm_spense.format.target` brings to its place at the end; shards are flushed as soon as
they are full, so memory holds one shard at most.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_spense.format.checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from vllm_spense.format.files import open_to_all, storable, sync, writing
from vllm_spense.format.manifest import write_manifest
from vllm_spense.format.settings import portable
from vllm_spense.format.side_files import side_files
from vllm_spense.format.target import Target

MAX_SHARD_BYTES = 4 << 30


class CheckpointWriter:
    """Context manager that collects tensors and files and renames them into place on success.

    ``work``: an existing directory to write in, instead of a temporary one beside the target. ``check`` sees
    the whole directory before it is renamed and may raise. Raises ``FileExistsError`` when ``directory``
    exists and is not empty; ``overwrite`` replaces a checkpoint that Spense wrote, but none of the
    ``inputs`` and nothing else (:class:`~vllm_spense.format.target.Target`).
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        inputs: Iterable[str | Path] = (),
        max_shard_bytes: int = MAX_SHARD_BYTES,
        work: Path | None = None,
        check: Callable[[Path], object] = lambda directory: None,
    ) -> None:
        self.target = Target(directory, overwrite=overwrite, inputs=inputs)
        self.directory = self.target.place
        self.work = work
        self.check = check
        self.max_shard_bytes = max_shard_bytes
        self.target.check()
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._names: set[str] = set()
        self._shards: list[list[str]] = []

    def __enter__(self) -> CheckpointWriter:
        with writing(self.directory):
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self.temporary = self.target.new_directory() if self.work is None else self._in_work()
            self.target.rehearse(self.temporary)
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
        self._claim(name)
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        if tensor.untyped_storage().nbytes() != size:  # a slice would keep the whole storage alive
            tensor = tensor.clone()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total_bytes += size

    def adopt(self, shard: Path) -> None:
        """Take a finished safetensors file as the next shard, without reading it into memory.

        It is linked, so the file itself stays where it is (copied, where links cannot be made).
        """
        self._flush()
        with safe_open(shard, framework="pt") as stream:
            names = list(stream.keys())
        for name in names:
            self._claim(name)
        _link_or_copy(shard, self._shard(len(self._shards)))
        self._shards.append(names)
        self._total_bytes += _payload_bytes(shard)

    def write_text(self, name: str, text: str) -> None:
        with writing(self.directory):
            (self.temporary / name).write_text(storable(text), encoding="utf-8")

    def write_config(self, config: dict[str, Any]) -> None:
        """Without what only held where the model came from (:func:`~.settings.portable`)."""
        self.write_text(CONFIG_NAME, json.dumps(portable(config)[0], indent=2) + "\n")

    def copy_side_files(self, source: Path) -> None:
        """Copy what a server needs beside config and weights (:func:`~.side_files.side_files`)."""
        for name, path in side_files(source).items():
            with writing(self.directory):
                goal = self.temporary / name
                goal.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, goal)

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise ValueError(f"tensor {name} was added twice")
        self._names.add(name)

    def _shard(self, index: int) -> Path:
        return self.temporary / f"shard-{index:05d}.safetensors"

    def _in_work(self) -> Path:
        """An empty directory in the work directory; what a killed run left there goes."""
        assert self.work is not None
        path = self.work / "checkpoint"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def _flush(self) -> None:
        if not self._pending:
            return
        save_shard(self._pending, self._shard(len(self._shards)))
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            final = SINGLE_NAME if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._shard(i).rename(self.temporary / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            self.write_text(INDEX_NAME, json.dumps(index, indent=2) + "\n")
        with writing(self.directory):
            write_manifest(self.temporary)
            for path in (*self.temporary.rglob("*"), self.temporary):
                open_to_all(path)  # a server may run as another user
                sync(path)
        self.check(self.temporary)
        self.target.publish(self.temporary)


def save_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """One safetensors file of contiguous CPU tensors."""
    with writing(path):
        save_file(tensors, path, metadata={"format": "pt"})


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; where the file system has none, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _payload_bytes(shard: Path) -> int:
    """Bytes of tensors: the file without the length of the header and the header."""
    with shard.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return shard.stat().st_size - 8 - header
