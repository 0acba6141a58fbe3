"""No output replaces what a person has, and what is replaced is there until the new one is complete."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.mounts import run_with_mount
from vllm_spense.format import CheckpointWriter
from vllm_spense.format.manifest import MANIFEST_NAME, check_manifest, write_manifest
from vllm_spense.format.target import Target

OLD = {"model.safetensors": "old weights", "config.json": "{}", "sub/template.jinja": "old"}
NEW = {"model.safetensors": "new weights", "config.json": "{1}", "other/template.jinja": "new"}


def make(directory: Path, files: dict[str, str]) -> Path:
    """A directory as Spense leaves it: these files and their manifest."""
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    write_manifest(directory)
    return directory


def contents(directory: Path) -> dict[str, str]:
    found = (path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {path.relative_to(directory).as_posix(): path.read_text() for path in found}


def publish(place: Path, new: dict[str, str] = NEW, overwrite: bool = True) -> None:
    target = Target(place, overwrite=overwrite)
    target.check()
    directory = make(target.new_directory(), new)
    try:
        target.rehearse(directory)
        target.publish(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def assert_only(place: Path, files: dict[str, str]) -> None:
    """Exactly these files, nothing hidden in or beside the place."""
    assert contents(place) == files
    assert {path.name for path in place.iterdir()} == {name.partition("/")[0] for name in files} | {
        MANIFEST_NAME
    }
    assert [path.name for path in place.parent.iterdir() if path.name.startswith(".")] == []
    check_manifest(place)


# -- inputs --------------------------------------------------------------------------------------


def refused(out: Path, *inputs: Path, match: str = "input of this command; choose another") -> None:
    before = contents(out)
    with pytest.raises(FileExistsError, match=match):
        Target(out, overwrite=True, inputs=inputs).check()
    assert contents(out) == before


def test_an_input_is_not_replaced(tmp_path: Path) -> None:
    model = make(tmp_path / "model", OLD)  # even if it is a checkpoint of ours
    refused(model, model)
    refused(tmp_path / "x" / ".." / "model", model)
    (tmp_path / "link").symlink_to(model)
    refused(tmp_path / "link", model)
    refused(model, tmp_path / "link")


def test_nor_is_what_holds_an_input(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent", {"model/model.safetensors": "dense", "text.txt": "words"})
    refused(parent, parent / "model", match=r"parent holds .*parent/model, an input")
    refused(parent, parent / "text.txt")
    (tmp_path / "link.txt").symlink_to(parent / "text.txt")
    refused(parent, tmp_path / "link.txt")


def test_nor_is_what_links_in_an_input_lead_to(tmp_path: Path) -> None:
    """A model directory that is put together from links, as the hub's cache is."""
    checkpoint, model = make(tmp_path / "checkpoint", OLD), tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    refused(checkpoint, model)


def test_an_input_under_another_mount_is_the_same(tmp_path: Path) -> None:
    make(tmp_path / "models", {"m/model.safetensors": "dense"})
    (tmp_path / "out").mkdir()
    script = (
        "import sys; from vllm_spense.format.target import Target; "
        "Target(sys.argv[1], overwrite=True, inputs=[sys.argv[2]]).check()"
    )
    command = [sys.executable, "-c", script, tmp_path / "out", tmp_path / "models" / "m"]
    done = run_with_mount(tmp_path / "models", tmp_path / "out", command)
    assert "an input of this command" in done.stderr


def test_names_that_are_not_there_are_of_the_hub(tmp_path: Path) -> None:
    Target(tmp_path / "out", inputs=["org/model", "x" * 5000]).check()


def test_a_place_in_an_input_is_fine(tmp_path: Path) -> None:
    """``cd model; spense prune . -o spense``: the model is not touched."""
    Target(make(tmp_path / "model", OLD) / "spense", inputs=[tmp_path / "model"]).check()


# -- what --overwrite replaces -------------------------------------------------------------------


