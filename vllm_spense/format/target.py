"""The place of a new checkpoint: what may be there already, and how the finished one gets there.

Usually the new directory is renamed to its place, so that it is complete or not there. A directory that
cannot be renamed (a mount point, the directory that the shell is in) gets the files one by one, the manifest
last: without a manifest nothing verifies or serves it. What a kill leaves half done is undone by the
next command that writes there.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.files import sync, writing
from vllm_spense.format.manifest import MANIFEST_NAME, read_manifest

_OTHER = "choose another output directory"
_ARRIVING = f".{MANIFEST_NAME}.new"
"""The new manifest while the files that it lists are being moved into a directory."""


class Target:
    """An output directory ``out``, and what a command may replace there.

    ``place``: the directory itself, behind links. ``inputs``: files and directories that the command reads;
    names that are not there (of the hub) are left out. With ``overwrite`` a checkpoint that Spense
    wrote may be replaced, and nothing else: its manifest tells, and every file must be listed in it.
    ``stays``: the place is a directory that keeps its name and gets the files one by one.
    """

    def __init__(
        self, out: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()
    ) -> None:
        self.place = Path(os.path.realpath(out))
        self.overwrite = overwrite
        self.inputs = [path for name in inputs if os.path.exists(path := Path(name).expanduser())]
        self._prefix = f".{self.place.name}.spense-"
        self.stays = _cannot_be_renamed(self.place) or any(_named(self.place, self._prefix))

    def hidden(self, kind: str) -> Path:
        """A hidden name of ours on the file system of the place: beside it, or in it if it stays."""
        return (self.place if self.stays else self.place.parent) / f"{self._prefix}{kind}"

    def new_directory(self, kind: str = "tmp") -> Path:
        """An empty directory under such a name."""
        path = self.hidden(kind)
        return Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))

    # -- what may be replaced --------------------------------------------------------------------

    def check(self) -> None:
        """Raise ``FileExistsError`` for a place that could not be written at the end, or must not be."""
        place = self.place
        if place.is_symlink():
            raise FileExistsError(f"{place} is a link that leads to itself; {_OTHER}")
        above = next(path for path in (place, *place.parents) if path.exists())
        if not above.is_dir():
            raise FileExistsError(f"{above} is a file; {_OTHER}")
        for path in self.inputs:
            if (found := _within(place, path)) is not None:
                what = "is" if found.samefile(place) else f"holds {found},"
                raise FileExistsError(f"{place} {what} an input of this command; {_OTHER}")
        self._settle()
        if not place.exists() or not any(path for path in place.iterdir() if not self._aside(path)):
            return
        if not self.overwrite:
            raise FileExistsError(
                f"{place} exists and is not empty; choose another directory or pass --overwrite"
            )
        self._check_ours(place)

    def _check_ours(self, directory: Path) -> None:
        """Every file in it must be of one checkpoint that we wrote."""
        if not (directory / MANIFEST_NAME).is_file():
            raise FileExistsError(
                f"{self.place} is no checkpoint that Spense wrote (it has no {MANIFEST_NAME}), and "
                f"--overwrite replaces nothing else; {_OTHER}"
            )
        try:
            listed = {MANIFEST_NAME, *read_manifest(directory)}
        except CheckpointError as error:
            raise FileExistsError(f"{self.place} cannot be replaced, for {error.problem}; {_OTHER}") from None
        for name in _files(directory):
            if name not in listed and not self._aside(directory / name.partition("/")[0]):
                raise FileExistsError(
                    f"{self.place} holds {name}, which is not of the checkpoint that Spense wrote there; "
                    f"move it away, or {_OTHER}"
                )

    def _aside(self, path: Path) -> bool:
        """What we left ourselves, and what a new file system has in its root, is no content."""
        ours = path.name.startswith(self._prefix)
        return ours or (path.name == "lost+found" and _is_mount_point(path.parent))

    # -- the end of the work ---------------------------------------------------------------------

    def rehearse(self, folder: Path) -> None:
        """Write a file in ``folder`` and rename it to the place's file system, as the checkpoint will be.

        Raises ``OSError`` where that is refused.
        """
        token, there = folder / "token", self.hidden(f"token.{os.getpid()}")
        try:
            with writing(self.place):
                token.write_text("may this be written and renamed?\n", encoding="utf-8")
                _move(token, there)
        finally:
            # Those of runs that were killed right here as well; a living one does not need its own any more.
            for path in (token, *there.parent.glob(f"{glob.escape(there.stem)}.*")):
                with suppress(OSError):
                    path.unlink()

    def publish(self, new: Path) -> None:
        """Bring the finished directory ``new`` to its place; what it replaces is removed afterwards.

        Raises like :meth:`check`, and ``OSError``; then what was there is there again.
        """
        self.check()
        with writing(self.place):
            if not self.stays:
                try:
                    return self._swap(new)
                except OSError as error:
                    if error.errno not in (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES):
                        raise
                    self.stays = True
            self._move_in(new)

    def _swap(self, new: Path) -> None:
        old = None
        try:
            if self.place.is_dir() and any(self.place.iterdir()):
                old = self.new_directory("old")
                os.rename(self.place, old)
                self._check_ours(old)  # a file may have come since the last look
            os.rename(new, self.place)
        except BaseException:
            self._settle()
            raise
        sync(self.place.parent)
        if old is not None:
            _discard(old)

    def _move_in(self, new: Path) -> None:
        self.place.mkdir(exist_ok=True)
        with _locked(self.place):
            old = self.new_directory("old")
            try:
                if (self.place / MANIFEST_NAME).is_file():
                    replaced = _listed(self.place, MANIFEST_NAME)
                    for name in (MANIFEST_NAME, *replaced):
                        _move(self.place / name, old / name)
                    _remove_folders(self.place, replaced)
                names = _listed(new, MANIFEST_NAME)
                _move(new / MANIFEST_NAME, self.place / _ARRIVING)
                for name in names:
                    _move(new / name, self.place / name)
                sync(self.place)
                os.rename(self.place / _ARRIVING, self.place / MANIFEST_NAME)
            except BaseException:
                self._undo()
                raise
            sync(self.place)
            _discard(old)

    # -- after a kill ----------------------------------------------------------------------------

    def _settle(self) -> None:
        """Undo what :meth:`publish` left half done: the old checkpoint is put back, or removed at last."""
        if not self.place.is_dir():
            return self._undo()
        with _locked(self.place):
            self._undo()

    def _undo(self) -> None:
        if (self.place / _ARRIVING).is_file():
            _remove(self.place, _ARRIVING)
        for base in (self.place, self.place.parent):
            for old in _named(base, f"{self._prefix}old."):
                if (self.place / MANIFEST_NAME).exists() or not (old / MANIFEST_NAME).is_file():
                    _discard(old)
                elif self.place.exists():
                    replaced = _listed(old, MANIFEST_NAME)
                    for name in (*replaced, MANIFEST_NAME):
                        _move(old / name, self.place / name)
                    _remove_folders(old, replaced)
                    _discard(old)
                else:
                    os.rename(old, self.place)


def _listed(directory: Path, manifest: str) -> list[str]:
    """The files in ``directory`` that one of its manifests lists. None is behind a link to a folder."""
    listed = read_manifest(directory, manifest)
    return [name for name in _files(directory) if name in listed]


def _remove(directory: Path, manifest: str) -> None:
    """Delete the files that a manifest in ``directory`` lists, it itself, and the folders of these files."""
    folders = read_manifest(directory, manifest)  # of files that did not arrive, too
    for name in _listed(directory, manifest):
        (directory / name).unlink()
    (directory / manifest).unlink()
    _remove_folders(directory, folders)


def _discard(old: Path) -> None:
    """Remove a replaced checkpoint; whatever else is in its directory stays."""
    with suppress(OSError, CheckpointError):
        if (old / MANIFEST_NAME).is_file():
            _remove(old, MANIFEST_NAME)
        old.rmdir()


def _remove_folders(directory: Path, names: Iterable[str]) -> None:
    """Remove the folders of files that are gone, if nothing else is in them."""
    folders = {parent for name in names for parent in PurePath(name).parents if parent.name}
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):
            (directory / folder).rmdir()


def _move(source: Path, goal: Path) -> None:
    """Rename a file, or copy it where the goal is on another file system; nothing is replaced."""
    if os.path.lexists(goal):
        raise FileExistsError(f"{goal} is there already; {_OTHER}")
    goal.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, goal)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(source, goal)
        sync(goal)
        source.unlink()


def _files(directory: Path) -> Iterator[str]:
    """Names, with their folders, of all that is no folder. Links are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(directory, onerror=refuse):
        at = Path(folder)
        links = [name for name in folders if (at / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (at / name).relative_to(directory).as_posix()


def _named(directory: Path, prefix: str) -> list[Path]:
    """What is in a directory under names that start so; nothing where it cannot be listed."""
    with suppress(OSError):
        return sorted(path for path in directory.iterdir() if path.name.startswith(prefix))
    return []


def _within(place: Path, path: Path) -> Path | None:
    """``path``, or a link in it, if it leads to ``place`` or into it, by whatever name; else None."""
    if not place.exists():
        return None
    here = place.stat()
    links = [entry for entry in path.iterdir() if entry.is_symlink()] if path.is_dir() else []
    for found in (path, *links):
        real = Path(os.path.realpath(found))
        above = (other for other in (real, *real.parents) if other.exists())
        if any(os.path.samestat(here, other.stat()) for other in above):
            return found
    return None


def _cannot_be_renamed(place: Path) -> bool:
    """A mount point; a directory that somebody's shell is in; one whose parent's names may not be changed."""
    if not place.is_dir():
        return False
    with suppress(OSError):  # a working directory that was removed
        if Path.cwd().is_relative_to(place):
            return True
    parent = place.parent.stat()
    may = os.access(place.parent, os.W_OK | os.X_OK)
    sticky = parent.st_mode & stat.S_ISVTX and os.geteuid() not in (0, parent.st_uid, place.stat().st_uid)
    return _is_mount_point(place) or not may or bool(sticky)


def _is_mount_point(path: Path) -> bool:
    """Bind mounts of the same file system included, which ``os.path.ismount`` does not see."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    escaped = re.sub(rb"[\\ \t\n]", lambda found: b"\\%03o" % found[0][0], os.fsencode(path))
    return any(line.split(b" ")[4] == escaped for line in lines)


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Keep other commands from moving files into ``place``; ``FileExistsError`` when one does."""
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another process is writing to {place} right now; {_OTHER}") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
