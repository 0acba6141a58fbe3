"""Ctrl-C is Ctrl-C wherever it strikes, also inside of a library that makes an error of its own of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from io import StringIO

import pytest
import torch
import typer
from rich.console import Console

from vllm_spense.cli.interrupt import interruptible


@pytest.fixture(autouse=True)
def plain_handler() -> Iterator[None]:
    """Python's own; a shell's background jobs start with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Struck:
    """A sequence that is being read when Ctrl-C comes, as safetensors' storage is by torch."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        ctrl_c()
        if index < 3:
            return 1
        raise IndexError


def in_torch() -> None:
    try:
        torch.asarray(Struck(), dtype=torch.uint8)
    except ValueError as error:
        error.add_note("2 finished layers are kept in [out]")
        raise


def in_python() -> None:
    try:
        ctrl_c()
    except KeyboardInterrupt as error:
        error.add_note("2 finished layers are kept in [out]")
        raise


def run(work: Callable[[], None]) -> str:
    said = StringIO()
    with pytest.raises(typer.Exit) as caught, interruptible(Console(file=said, width=20)):
        work()
    assert caught.value.exit_code == 130
    return said.getvalue()


@pytest.mark.parametrize("work", [in_python, in_torch])
def test_the_notes_are_one_line(work: Callable[[], None]) -> None:
    assert run(work) == "interrupted: 2 finished layers are kept in [out]\n"


def test_without_notes() -> None:
    assert run(ctrl_c) == "interrupted: nothing was left behind\n"


def test_torch_hides_the_interruption() -> None:
    """Why an error counts as one; once this fails, it no longer has to."""
    with pytest.raises(ValueError, match="could not determine the shape"):
        torch.asarray(Struck(), dtype=torch.uint8)


def test_other_errors_pass_and_the_handler_is_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    said = StringIO()
    with pytest.raises(ValueError, match="no such text"), interruptible(Console(file=said)):
        raise ValueError("no such text")
    assert said.getvalue() == ""
    run(ctrl_c)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_background_job_stays_deaf() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible(Console(file=StringIO())):
        ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
