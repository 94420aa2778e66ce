"""A progress bar for people who watch, and now and then a line for logs and pipes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping

__all__ = ["progress_bar"]

Show = Callable[[int, Mapping[str, float]], None]
PAUSE = 30.0
"""Seconds between lines where nobody watches."""


@contextlib.contextmanager
def progress_bar(steps: int, done: int, wanted: bool | None) -> Iterator[Show]:
    """Show steps, speed, remaining time and the numbers of a training on stderr.

    Args:
        steps: number of steps.
        done: steps that were taken before.
        wanted: True: a bar; False: nothing; None: a bar in a terminal or a notebook, elsewhere a line
            every half a minute.

    Yields:
        A function of (steps done, name -> number) that moves the bar.
    """
    if wanted is None and not _watched():
        yield _lines(steps, done)
        return
    if not (wanted is None or wanted):
        yield lambda _done, _numbers: None
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
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    began = time.perf_counter()
    with Progress(*columns, console=Console(stderr=not _notebook())) as bar:
        task = bar.add_task("", total=steps, completed=done, words="")

        def show(now: int, numbers: Mapping[str, float]) -> None:
            words = _words(numbers, (now - done) / (time.perf_counter() - began))
            bar.update(task, completed=now, words=words)

        yield show


def _lines(steps: int, done: int) -> Show:
    began = last = time.perf_counter()

    def show(now: int, numbers: Mapping[str, float]) -> None:
        nonlocal last
        moment = time.perf_counter()
        if moment - last < PAUSE:
            return
        last, speed = moment, (now - done) / (moment - began)
        minutes, seconds = divmod(round((steps - now) / speed), 60)
        left = f"{minutes}:{seconds:02d} left"
        print(
            f"training: step {now} of {steps}, {_words(numbers, speed)}, {left}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    return show


def _words(numbers: Mapping[str, float], speed: float) -> str:
    shown = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items()]
    return ", ".join([*shown, f"{speed:.3g} steps/s"])


def _watched() -> bool:
    return sys.stderr.isatty() or _notebook()


def _notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"
