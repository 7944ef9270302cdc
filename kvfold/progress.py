"""Progress on stderr, so that stdout stays a table and one JSON line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

STDERR = Console(stderr=True)
HOUR = 3600
LONG = 20
"""Seconds from which on it is said beforehand how long something takes."""

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield the items, with a bar and the time that is left where stderr is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # rich estimates from the steps of the last half minute, which slow ones would never fill
    options = {"speed_estimate_period": HOUR, "transient": True, "disable": not STDERR.is_terminal}
    with Progress(*columns, console=STDERR, **options) as progress:
        task = progress.add_task(description, total=total)
        progress.advance(task, 0)  # the time of the start, so that one step is enough for an estimate
        yield from progress.track(items, total=total, task_id=task)


def announce(work: str, seconds: float) -> None:
    """Say in one line how long something will take, unless that is short."""
    if seconds >= LONG:
        duration = f"{seconds / 60:,.0f} minutes" if seconds >= 2 * 60 else f"{seconds:.0f} seconds"
        STDERR.print(f"{work} takes about {duration}.", highlight=False)
