"""What is printed: names and messages exactly as they are, whatever they hold, on any terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from vllm_spense.format.files import storable


def new_console(*, stderr: bool = False) -> Console:
    """A console that reads no markup and no emoji codes in what it prints; style comes from :func:`say`."""
    return Console(stderr=stderr, markup=False, emoji=False)


def say(console: Console, *parts: str | tuple[str, str]) -> None:
    """Print one line that no terminal's width breaks: texts, and pairs of text and style."""
    console.print(Text.assemble(*parts), soft_wrap=True, highlight=False)


def shown(name: Any) -> str:
    """A name or path in one line of printable characters; others are escaped as in Python."""
    text = storable(str(name))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_anywhere() -> None:
    """Escape what the terminal's encoding lacks, instead of failing on it."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
