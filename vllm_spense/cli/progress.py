"""Progress bars: what is running, how far it is, how long it still takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_spense.cli.console import say, shown

if TYPE_CHECKING:
    from vllm_spense.pruning import PruneProgress
    from vllm_spense.recovery import RecoveryProgress


def quiet_transformers() -> None:
    """Only our own bars: transformers' bar for reading weights would break into them."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


@contextmanager
def one_line_warnings(console: Console) -> Iterator[None]:
    """While open, a warning for users is printed as a line of its own, without file and source line."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, UserWarning):
                say(console, ("warning:", "yellow"), " ", shown(message))
            else:
                plain(message, category, *where, **more)

        warnings.showwarning = show
        yield


class Step(Protocol):
    """One thing is done: its name (or number) and, where it is known, how many there are."""

    def __call__(self, name: object, total: int | None = None, /) -> None: ...


@contextmanager
def module_progress(console: Console, what: str) -> Iterator[Step]:
    """A bar that counts steps; progress callbacks of the Python functions can be it directly."""
    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    quiet = not console.is_terminal  # a log would get an empty line of it
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task(shown(what), total=None)

        def step(name: object, total: int | None = None) -> None:
            bar.update(task, advance=1, total=total, description=shown(f"{what} {name}"))

        yield step


@contextmanager
def stage_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that starts again with every stage: its name, steps done, steps in all."""
    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def step(stage: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=shown(stage))

        yield step


@contextmanager
def pruning_progress(console: Console) -> Iterator[Callable[[PruneProgress], None]]:
    """One printed line per layer: losses of its modules, time so far and time left."""

    def step(event: PruneProgress) -> None:
        if event.stage == "text":
            console.print(f"text: {event.layer / 1e6:.0f} million characters read", highlight=False)
            return
        if event.verdict is not None:
            console.print(f"dense indices: {event.verdict}", highlight=False)
            return
        if event.stage != "layers":
            if event.layer * 4 % event.layers < 4:  # a line per quarter
                name = {"check": "self-check", "gradient": "gradient pass", "pilot": "pilot"}[event.stage]
                say(console, f"{name} {event.layer / event.layers:>4.0%}  ", _clock(event))
            return
        losses = "  ".join(f"{name.rpartition('.')[2]} {loss:.4f}" for name, loss in event.losses.items())
        before = ("  done before" if event.restored else "", "dim")
        say(console, f"layer {event.layer:>3}/{event.layers}  {losses}", before, "  ", _clock(event))

    yield step


@contextmanager
def recovery_progress(console: Console) -> Iterator[Callable[[RecoveryProgress], None]]:
    """One printed line per training step: its loss, tokens per second, time so far and time left."""

    def step(event: RecoveryProgress) -> None:
        speed = f"{event.tokens_per_second:.0f} tokens/s"
        say(console, f"step {event.step:>3}/{event.steps}  loss {event.loss:.4f}  {speed}  ", _clock(event))

    yield step


def _clock(event: PruneProgress | RecoveryProgress) -> tuple[str, str]:
    return f"{event.elapsed:.0f} s, {event.remaining:.0f} s left", "dim"
