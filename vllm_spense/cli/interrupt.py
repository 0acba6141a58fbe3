"""Ctrl-C in long commands: one line that says what is kept, and exit code 130, wherever it strikes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.console import Console

from vllm_spense.cli.console import say, shown


@contextmanager
def interruptible(console: Console) -> Iterator[None]:
    """While open, Ctrl-C prints the interruption's notes and exits with 130 (SIGINT's code in shells).

    Libraries that call back into Python may replace the ``KeyboardInterrupt`` by an error of their own:
    ``torch.asarray`` drops whatever ``__getitem__`` raises and says that it cannot determine a shape, and
    safetensors calls it for every tensor. An error behind a Ctrl-C therefore is an interruption, too.

    Raises: ``typer.Exit(130)``; errors without a Ctrl-C pass through.
    """
    struck = False

    def strike(_number: int, _frame: FrameType | None) -> None:
        nonlocal struck
        struck = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a script's background job: Ctrl-C is not meant for it
        signal.signal(signal.SIGINT, strike)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not (struck or isinstance(error, KeyboardInterrupt)):
            raise
        text = ". ".join(notes(error)) or "nothing was left behind"
        say(console, ("interrupted:", "red"), " ", text)
        raise typer.Exit(130) from None  # typer would end without a word
    finally:
        signal.signal(signal.SIGINT, before)


def notes(error: BaseException) -> list[str]:
    """What was added to an error on its way up (``add_note``), ready to be printed."""
    return [shown(note) for note in getattr(error, "__notes__", ())]
