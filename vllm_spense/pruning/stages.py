"""What a pruning run is doing at the moment, told to whoever watches: a benchmark times it.

Stages lie inside each other (a layer's weights are read in the middle of a forward pass). Nobody watches in
an ordinary run, and threads of several devices tell nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Literal

Stage = Literal[
    "embed",
    "forward",
    "gradient",
    "Hessian",
    "factorise",
    "OBS",
    "refit and refine",
    "joint fit",
    "round and pack",
    "select",
    "output error",
    "read",
    "write",
]
Watcher = Callable[[Stage, int | None], AbstractContextManager[None]]
"""Gets a stage and, where it is about linears with one input, how many features that has; open for as long as
the stage is."""
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def stage(name: Stage, features: int | None = None) -> Iterator[None]:
    """While open, or in every call of a function that it decorates, the run is in the stage ``name``."""
    watcher = _watcher.get()
    if watcher is None:
        yield
        return
    with watcher(name, features):
        yield


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """While open, ``watcher`` is told of the stages of the runs in this thread."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