def test_overwrite_replaces_a_checkpoint(tmp_path: Path) -> None:
    out = make(tmp_path / "out", OLD)
    with pytest.raises(
        FileExistsError, match="exists and is not empty; choose another directory or pass --over"
    ):
        Target(out).check()
    publish(out)
    assert_only(out, NEW)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"thesis.tex": "years"}, "no checkpoint that Spense wrote .*--overwrite replaces nothing else"),
        ({"config.json": "{}", "model.safetensors": "a dense model"}, "no checkpoint that Spense wrote"),
        ({".git/HEAD": "ref"}, "no checkpoint that Spense wrote"),
    ],
)
def test_what_is_no_checkpoint_of_ours_stays(tmp_path: Path, files: dict[str, str], match: str) -> None:
    out = make(tmp_path / "out", files)
    (out / MANIFEST_NAME).unlink()
    refused(out, match=match)


@pytest.mark.parametrize("name", ["notes.txt", "sub/eval.json", ".git/HEAD", "a/b/c"])
def test_a_file_that_the_manifest_does_not_list_stays(tmp_path: Path, name: str) -> None:
    out = make(tmp_path / "out", OLD)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    refused(out, match=f"holds {name}, which is not of the checkpoint")


def test_a_link_to_a_folder_stays_with_what_is_behind_it(tmp_path: Path) -> None:
    out, mine = make(tmp_path / "out", OLD), tmp_path / "mine"
    shutil.move(out / "sub", mine)
    (out / "sub").symlink_to(mine)
    refused(out, match="holds sub, which")
    assert (mine / "template.jinja").read_text() == "old"


def test_a_damaged_manifest_tells_nothing(tmp_path: Path) -> None:
    out = make(tmp_path / "out", OLD)
    (out / MANIFEST_NAME).write_text("{")
    refused(out, match="cannot be replaced, for the manifest cannot be read")


def test_the_root_and_a_link_to_itself(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="choose another output directory"):
        Target("/", overwrite=True).check()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(FileExistsError, match="leads to itself"):
        Target(tmp_path / "loop").check()


def test_a_file_that_came_during_the_work_stays(tmp_path: Path) -> None:
    out = make(tmp_path / "out", OLD)
    target = Target(out, overwrite=True)
    target.check()
    new = make(target.new_directory(), NEW)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        target.publish(new)
    assert contents(out) == OLD | {"notes.txt": "mine"}


def test_so_does_one_that_came_after_the_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out", OLD)
    target = Target(out, overwrite=True)
    new = make(target.new_directory(), NEW)
    rename = os.rename

    def late(source: Path, goal: Path) -> None:
        if Path(source) == out and not (out / "notes.txt").exists():
            (out / "notes.txt").write_text("mine")
        rename(source, goal)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        target.publish(new)
    assert contents(out) == OLD | {"notes.txt": "mine"}


# -- the end, whole or not at all ----------------------------------------------------------------


def stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every directory for one that cannot be renamed."""
    monkeypatch.setattr("vllm_spense.format.target._cannot_be_renamed", Path.is_dir)


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("old", [{}, OLD])
def test_an_error_or_a_kill_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: bool, old: dict[str, str]
) -> None:
    """Every rename and every removal is a step; what is found afterwards is the old or the new, whole."""
    if stays:
        stay(monkeypatch)
    outcomes = []
    for kind in (OSError(errno.EIO, "cable pulled"), None):
        for step in range(100):
            out = tmp_path / f"{type(kind).__name__}-{step}" / "out"
            out.mkdir(parents=True)
            if old:
                make(out, old)
            if not stopped(step, kind, lambda out=out: publish(out)):
                break
            Target(out, overwrite=True).check()  # what the next command does first
            found = visible(out)
            assert found in (old, NEW), f"step {step} of {kind}"
            outcomes.append(found == NEW)
            publish(out)
            assert visible(out) == NEW
        else:
            pytest.fail("it never came to an end")
    assert outcomes.count(False) > 2
    if old:
        assert True in outcomes, "the old one was being removed"


def visible(out: Path) -> dict[str, str]:
    """Without what a killed command was writing in; nobody can tell that it is dead."""
    return {name: text for name, text in contents(out).items() if not name.startswith(".out.spense-")}


def stopped(step: int, error: BaseException | None, work: Callable[[], None]) -> bool:
    """Whether ``work`` has more steps than that; the next one raises ``error`` or, if None, kills it."""
    child = os.fork()
    if child == 0:
        left = step

        def count(plain: Callable[..., None]) -> Callable[..., None]:
            def stop(*arguments: object, **options: object) -> None:
                nonlocal left
                if left == 0:
                    left -= 1
                    if error is None:
                        os._exit(9)
                    raise error
                left -= 1
                plain(*arguments, **options)

            return stop

        for name in ("rename", "unlink", "rmdir"):
            setattr(os, name, count(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(9)
        os._exit(0 if left >= 0 else 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


# -- links and mount points ----------------------------------------------------------------------


def test_a_link_is_written_behind(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "models")  # nothing is there yet
    publish(tmp_path / "out", OLD)
    publish(tmp_path / "out", NEW)
    assert (tmp_path / "out").is_symlink()
    assert_only(tmp_path / "disk" / "models", NEW)
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}


def test_the_directory_that_the_shell_is_in_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out", OLD)
    monkeypatch.chdir(out)
    publish(Path("."))
    assert {path.name for path in Path(".").iterdir()} == {path.name for path in out.iterdir()}
    assert_only(out, NEW)


def test_a_parent_without_rights_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root has all rights, so the question is answered for it."""
    out = make(tmp_path / "out", OLD)
    plain = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and plain(path, mode))
    inode = out.stat().st_ino
    publish(out)
    assert out.stat().st_ino == inode
    assert_only(out, NEW)


@pytest.mark.parametrize("old", [{}, OLD])
def test_a_mount_point_that_shows_only_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: dict[str, str]
) -> None:
    """A system without /proc: renaming fails with EBUSY, moving into it with EXDEV."""
    out = tmp_path / "out"
    out.mkdir()
    if old:
        make(out, old)
    rename = os.rename

    def refuse(source: Path, goal: Path) -> None:
        source, goal = Path(source), Path(goal)
        if out in (source, goal):
            raise OSError(errno.EBUSY, "Device or resource busy")
        if source.is_relative_to(out) != goal.is_relative_to(out):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, goal)

    monkeypatch.setattr(os, "rename", refuse)
    publish(out)
    assert_only(out, NEW)


def test_a_file_system_without_modes_and_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network and container mounts are: found before only at the very end."""

    def refuse(number: int) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    monkeypatch.setattr(os, "chmod", refuse(errno.EPERM))
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.write_config({"model_type": "llama"})
        writer.add("a", torch.zeros(8))
    check_manifest(tmp_path / "out")


def test_two_commands_do_not_move_files_into_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_spense.format.target import _locked

    out = make(tmp_path / "out", OLD)
    with _locked(out), pytest.raises(FileExistsError, match="another process is writing to"):
        Target(out, overwrite=True).check()


def test_a_new_disk_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ext4 puts ``lost+found`` into the root of every new file system; elsewhere it is somebody's."""
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="not empty"):
        Target(out).check()
    monkeypatch.setattr("vllm_spense.format.target._is_mount_point", out.__eq__)
    publish(out)
    assert contents(out) == NEW
    assert (out / "lost+found").is_dir()


def test_what_a_kill_left_of_a_rehearsal_goes_with_the_next(tmp_path: Path) -> None:
    place = tmp_path / "out[1]"
    left, other = tmp_path / ".out[1].spense-token.4711", tmp_path / ".out1.spense-token.4711"
    for path in (left, other):
        path.write_text("may this be written and renamed?\n")
    publish(place)
    assert not left.exists()
    assert other.exists(), "of another place"
