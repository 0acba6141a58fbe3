"""The one error that everything read from a checkpoint can raise."""

from __future__ import annotations

import re
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint does not hold what it promises.

    The message names the place (file, module, tensor), what was expected and found, and how to
    mend it, so that nobody has to open the file to understand the problem. It is one line of printable
    text of bounded length, whatever names the file holds.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: object = None,
        module: str | None = None,
        tensor: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else str(file)
        self.module = module
        self.tensor = tensor
        self.fix = fix
        super().__init__(self._text())

    def _text(self) -> str:
        named = (("file", self.file), ("module", self.module), ("tensor", self.tensor))
        where = ", ".join(f"{kind} {one_line(name, 500)}" for kind, name in named if name)
        problem = one_line(self.problem)
        text = f"{where}: {problem}" if where else problem
        return f"{text}. Fix: {one_line(self.fix, 1000)}" if self.fix else text

    def __reduce__(self) -> tuple[Any, ...]:  # keeps the fields when it crosses a process border
        return _rebuild, (self.problem, self.file, self.module, self.tensor, self.fix)


def one_line(text: str, limit: int = 1500) -> str:
    """Text from a file, fit for a terminal and a log: no control characters, no lone surrogates."""
    text = re.sub(r"\s*\n\s*", " ", text[: limit + 1] + ("…" if len(text) > limit else ""))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _rebuild(problem: str, *rest: Any) -> CheckpointError:
    return CheckpointError(problem, **dict(zip(("file", "module", "tensor", "fix"), rest, strict=True)))


RESAVE = "convert the model with transformers' save_pretrained first"
REPRUNE = "make the checkpoint again with `spense prune`, or download it again"
