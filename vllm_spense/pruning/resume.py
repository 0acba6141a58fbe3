"""What an unfinished run leaves for the next one: finished layers and what they were made from."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_spense.format import ModuleSpec
from vllm_spense.format.files import sync, writing
from vllm_spense.format.manifest import MANIFEST_NAME, sha256
from vllm_spense.format.target import Target
from vllm_spense.format.writer import save_shard
from vllm_spense.pruning.choice.pilot import Verdict
from vllm_spense.pruning.choice.selection import DenseChoice

_STATE, _LOCK, _CHOICE, _VERDICT = "state.json", "lock", "choice.safetensors", "verdict.json"
_STATE_VERSION = 3
_OURS = re.compile(
    r"lock|token|checkpoint|activations-.*"
    r"|(partial-)?(state|verdict|layer-\d+)\.json|(layer-\d+|costs|choice|partial)\.safetensors"
)


class ResumeError(RuntimeError):
    """The work directory of another run is in the way, or does not belong to this one."""


@dataclass(frozen=True)
class LayerRecord:
    """What is known of a finished layer besides its tensors: losses and damping by module name, MLPs whose
    joint fit was left out, seconds."""

    modules: dict[str, ModuleSpec]
    losses: dict[str, float]
    damping: dict[str, float]
    left_out: list[str]
    seconds: float


def work_path(out: str | Path) -> Path:
    """The hidden directory beside ``out`` (in it, if it cannot be renamed) in which a run into it works."""
    target = Target(out)
    beside = target.place.with_name(f".{target.place.name}.spense-work")
    return beside if beside.is_dir() else target.hidden("work")


class WorkDirectory:
    """Locked while open; holds one safetensors file and one JSON file per finished layer.

    Everything in it has its final name only when it is complete and on the disk, so a kill at any moment
    leaves a prefix of the layers. Leaving normally removes it. Leaving by an exception keeps it if it
    holds a finished layer, and then the exception carries a note that says how to go on.
    Raises :class:`ResumeError` when another process works on the same ``out``, and when something is in there
    that no run has written.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Target(out).place
        self.path = work_path(out)
        self._begun = False

    def __enter__(self) -> WorkDirectory:
        with writing(self.out):
            self.path.mkdir(parents=True, exist_ok=True)
            for path in self.path.iterdir():
                if not _OURS.fullmatch(path.name):
                    raise ResumeError(f"{path} is not of an unfinished run: move it out of there")
            self._handle = self._lock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            finished = self.finished()
            if error is None or not finished:
                self._remove()
            elif self._begun:
                note = f"{finished} finished layers are kept in {self.path}: --resume continues the run"
                error.__notes__ = [*getattr(error, "__notes__", []), note]  # add_note, for Python 3.10 too
        finally:
            os.close(self._handle)

    def begin(self, fingerprint: Mapping[str, Any], *, resume: bool = False, restart: bool = False) -> int:
        """Start anew, or continue what is there; returns the number of finished layers.

        ``fingerprint``: nested dictionaries of everything that decides the result. Raises
        :class:`ResumeError` when finished layers are there and neither ``resume`` nor ``restart`` says
        what to do with them, or when they were made from something else.
        """
        wanted = json.loads(json.dumps(fingerprint))
        state = self._state()
        finished = 0 if state is None else self.finished()
        if finished and not (resume or restart):
            raise ResumeError(
                f"{self.path} holds {finished} finished layers of an unfinished run: pass --resume to "
                "continue it, or --restart to discard it and begin again"
            )
        if state is not None and finished and resume:
            changed = _differences(state["fingerprint"], wanted)
            if changed:
                raise ResumeError(
                    f"{self.path} belongs to a run with other inputs: {'; '.join(changed[:5])}. Repeat that "
                    "command with --resume, or pass --restart to discard its finished layers"
                )
        else:
            finished = 0
        self._clear(keep=finished)
        self._write(_STATE, {"version": _STATE_VERSION, "fingerprint": wanted, "published": None})
        self._begun = True
        return finished

    # -- layers ----------------------------------------------------------------------------------

    def finished(self) -> int:
        """Number of layers, from the first on, that are complete."""
        count = 0
        while self._record(count).is_file() and self.shard(count).is_file():
            count += 1
        return count

    def shard(self, index: int) -> Path:
        """The safetensors file of a layer."""
        return self.path / f"layer-{index:05d}.safetensors"

    def save_layer(self, index: int, tensors: dict[str, torch.Tensor], record: LayerRecord) -> None:
        """Finish a layer: its tensors first, then its record, each complete on the disk or not there."""
        partial = self.path / "partial.safetensors"
        save_shard(tensors, partial)
        sync(partial)
        partial.rename(self.shard(index))
        sync(self.path)
        modules = {name: spec.model_dump() for name, spec in record.modules.items()}
        self._write(self._record(index).name, asdict(record) | {"modules": modules})

    def read_layer(self, index: int) -> LayerRecord:
        """The record of a finished layer."""
        raw = json.loads(self._record(index).read_bytes())
        modules = {name: ModuleSpec(**spec) for name, spec in raw.pop("modules").items()}
        return LayerRecord(modules=modules, **raw)

    def save_choice(self, choice: DenseChoice, verdict: Verdict | None) -> None:
        """Keep what was chosen for all layers at once, for as long as layers made from it are kept."""
        costs = {str(index): cost for index, cost in enumerate(choice.costs or [])}
        partial = self.path / "partial.safetensors"
        save_shard(costs | {"counts": torch.tensor(choice.counts)}, partial)
        sync(partial)
        self._write(_VERDICT, {"verdict": None if verdict is None else verdict.record()})
        partial.rename(self.path / _CHOICE)
        sync(self.path)

    def read_choice(self) -> tuple[DenseChoice, Verdict | None]:
        """What :meth:`save_choice` kept."""
        stored = load_file(self.path / _CHOICE)
        counts = stored.pop("counts").tolist()
        costs = [stored[str(index)] for index in range(len(stored))] or None
        return DenseChoice(counts, costs), Verdict.read(
            json.loads((self.path / _VERDICT).read_bytes())["verdict"]
        )

    # -- the end ---------------------------------------------------------------------------------

    def announce(self, checkpoint: Path) -> None:
        """Note which directory is about to be renamed to ``out``, so that a kill behind it is no loss."""
        state = self._state()
        assert state is not None
        self._write(_STATE, state | {"published": sha256(checkpoint / MANIFEST_NAME)})

    def published(self) -> bool:
        """Whether the run ended but for removing this directory."""
        state, manifest = self._state(), self.out / MANIFEST_NAME
        return state is not None and manifest.is_file() and state["published"] == sha256(manifest)

    # -- files -----------------------------------------------------------------------------------

    def _record(self, index: int) -> Path:
        return self.path / f"layer-{index:05d}.json"

    def _state(self) -> dict[str, Any] | None:
        try:
            raw = json.loads((self.path / _STATE).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return raw if raw.get("version") == _STATE_VERSION else None

    def _write(self, name: str, content: dict[str, Any]) -> None:
        partial = self.path / f"partial-{name}"
        with writing(self.out):
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            sync(partial)
            partial.rename(self.path / name)
            sync(self.path)

    def _lock(self) -> int:
        path = self.path / _LOCK
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
                raise BlockingIOError  # its holder removed it between our two steps
        except BlockingIOError:
            os.close(handle)
            raise ResumeError(
                f"another process is pruning into {self.out} right now: wait for it, or choose another OUT"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _clear(self, keep: int) -> None:
        """Remove all but the lock, the state and the first ``keep`` layers."""
        kept = {_LOCK, _STATE} | {p.name for i in range(keep) for p in (self._record(i), self.shard(i))}
        kept |= {_CHOICE, _VERDICT} if keep else set()
        # Sorted: a layer's record goes before its tensors. The state goes last of all, in _remove, since
        # it knows whether the run is published.
        for path in sorted(self.path.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in kept:
                path.unlink()

    def _remove(self) -> None:
        self._clear(keep=0)
        (self.path / _STATE).unlink(missing_ok=True)
        (self.path / _LOCK).unlink()
        with suppress(OSError):  # a link or a mount point of somebody's own
            self.path.rmdir()


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """One ``name was A, is B`` per leaf in which two nested dictionaries differ."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [f"{name} was {before}, is {now}"]
    found = []
    for key in dict.fromkeys([*before, *now]):
        inner = f"{name}.{key}" if name else key
        found += _differences(before.get(key, "absent"), now.get(key, "absent"), inner)
    return found
