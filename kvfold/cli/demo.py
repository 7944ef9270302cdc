"""`kvfold demo`: the packaged model, folded and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.options import Device


def command(
    out: Annotated[Path, typer.Option(help="Folder for models, table and report.")] = Path("demo"),
    device: Device = "auto",
) -> None:
    """Fold the packaged model with several presets and budgets; write a report. Takes a few minutes."""
    from kvfold.evaluation.demo import demo
    from kvfold.report.tables import print_comparison

    print_comparison(demo(out, device=device), out)
