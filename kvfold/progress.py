"""Progress bars on stderr, so that stdout stays a table and one JSON line."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

STDERR = Console(stderr=True)

SECONDS_WORTH_SAYING = 20
HOUR = 3600

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield the items, with a bar and the time that is left where stderr is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # rich takes the pace from the last half minute, in which a slow step does not end
    with Progress(
        *columns, console=STDERR, transient=True, disable=not STDERR.is_terminal, speed_estimate_period=HOUR
    ) as progress:
        task = progress.add_task(description, total=total)
        progress.advance(task, 0)  # when it began, so that one step is enough for an estimate
        yield from progress.track(items, total=total, task_id=task)


@contextmanager
def say_if_long(what: str, times: float) -> Iterator[None]:
    """Time the body, and say how long `what` will take, which is so many times as long, where that is worth a sentence."""
    started = time.perf_counter()
    yield
    seconds = times * (time.perf_counter() - started)
    if seconds >= SECONDS_WORTH_SAYING:
        STDERR.print(f"{what} will take about {duration(seconds)}", highlight=False)


def duration(seconds: float) -> str:
    """For people: 40 seconds, 7 minutes, 2.5 hours."""
    if seconds < 100:
        return f"{round(seconds, -1):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging as transformers_logging

    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bar:
            transformers_logging.enable_progress_bar()
