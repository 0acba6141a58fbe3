"""Progress bars: what is running, how far it is, how long it still takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from vllm_spense.pruning import PruneProgress


@contextmanager
def module_progress(console: Console, what: str) -> Iterator[Callable[[str, int | None], None]]:
    """A bar that counts calls; the callback takes a name and, where it is known, the total."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def step(name: str, total: int | None) -> None:
            bar.update(task, advance=1, total=total, description=f"{what} {name}")

        yield step


@contextmanager
def pruning_progress(console: Console) -> Iterator[Callable[[PruneProgress], None]]:
    """One printed line per layer: losses of its modules, time so far and time left."""

    def step(event: PruneProgress) -> None:
        losses = "  ".join(f"{name.rpartition('.')[2]} {loss:.4f}" for name, loss in event.losses.items())
        console.print(
            f"layer {event.layer:>3}/{event.layers}  {losses}  "
            f"[dim]{event.elapsed:.0f} s, {event.remaining:.0f} s left[/]",
            highlight=False,
        )

    yield step
