"""A progress bar for people who watch, nothing for logs and pipes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(
    steps: int, done: int, wanted: bool | None
) -> Iterator[Callable[[int, float], None]]:
    """Show steps, loss and remaining time on stderr.

    Args:
        steps: number of steps.
        done: steps that were taken before.
        wanted: None means: if stderr is a terminal.

    Yields:
        A function of (steps done, loss) that moves the bar.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda _done, _loss: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps, completed=done, loss=float("nan"))
        yield lambda done, loss: bar.update(task, completed=done, loss=loss)
