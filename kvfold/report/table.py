"""One table for the terminal, for Markdown and for HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table as RichTable


def plus_minus(error: float, form: str = ".4f") -> str:
    """± 0.0123 behind a space, for what it is the error of; nothing where there is none, as of one sample."""
    return "" if math.isnan(error) else f" ± {error:{form}}"


@dataclass
class Table:
    """Cells are texts; the first `left` columns are words, the others numbers. `title`: what was measured, and how."""

    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    title: str = ""
    left: int = 1

    def add(self, *cells: str) -> None:
        """One row."""
        self.rows.append(cells)

    def rich(self) -> RichTable:
        """For the terminal, where it can be changed further."""
        table = RichTable(title=self.title or None, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def show(self, console: Console) -> None:
        """Print it."""
        console.print(self.rich())

    def markdown(self) -> str:
        """The title as a sentence, then the table."""
        lines = [f"| {' | '.join(line)} |" for line in (self.columns, *self.rows)]
        head = [f"{self.title.rstrip('.')}.", ""] if self.title else []
        return "\n".join([*head, lines[0], "|---" * len(self.columns) + "|", *lines[1:]]) + "\n"

    def html(self) -> str:
        """A <table>."""
        head = _cells("th", self.columns)
        body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in self.rows)
        return f"<table><tr>{head}</tr>{body}</table>"


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
