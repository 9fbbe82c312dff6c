"""A progress bar, or whatever the caller does with (steps done, steps in all)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

Progress = Callable[[int, int | None], None]


@contextmanager
def progress_ticker(progress: bool | Progress, steps: int | None) -> Iterator[Callable[[int], None] | None]:
    """A function to be called with the number of steps done; None if nobody wants to know."""
    if callable(progress):
        yield lambda done: progress(done, steps)
    elif progress:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Bar(TextColumn("steps"), *columns, transient=True) as bar:
            task = bar.add_task("steps", total=steps)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield None


@contextmanager
def bar(title: str, total: int | None, shown: bool) -> Iterator[Callable[..., None]]:
    """A bar on standard error, and the function that moves it on by one; its argument is a note beside the bar."""
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=Console(stderr=True), disable=not shown) as made:
        task = made.add_task(title, total=total, note="")
        yield lambda note="": made.update(task, advance=1, note=note)
        made.update(task, total=made.tasks[0].completed)
