"""A progress bar, or whatever the caller does with (steps done, steps in all)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
