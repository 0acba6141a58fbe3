"""A full disk, a place that cannot be written, two runs into one directory: one clear line, nothing lost.

The disk is full at a file size (``RLIMIT_FSIZE``), which the file system enforces like its own end.
"""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_families import make_family
from tests.tiny_text import write_text
from vllm_spense import verify
from vllm_spense.pruning.resume import work_path

LAYER_FITS = 400_000
"""Bytes between a finished layer's file and those of the embeddings, which are written at the end."""
NOTHING_FITS = 30_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a text, and a checkpoint pruned from both."""
    root = tmp_path_factory.mktemp("faults")
    make_family("llama", root / "dense", vocab_size=8192)
    write_text(root / "text.txt")
    done = spense(*prune(root, root / "whole"))
    assert done.returncode == 0, done.stderr
    return root


def spense(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line; no file may grow beyond ``limit`` bytes."""
    command = [sys.executable, "-m", "vllm_spense.cli.app", *map(str, arguments)]

    def full_disk() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(command, capture_output=True, text=True, timeout=200, preexec_fn=full_disk)


def prune(folder: Path, out: Path, *more: object) -> list[object]:
    sizes = ["--num-samples", 8, "--seq-len", 64, "--no-check"]
    return ["prune", folder / "dense", "-o", out, "--calibration", folder / "text.txt", *sizes, *more]


def check_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1 and one line of error with these words, whatever warnings are above it."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    *_, line = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("activations", ["host", "disk"])
def test_prune_on_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, activations: str) -> None:
    more = ["--cache-activations", activations]
    done = spense(*prune(folder, tmp_path / "out", *more), limit=NOTHING_FITS)
    check_refused(done, str(tmp_path), "cannot be written", "File too large", "free space on its disk")
    assert not list(tmp_path.iterdir())


def test_prune_goes_on_when_the_disk_has_space_again(folder: Path, tmp_path: Path) -> None:
    done = spense(*prune(folder, tmp_path / "out"), limit=LAYER_FITS)
    check_refused(done, "File too large", "finished layers are kept", "--resume continues the run")
    assert hidden(tmp_path) == [work_path("out").name]
    again = spense(*prune(folder, tmp_path / "out", "--resume"))
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "out") == contents(folder / "whole")
    assert hidden(tmp_path) == []


def test_export_on_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    before = contents(folder / "whole")
    done = spense("export", folder / "whole", "-o", tmp_path / "out", limit=LAYER_FITS)
    check_refused(done, str(tmp_path), "cannot be written", "File too large")
    assert not list(tmp_path.iterdir())
    assert contents(folder / "whole") == before


def test_overwriting_on_a_full_disk_keeps_what_was_there(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "whole", tmp_path / "out")
    arguments = ("export", folder / "whole", "-o", tmp_path / "out", "--overwrite")
    check_refused(spense(*arguments, limit=LAYER_FITS), "cannot be written")
    assert contents(tmp_path / "out") == contents(folder / "whole")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("command", ["prune", "export"])
def test_a_place_that_cannot_be_written(folder: Path, command: str) -> None:
    """Under /proc not even root may make files; and no directory is inside a file."""

    def run(out: Path) -> subprocess.CompletedProcess[str]:
        return spense(
            *(prune(folder, out) if command == "prune" else ("export", folder / "whole", "-o", out))
        )

    check_refused(run(Path("/proc/out")), "/proc/out cannot be written", "choose another output directory")
    inside = folder / "text.txt" / "out"
    check_refused(run(inside), str(folder / "text.txt"), "choose another output directory")


def test_two_prunes_into_one_directory(folder: Path, tmp_path: Path) -> None:
    """The second is refused at once; the first does not notice."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vllm_spense.cli.app", *map(str, prune(folder, out))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        while not (work_path(out) / "state.json").exists():
            assert first.poll() is None, "it ended too early to be met"
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # it must not be done before the second one is
        try:
            second = spense(*prune(folder, out))
        finally:
            first.send_signal(signal.SIGCONT)
        check_refused(second, "another process is pruning into", "choose another OUT")
        assert first.wait(timeout=200) == 0, first.stderr
    assert contents(out) == contents(folder / "whole")
    verify(out)
